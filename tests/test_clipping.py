"""Updates clipped relative to the size of the parameters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import types_of

import partnewton as pn
from partnewton import partitions

PARAMS = {"a": jnp.array([3.0, -4.0]), "b": jnp.zeros(3), "c": jnp.array(-0.5)}


def clipped(updates, params=PARAMS, state=None, max_ratio=0.1, **kwargs):
    tx = pn.clip_by_parameter_rms(max_ratio, **kwargs)
    state = tx.init(params) if state is None else state
    return jax.jit(tx.update)(updates, state, params)


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_a_step_is_at_most_max_ratio_times_its_own_rms_or_that_of_all():
    updates = {
        "a": jnp.array([1.0, 2.0]),
        "b": jnp.array([5.0, 0, 0]),
        "c": jnp.array(9.0),
    }
    found, _ = clipped(updates)
    everything = rms(flat(PARAMS))
    assert rms(PARAMS["a"]) > everything > rms(PARAMS["c"])
    for name, size in {"a": rms(PARAMS["a"]), "b": everything, "c": everything}.items():
        expected = updates[name] * 0.1 * size / rms(updates[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_a_shorter_step_is_left_as_it_is():
    updates = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), PARAMS)
    found, _ = clipped(updates)
    jax.tree.map(np.testing.assert_array_equal, found, updates)


def test_a_number_can_pass_through_zero():
    """What counts is how large it was, or it would only come nearer and nearer."""
    tx = pn.clip_by_parameter_rms(0.1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"x": jnp.array(-1.0)}, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = {"x": jnp.array(2.0)}
    carry = start, tx.init(start)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=15))(carry)
    np.testing.assert_allclose(params["x"], 2.0 - 15 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(state.reference_rms, [2.0])


def test_parameters_that_are_all_zero_are_compared_with_the_first_step():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    first = {"a": jnp.array([1.0, 1.0]), "b": jnp.full(3, -3.0), "c": jnp.array(0.5)}
    found, state = clipped(first, zeros)
    jax.tree.map(np.testing.assert_array_equal, found, first)
    moved = optax.apply_updates(zeros, found)
    again, _ = clipped(optax.tree.scale(10.0, first), moved, state)
    for name, length in {"a": 3.0, "b": 3.0, "c": 3.0}.items():
        np.testing.assert_allclose(rms(again[name]), length, rtol=1e-6)


def test_before_the_first_step_zeros_are_not_bounded():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    found, state = clipped(zeros, zeros)
    assert not np.any(flat(found))
    found, _ = clipped(optax.tree.scale(7.0, PARAMS), zeros, state)
    assert np.any(flat(found))


def test_subsets_inside_a_leaf_and_frozen_entries():
    labels = {
        "a": np.array([0, partitions.FROZEN]),
        "b": np.array([0, 1, 1]),
        "c": partitions.FROZEN,
    }
    params = {"a": jnp.array([3.0, 100.0]), "b": jnp.array([1.0, 2.0, 2.0])}
    params["c"] = jnp.array(100.0)
    updates = jax.tree.map(jnp.ones_like, params)
    found, state = clipped(updates, params, param_labels=labels)
    own, everything = np.sqrt([10 / 2, 8 / 2]), np.sqrt(18 / 4)
    sizes = np.maximum(own, everything)
    np.testing.assert_allclose(state.reference_rms, sizes, rtol=1e-6)
    np.testing.assert_allclose(found["a"], [0.1 * sizes[0], 0], rtol=1e-6)
    expected = 0.1 * sizes[np.array([0, 1, 1])]
    np.testing.assert_allclose(found["b"], expected, rtol=1e-6)
    assert found["c"] == 0


def test_subsets_without_updates_are_not_bounded():
    still = PARAMS | {"a": jnp.array([100.0, 100.0])}
    updates = PARAMS | {"a": jnp.zeros(2), "b": jnp.ones(3)}
    found, _ = clipped(updates, still)
    size = rms(np.array([0, 0, 0, 0.5]))
    np.testing.assert_allclose(found["b"], 0.1 * size, rtol=1e-6)


def test_sizes_that_are_not_finite_do_not_count():
    bad = PARAMS | {"a": jnp.array([jnp.inf, 1.0])}
    _, before = clipped(PARAMS)
    _, after = clipped(PARAMS, bad, before)
    np.testing.assert_array_equal(before.reference_rms, after.reference_rms)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types_stay_what_they_are(dtype):
    params = optax.tree.cast(PARAMS, dtype)
    tx = pn.clip_by_parameter_rms()
    state = tx.init(params)
    updates, after = tx.update(optax.tree.scale(9.0, params), state, params)
    assert types_of(updates) == types_of(params)
    assert types_of(after) == types_of(state)
    np.testing.assert_allclose(
        rms(updates["a"]), 0.01 * rms(params["a"]), rtol=2 * jnp.finfo(dtype).eps
    )


@pytest.mark.parametrize("max_ratio", [0.0, -1.0, np.nan])
def test_a_ratio_that_is_not_positive_is_an_error(max_ratio):
    with pytest.raises(ValueError, match="max_ratio must be positive"):
        pn.clip_by_parameter_rms(max_ratio)


def test_without_params_the_error_says_so():
    tx = pn.clip_by_parameter_rms()
    with pytest.raises(ValueError, match="params: clip_by_parameter_rms"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_updates_of_another_structure_are_named():
    tx = pn.clip_by_parameter_rms()
    with pytest.raises((TypeError, ValueError), match="updates"):
        tx.update({"a": PARAMS["a"]}, tx.init(PARAMS), PARAMS)


# --- What it is for ------------------------------------------------------------------

RNG = np.random.default_rng(5)
X = RNG.normal(size=(1000, 15)).astype(np.float32)
SCORES = np.tanh(X @ RNG.normal(size=15)) + X[:, 0] * X[:, 1]
Y = (SCORES + 0.7 * RNG.logistic(size=1000) > 0).astype(np.int32)  # most are noise


def network(key):
    keys, widths = jax.random.split(key, 3), itertools.pairwise([15, 48, 24, 2])
    return [
        {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for k, (a, b) in zip(keys, widths, strict=True)
    ]


def cross_entropy(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    outputs = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


@pytest.mark.slow
@pytest.mark.parametrize("clips", [True, False])
def test_without_clipping_the_first_steps_of_relu_networks_increase_the_weights(clips):
    """They lower the loss, and what they leave behind is slow to train from there."""
    tx = pn.partition_newton()
    tx = optax.chain(tx, pn.clip_by_parameter_rms()) if clips else tx

    def step(carry, places):
        params, state = carry
        batch = {"x": jnp.asarray(X)[places], "y": jnp.asarray(Y)[places]}
        grads = jax.grad(cross_entropy)(params, **batch)
        updates, state = tx.update(
            grads, state, params, value_fn=cross_entropy, **batch
        )
        return (optax.apply_updates(params, updates), state), None

    def growth(key):
        start = network(key)
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), order)
        return optax.tree.norm(params) / optax.tree.norm(start)

    order = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (100, 64)))
    grown = jax.jit(jax.vmap(growth))(jax.random.split(jax.random.key(0), 4))
    assert (jnp.max(grown) < 2) == clips
