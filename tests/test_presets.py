"""Whole optimizers: what they are made of, and what cannot break them."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.selection import some
from support.states import newton_state

import partnewton as pn
from partnewton import averaging, directions, partitions, rules

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)
Y = jnp.asarray(np.tanh(np.asarray(X) @ RNG.normal(size=(3, 2))), jnp.float32)
PARAMS = {"b": jnp.zeros(2), "w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)}
# From weights as large as these, one run in ten saturates a unit in its first steps.
SMALL = jax.tree.map(lambda x: 0.3 * x, PARAMS)
DIRECTIONS = {
    "muon": lambda: None,
    "adam": optax.scale_by_adam,
    "momentum": lambda: optax.ema(0.9),
}


def loss(params, shift=0.0, factor=1.0):
    """A least squares problem whose minimum is near zero."""
    error = jnp.tanh(X @ params["w"] + params["b"]) - Y
    return factor * jnp.mean(error**2) + shift


STEPS = 600


@functools.cache
def preset(direction="muon", **kwargs):
    """The same object for the same arguments, so that it is compiled once."""
    return pn.partition_newton(direction=DIRECTIONS[direction](), **kwargs)


@functools.partial(jax.jit, static_argnames="tx")
def _run(tx, carry, factors, shift):
    def step(carry, factor):
        params, state = carry
        more = {"shift": shift, "factor": factor}
        grads = jax.grad(loss)(params, **more)
        updates, state = tx.update(grads, state, params, value_fn=loss, **more)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, loss(params))

    return jax.lax.scan(step, carry, factors)


def train(tx, params=PARAMS, state=None, steps=STEPS, factors=1.0, shift=0.0):
    """Parameters after each step, the last state, and the losses after each step."""
    state = jax.jit(tx.init)(params) if state is None else state
    factors = jnp.broadcast_to(jnp.asarray(factors, jnp.float32), steps)
    (_, state), (params, losses) = _run(
        tx, (params, state), factors, jnp.float32(shift)
    )
    return params, state, np.asarray(losses)


def at(n, params):
    """The parameters after n steps."""
    return jax.tree.map(lambda x: x[n - 1], params)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- what they are ---------------------------------------------------------------


def test_partition_newton_is_a_chain_of_four():
    ours, _, _ = train(pn.partition_newton(0.3, update_interval=3), steps=25)
    chain = optax.chain(
        directions.equilibrated(directions.orthogonal_momentum()),
        pn.scale_by_partition_newton(
            normalize="rms",
            rule=rules.with_noise_floor(rules.robust(shrinkage=0.5)),
            update_interval=3,
            average=averaging.relative(averaging.exponential(0.9, absolute_third=True)),
            backtracking=30,
        ),
        pn.scale_by_lookback(),
        optax.scale(-0.3),
    )
    theirs, state, _ = train(chain, steps=25)
    assert state[-2].factor != 1
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chain", [pn.partition_newton, pn.paper_newton])
def test_presets_have_all_arguments_of_the_transformation(chain):
    inner = set(inspect.signature(pn.scale_by_partition_newton).parameters)
    if chain is pn.partition_newton:
        inner -= {"smoothing", "normalize"}  # it averages summaries of unit directions
    assert inner <= set(inspect.signature(chain).parameters)


@pytest.mark.slow
def test_without_lookback_the_multiplier_is_the_learning_rate():
    _, state, _ = train(pn.partition_newton(lookback_rate=0.0), steps=15)
    assert state[-2].factor == 1
    _, state, _ = train(preset(), steps=15)
    assert abs(np.log(state[-2].factor)) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.slow
def test_between_refreshes_the_length_of_a_step_is_kept():
    tx = pn.partition_newton(0.3, update_interval=10)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(functools.partial(tx.update, value_fn=loss))
    for n in range(5):
        updates, state = update(jax.grad(loss)(params), state, params)
        lengths = [jnp.sqrt(jnp.mean(u**2)) for u in jax.tree.leaves(updates)]
        np.testing.assert_allclose(
            lengths, 0.3 * newton_state(state).learning_rates, rtol=1e-5
        )
        if n == 0:
            first = lengths
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(lengths, first, rtol=1e-5)


def published(clip_first):
    """Ten steps of the published method with averaged rates, in numpy's words."""
    params, momentum, eta = PARAMS, None, np.zeros(2)
    weight = 0.0
    for n in range(1, 7):
        grads = jax.grad(loss)(params)
        if momentum is None:
            momentum = jax.tree.map(jnp.zeros_like, grads)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, momentum, grads)
        u = jax.tree.map(lambda m, n=n: m / (1 - 0.9**n), momentum)
        if n % 2 == 1:
            s = pn.summarize(loss, params, u)
            scale = jnp.cbrt(jnp.abs(s.third))
            new = pn.solve_cubic(s.gradient, s.hessian, scale, 3.0).learning_rates
            new = np.maximum(new, 0) if clip_first else np.asarray(new)
            weight = 0.5 * weight + 1
            eta = 0.5 * eta + new
        rates = np.maximum(eta / weight, 0)
        params = {
            "b": params["b"] - 0.2 * rates[0] * u["b"],
            "w": params["w"] - 0.2 * rates[1] * u["w"],
        }
    return params


