"""Weight decay: against closed forms, and what it must not disturb."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.selection import some

import partnewton as pn
import partnewton.flax
from partnewton import partitions, rules

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0, 0.5]])}
SCALE = {"a": 1.0, "b": 3.0}


def loss(params):
    return sum(0.5 * SCALE[k] * jnp.sum(x**2) for k, x in params.items())


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def constant(*rates):
    """A rule with the same rates at each refresh."""

    def rule(summary):
        return rules.Proposal(jnp.asarray(rates, summary.gradient.dtype), jnp.zeros(()))

    return rules.Rule(rule, third_order=False)


def run(tx, params=PARAMS, steps=5, value_fn=loss):
    """Parameters and states after each step."""
    state, seen = tx.init(params), []

    @jax.jit
    def step(params, state):
        given = jax.grad(value_fn)(params)
        updates, state = tx.update(given, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen.append((params, state))
    return seen


def transformation(*rates, **kwargs):
    inner = pn.scale_by_partition_newton(constant(*rates), **kwargs)
    return optax.chain(inner, optax.scale_by_learning_rate(1.0))


# --- against closed forms --------------------------------------------------------


@pytest.mark.parametrize("normalize", [None, "rms", "norm"])
def test_a_step_is_the_undecayed_one_and_its_length_times_the_parameters(normalize):
    decay, rates = 0.1, (0.3, -0.2)
    plain = transformation(*rates, normalize=normalize)
    tx = transformation(*rates, normalize=normalize, weight_decay=decay)
    grads = jax.grad(loss)(PARAMS)
    theirs, _ = plain.update(grads, plain.init(PARAMS), PARAMS, value_fn=loss)
    ours, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss)
    for name in PARAMS:
        length = rms(theirs[name])
        expected = theirs[name] - decay * length * PARAMS[name]
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6)


def test_with_the_direction_and_length_of_adamw_it_is_adamw():
    """A direction of signs has the RMS 1 by itself, like that of Adam at first."""
    sign = optax.stateless(lambda u, _: jax.tree.map(jnp.sign, u))
    ours = optax.chain(
        sign,
        pn.scale_by_partition_newton(
            constant(0.01, 0.01), normalize="rms", weight_decay=0.1
        ),
        optax.scale_by_learning_rate(1.0),
    )
    theirs = optax.adamw(0.01, b1=0.0, b2=0.0, eps=1e-30, weight_decay=0.1)
    for (x, _), (y, _) in zip(run(ours), run(theirs), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), x, y)


def test_once_its_gradient_is_zero_a_subset_decays_geometrically():
    """At the length it had before."""
    tx = transformation(0.2, 0.1, normalize="rms", weight_decay=0.3)
    grads = {"a": jnp.ones(2), "b": jnp.ones((1, 2))}
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss)
    params, grads = PARAMS, grads | {"b": jnp.zeros((1, 2))}
    for n in range(1, 5):
        updates, state = tx.update(grads, state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
        expected = PARAMS["b"] * (1 - 0.1 * 0.3) ** n
        np.testing.assert_allclose(params["b"], expected, rtol=1e-6)


@pytest.mark.slow
def test_a_subset_that_never_had_a_gradient_does_not_decay():
    tx = pn.partition_newton(weight_decay=0.1)
    params, _ = run(tx, value_fn=lambda p: jnp.sum(p["a"] ** 2))[-1]
    np.testing.assert_array_equal(params["b"], PARAMS["b"])


def test_the_fixed_point_depends_on_the_decay_and_not_on_the_lengths():
    """Along a constant gradient, -theta / rms(theta) = u and rms(theta) = 1 / decay."""

    def linear(params):
        return params["a"][0] - params["a"][1] + 5 * jnp.sum(params["b"])

    tx = transformation(0.5, 0.1, normalize="rms", weight_decay=0.5)
    params, _ = run(tx, value_fn=linear, steps=300)[-1]
    np.testing.assert_allclose(params["a"], [-2.0, 2.0], rtol=1e-4)
    np.testing.assert_allclose(params["b"], [[-2.0, -2.0]], rtol=1e-4)


@pytest.mark.slow
def test_on_noise_the_squared_rms_is_half_the_length_over_the_decay():
    """R^2 = (1 - l w)^2 R^2 + l^2 for independent directions of RMS 1."""
    length, decay, size = 0.05, 0.5, 2000
    tx = transformation(length, normalize="rms", weight_decay=decay)

    def step(carry, key):
        params, state = carry
        grads = jax.random.normal(key, (size,))
        updates, state = tx.update(grads, state, params, value_fn=jnp.sum)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.mean(params**2)

    params = jnp.ones(size)
    keys = jax.random.split(jax.random.key(0), 600)
    _, squares = jax.lax.scan(step, (params, tx.init(params)), keys)
    expected = length / (decay * (2 - length * decay))
    assert np.mean(squares[300:]) == pytest.approx(expected, rel=0.03)


# --- in the presets --------------------------------------------------------------

PRESETS = {"partition_newton": pn.partition_newton, "paper_newton": pn.paper_newton}
every_preset = pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
default_preset = pytest.mark.parametrize(
    "make",
    some(PRESETS.values(), default=[pn.partition_newton]),
    ids=PRESETS,
)


@default_preset
def test_the_decay_is_scaled_by_all_factors_of_the_step(make):
    (params, state), *_ = run(make(0.25), steps=1)
    (decayed, other), *_ = run(make(0.25, weight_decay=0.1), steps=1)
    ours, theirs = pn.newton_state(other), pn.newton_state(state)
    jax.tree.map(np.testing.assert_array_equal, ours.summary, theirs.summary)
    for name, before in PARAMS.items():
        length = rms(params[name] - before)
        expected = params[name] - 0.1 * length * before
        np.testing.assert_allclose(decayed[name], expected, rtol=1e-4, atol=1e-6)


@default_preset
def test_a_decay_of_zero_changes_no_bit(make):
    for (x, s), (y, t) in zip(run(make()), run(make(weight_decay=0.0)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, (x, s), (y, t))


@pytest.mark.slow
def test_a_traced_decay_of_zero_changes_nothing():
    injected = optax.inject_hyperparams(pn.partition_newton)(weight_decay=0.0)
    plain, _ = run(pn.partition_newton())[-1]
    params, _ = run(injected)[-1]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, plain
    )


@pytest.mark.parametrize(
    "mask",
    [
        {"a": False, "b": True},
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ],
    ids=["tree", "function"],
)
def test_masked_leaves_are_not_decayed(mask):
    grads = jax.grad(loss)(PARAMS)

    def update(**kwargs):
        tx = pn.partition_newton(**kwargs)
        return tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss)[0]

    plain, masked = update(), update(weight_decay=0.1, mask=mask)
    np.testing.assert_array_equal(masked["a"], plain["a"])
    assert np.all(masked["b"] != plain["b"])


def test_a_mask_may_be_a_prefix():
    params = {"body": PARAMS, "head": jnp.ones(2)}
    mask = {"body": True, "head": False}
    tx = transformation(0.1, 0.1, 0.1, normalize="rms", weight_decay=0.5, mask=mask)

    def linear(params):
        return sum(map(jnp.sum, jax.tree.leaves(params)))

    ((after, _),) = run(tx, params, 1, linear)
    np.testing.assert_allclose(after["body"]["a"], 0.95 * PARAMS["a"] - 0.1, rtol=1e-6)
    np.testing.assert_allclose(after["head"], 0.9, rtol=1e-6)


def test_a_mask_of_an_nnx_model_is_a_function_of_its_state():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.bias[...] = jnp.ones(3)

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    def trained(**kwargs):
        tx = transformation(0.1, 0.1, normalize="rms", **kwargs)
        graph, state = nnx.split(model)
        copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        optimizer = nnx.Optimizer(copy, tx, wrt=nnx.Param)

        def loss_of(model):
            return jnp.sum(model(jnp.ones((1, 2))) ** 2)

        value_fn = partnewton.flax.value_fn(copy, loss_of)
        optimizer.update(copy, nnx.grad(loss_of)(copy), value_fn=value_fn)
        return copy

    plain, decayed = trained(), trained(weight_decay=0.5, mask=matrices)
    np.testing.assert_array_equal(decayed.bias[...], plain.bias[...])
    expected = plain.kernel[...] - 0.5 * 0.1 * model.kernel[...]
    np.testing.assert_allclose(decayed.kernel[...], expected, rtol=1e-5, atol=1e-7)


def test_frozen_leaves_and_frozen_entries_are_not_decayed():
    labels = {"a": np.array([partitions.FROZEN, 0]), "b": partitions.FROZEN}
    params, _ = run(pn.partition_newton(param_labels=labels, weight_decay=0.1))[-1]
    np.testing.assert_array_equal(params["b"], PARAMS["b"])
    assert params["a"][0] == PARAMS["a"][0]
    assert params["a"][1] != PARAMS["a"][1]


@pytest.mark.slow
def test_a_batch_of_nans_does_not_decay():
    tx = pn.partition_newton(weight_decay=0.1)
    params, state = run(tx, steps=2)[-1]
    grads = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, state = tx.update(grads, state, params, value_fn=loss)
    assert not any(map(np.any, jax.tree.leaves(updates)))
    assert pn.newton_state(state).notfinite_count == 1


def test_a_huge_step_decays_to_zero_and_not_beyond():
    tx = transformation(64.0, 64.0, normalize="rms", weight_decay=0.1)
    ((params, _),) = run(tx, steps=1, value_fn=lambda p: jnp.sum(p["a"] + p["b"]))
    np.testing.assert_array_equal(params["a"], -64)


@pytest.mark.parametrize(
    "dtype", some([jnp.bfloat16, jnp.float16], default=[jnp.bfloat16])
)
def test_updates_keep_the_dtype_of_half_precision(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    after, _ = run(pn.partition_newton(weight_decay=0.1), params)[-1]
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}


# --- wrong arguments -------------------------------------------------------------


@every_preset
@pytest.mark.parametrize("value", [-1e-4, float("nan")])
def test_a_negative_decay_is_an_error(make, value):
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        make(weight_decay=value)


@every_preset
def test_a_decay_above_one_causes_a_warning(make):
    with pytest.warns(UserWarning, match="usual values are 0.01 to 0.1"):
        make(weight_decay=2.0)


@pytest.mark.parametrize(
    ("mask", "error"),
    [({"c": True}, ValueError), ({"a": True, "b": 0.5}, TypeError)],
)
def test_a_mask_that_does_not_fit_is_an_error(mask, error):
    tx = pn.partition_newton(weight_decay=0.1, mask=mask)
    grads = jax.grad(loss)(PARAMS)
    with pytest.raises(error, match="mask must"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss)