@pytest.mark.slow
@pytest.mark.parametrize("clip_first", [True, False])
def test_the_published_method_with_averaged_rates_clipped_before_or_after(clip_first):
    smoothing = averaging.exponential(0.5)
    tx = pn.paper_newton(
        rule=rules.cubic(3.0, nonnegative=clip_first),
        smoothing=smoothing if clip_first else averaging.nonnegative(smoothing),
        update_interval=2,
    )
    params = at(6, train(tx, steps=6)[0])
    expected = published(clip_first)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_published_variants_run_and_lower_the_loss():
    variants = {
        "unit": {"normalize": "norm"},
        "uniform": {"average": averaging.uniform(3, 3)},
        "average of D alone": {
            "average": averaging.exponential(pn.Summary(0.0, 0.0, 0.0, 0.5))
        },
    }
    for name, kwargs in variants.items():
        _, state, losses = train(pn.paper_newton(**kwargs), steps=40)
        assert losses[-1] < 0.5 * float(loss(PARAMS)), name
        assert newton_state(state).notfinite_count == 0, name


# --- nothing breaks them ---------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_defaults_train(direction):
    _, state, losses = train(preset(direction), SMALL)
    # Steps of held length bounce in the valley: rounding decides when they settle.
    assert losses[-1] < 0.05 * float(loss(SMALL))
    assert newton_state(state).notfinite_count == 0


# At the first step, at a refresh and between.
@pytest.mark.parametrize("when", some([0, 20, 23], default=[20]))
@pytest.mark.parametrize("direction", some(DIRECTIONS, default=["muon"]))
def test_a_batch_of_nans_is_skipped(direction, when):
    factors = jnp.ones(STEPS).at[when].set(jnp.nan)
    _, state, losses = train(preset(direction), factors=factors)
    _, _, undisturbed = train(preset(direction))
    assert np.all(np.isfinite(losses))
    assert newton_state(state).notfinite_count == 1
    before = losses[when - 1] if when else float(loss(PARAMS))
    assert losses[when] == pytest.approx(before, rel=1e-6)
    assert losses[-1] < max(3 * undisturbed[-1], 0.05 * float(loss(PARAMS)))


@pytest.mark.parametrize("direction", some(["muon", "adam"], default=["muon"]))
def test_a_batch_with_a_huge_loss_takes_a_bounded_step(direction):
    factors = jnp.ones(STEPS).at[20].set(1e6)
    _, _, losses = train(preset(direction), factors=factors)
    # It fills the momentum for a hundred steps or more; their lengths are kept.
    assert np.max(losses[20:]) < 0.5 * float(loss(PARAMS))
    assert losses[-1] <= losses[19]


@pytest.mark.parametrize("shift", some([-0.25, -8.0, 8.0], default=[-8.0]))
def test_a_constant_added_to_the_loss_trains_the_same(shift):
    plain = at(60, train(preset())[0])
    shifted, state, _ = train(preset(), shift=shift)
    shifted = at(60, shifted)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(shifted), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)
    assert newton_state(state).notfinite_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_loss_in_other_units_trains_the_same(factor):
    plain = at(60, train(preset("momentum"))[0])
    scaled = at(60, train(preset("momentum"), factors=factor)[0])
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("direction", some(DIRECTIONS, default=["muon"]))
def test_thousands_of_steps_at_the_optimum_stay_there(direction):
    def value_fn(p):
        return jnp.sum((p["w"] - 1.0) ** 2) + jnp.sum(p["b"] ** 2)

    params = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
    tx = preset(direction)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=3000)[0])
    after, state = run((params, tx.init(params)))
    assert_same(after, params)
    assert newton_state(state).notfinite_count == 0


@pytest.mark.slow
@jax.enable_x64(True)
def test_a_dead_subset_does_not_disturb_the_others():
    """In float64: in float32, rounding errors have grown to 1e-4 after 60 steps."""

    def with_dead(p):
        return loss({"b": p["b"], "w": p["w"]}) + 0.0 * jnp.sum(p["dead"])

    tx = pn.partition_newton(update_interval=10)

    @functools.partial(jax.jit, static_argnums=0)
    def trained(value_fn, params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=60)[0]

    params = {name: x.astype(jnp.float64) for name, x in PARAMS.items()}
    alone, _ = trained(loss, params)
    after, state = trained(with_dead, params | {"dead": jnp.ones(4, jnp.float64)})
    np.testing.assert_array_equal(after["dead"], 1.0)
    for name in PARAMS:
        np.testing.assert_allclose(after[name], alone[name], rtol=1e-9, atol=1e-12)
    assert pn.learning_rates(state)["dead"] == 0


def normalised_loss(p):
    """A bias before a batch normalisation, which takes it out again."""
    h = X @ p["w"] + p["bias"]
    h = (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-5)
    return jnp.mean((jnp.tanh(h) @ p["out"] - Y) ** 2)


NORMALISED = {
    "bias": jnp.zeros(5),
    "out": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32),
    "w": jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32),
}


def run_on(value_fn, params, tx, steps):
    """The largest learning rate of each subset on the way, and both ends."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        return (params, state), (pn.learning_rates(state), value_fn(params))

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    (params, _), (rates, losses) = run(params)
    return jax.tree.map(jnp.max, rates), params, losses


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_rate_of_a_bias_before_a_batch_norm_is_bounded(direction):
    """Its gradient is rounding and so is its curvature: their quotient is anything."""
    tx = preset(direction)
    rates, params, losses = run_on(normalised_loss, NORMALISED, tx, 200)
    assert rates["bias"] < 1
    assert np.max(np.abs(params["bias"])) < 1
    assert losses[-1] < 0.5 * float(normalised_loss(NORMALISED))


@pytest.mark.slow
def test_without_a_noise_floor_that_rate_is_huge():
    """From some biases at least: whether rounding leaves any gradient is chance."""
    tx = pn.partition_newton(rule=rules.robust())
    run = jax.jit(lambda params: run_on(normalised_loss, params, tx, 200)[0]["bias"])
    biases = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    assert max(run({**NORMALISED, "bias": bias}) for bias in biases) > 1e3


def saturated_loss(p):
    """Raw inputs, of sizes from 0.1 to 100: the softmax is saturated from the start."""
    x = X @ jnp.eye(3) * jnp.array([0.1, 10.0, 100.0])
    logits = jax.nn.relu(x @ p["w"]) @ p["v"]
    labels = jnp.argmin(Y @ jnp.array([[1.0, -1.0, 0.3], [0.5, 1.0, -1.0]]), 1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


SATURATED = {
    "v": jnp.asarray(10**0.5 * RNG.normal(size=(6, 3)), jnp.float32),
    "w": jnp.asarray(10**0.5 * RNG.normal(size=(3, 6)), jnp.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("halvings", [0, 30])
def test_backtracking_keeps_steps_small_at_a_saturated_softmax(halvings):
    """There is no curvature to bound a step, and the lengths ask for anything.

    One start may get away with it, by rounding alone: eight starts do not.
    """
    tx = preset(backtracking=halvings)

    def run(scale):
        params = optax.tree.scale(scale, SATURATED)
        _, _, losses = run_on(saturated_loss, params, tx, 100)
        return losses / saturated_loss(params)

    losses = jax.vmap(run)(jnp.linspace(0.9, 1.1, 8))
    assert (jnp.max(losses) <= 1.5) == (halvings > 0)
    assert jnp.max(losses[:, -1]) < 0.2 or halvings == 0


def test_a_checkpoint_taken_in_the_middle_of_an_interval_continues_bit_for_bit():
    tx = preset("adam")
    ones = functools.partial(train, tx, steps=17)
    half, state, _ = ones()
    carry = at(17, half), state
    through, _, _ = ones(*carry)
    resumed, _, _ = ones(*pickle.loads(pickle.dumps(jax.device_get(carry))))
    assert_same(resumed, through)
    whole, _, _ = train(tx, steps=34)
    assert_same(at(34, whole), at(17, resumed))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_trains(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    after, _, losses = train(preset(), params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(after))
    assert losses[-1] < 0.2 * float(loss(PARAMS))


@pytest.mark.slow
def test_the_factor_may_be_a_schedule_or_injected():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.2, 10, 100)
    _, _, losses = train(pn.partition_newton(schedule, update_interval=10), steps=100)
    assert losses[-1] < 0.1 * float(loss(PARAMS))
    tx = optax.inject_hyperparams(pn.partition_newton)(learning_rate=0.2)
    injected = at(20, train(tx, steps=20)[0])
    plain = at(20, train(preset())[0])
    for x, y in zip(jax.tree.leaves(injected), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_frozen_leaves_stay_and_may_be_left_to_another_optimizer():
    labels = {"b": partitions.FROZEN, "w": "w"}
    after = at(30, train(pn.partition_newton(param_labels=labels), steps=30)[0])
    np.testing.assert_array_equal(after["b"], PARAMS["b"])
    assert np.any(after["w"] != PARAMS["w"])


# --- the recipes of docs/how_to_choose.md ----------------------------------------

RECIPES = {
    "weight decay": lambda: pn.partition_newton(weight_decay=0.1),
    "the number of steps": lambda: pn.partition_newton(total_steps=STEPS),
    "an average": lambda: optax.chain(pn.partition_newton(), pn.track_average()),
    "gradient clipping": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), pn.partition_newton()
    ),
    "another direction": lambda: pn.partition_newton(direction=optax.scale_by_adam()),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(recipe):
    _, state, losses = train(RECIPES[recipe](), SMALL)
    assert losses[-1] < 0.05 * float(loss(SMALL))
    assert newton_state(state).notfinite_count == 0


@pytest.mark.slow
def test_embeddings_are_left_to_adam_by_frozen_labels():
    labels = {"b": partitions.FROZEN, "w": 0}
    newton = pn.partition_newton(param_labels=labels)
    adam = optax.chain(
        optax.adam(1e-2), optax.masked(optax.set_to_zero(), {"b": False, "w": True})
    )
    params, one, other = PARAMS, newton.init(PARAMS), adam.init(PARAMS)
    grads = jax.grad(loss)(params)
    body, one = newton.update(grads, one, params, value_fn=loss)
    rest, other = adam.update(grads, other, params)
    updates = jax.tree.map(jnp.add, body, rest)
    alone, _ = optax.adam(1e-2).update(grads, optax.adam(1e-2).init(params), params)
    np.testing.assert_allclose(updates["b"], alone["b"], rtol=1e-6)
    np.testing.assert_array_equal(updates["w"], body["w"])


@pytest.mark.slow
def test_the_curvature_may_be_measured_on_other_data_than_the_gradient():
    def on(rows, params):
        error = jnp.tanh(X[rows] @ params["w"] + params["b"]) - Y[rows]
        return jnp.mean(error**2)

    def first(params):
        return on(slice(0, 32), params)

    def both(params):
        return 0.5 * (first(params) + on(slice(32, 64), params))

    tx = pn.partition_newton()
    grads = jax.grad(first)(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=both)
    np.testing.assert_allclose(newton_state(state).loss, loss(PARAMS), rtol=1e-6)
