"""Directions: what a bad batch leaves behind, and unit norms on subsets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from partnewton import directions, partitions

PARAMS = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.array([[1.0], [-2.0]])}}


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)
        for _ in range(n)
    ]


# --- guarded ---------------------------------------------------------------------

INNER = {
    "adam": optax.scale_by_adam,
    "momentum": lambda: optax.ema(0.9),
    "muon": lambda: optax.contrib.muon(1.0),
}


@pytest.mark.parametrize("name", INNER)
def test_without_bad_batches_nothing_is_changed(name):
    plain, ours = INNER[name](), directions.guarded(INNER[name]())
    one, other = plain.init(PARAMS), ours.init(PARAMS)
    for grads in gradients(3):
        expected, one = plain.update(grads, one, PARAMS)
        actual, other = ours.update(grads, other, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        jax.tree.map(np.testing.assert_array_equal, other, one)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", INNER)
def test_a_bad_batch_leaves_no_trace(name, bad):
    tx = directions.guarded(INNER[name]())
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS), PARAMS)
    broken = {**second, "a": second["a"].at[1].set(bad)}
    updates, after = tx.update(broken, state, PARAMS)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    healed, _ = tx.update(second, after, PARAMS)
    untouched, _ = tx.update(second, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, healed, untouched)


def test_a_batch_that_makes_the_state_overflow_leaves_no_trace():
    tx = directions.guarded(optax.scale_by_adam())
    huge = jax.tree.map(lambda x: 1e30 * x, PARAMS)  # finite, but not its square
    updates, state = tx.update(huge, tx.init(PARAMS), PARAMS)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(PARAMS))


def test_a_traced_hyperparameter_does_not_change_the_dtypes_of_the_state():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32)}

        def second(decay):
            tx = directions.guarded(optax.ema(decay))
            first = tx.init(params)
            return first, tx.update(params, first)

        first, (updates, state) = jax.jit(second)(jnp.asarray(0.5, jnp.float64))
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, state)
    assert updates["w"].dtype == jnp.float32


def test_extra_arguments_reach_the_direction():
    tx = directions.guarded(optax.contrib.reduce_on_plateau())
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=2.0)
    np.testing.assert_allclose(state.best_value, 2.0)


# --- normalize_by_subset ---------------------------------------------------------


def normalized(updates, params=PARAMS, **kwargs):
    tx = directions.normalize_by_subset(**kwargs)
    return tx.update(updates, tx.init(params), params)[0]


LABELS = {
    "per_tensor": (partitions.per_tensor, [[0, 1], [2, 3]]),
    "whole": (partitions.whole, [[0, 1, 2, 3]]),
    "inside a leaf": (
        {"a": np.array([0, 1]), "b": {"c": np.array([[1], [1]])}},
        [[0], [1, 2, 3]],
    ),
    "frozen": ({"a": "a", "b": partitions.FROZEN}, [[0, 1]]),
}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("case", LABELS)
def test_each_subset_gets_the_norm_one_and_keeps_its_direction(case):
    labels, subsets = LABELS[case]
    (u,) = gradients(1)
    before, after = flat(u), flat(normalized(u, param_labels=labels))
    expected = np.zeros(4)
    for places in subsets:
        expected[places] = before[places] / np.linalg.norm(before[places])
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_a_dead_subset_stays_zero():
    u = {**PARAMS, "a": jnp.zeros(2)}
    np.testing.assert_array_equal(normalized(u)["a"], [0.0, 0.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_norms_are_summed_in_float32_and_dtypes_stay(dtype):
    u = {"w": jnp.full(4096, 300.0, dtype)}  # the sum of squares overflows float16
    unit = normalized(u, u)["w"]
    assert unit.dtype == dtype
    np.testing.assert_allclose(np.asarray(unit, np.float32), 1 / 64, rtol=1e-2)


def test_a_direction_that_is_not_finite_stays_so():
    u = {**PARAMS, "a": jnp.array([1.0, jnp.nan])}
    assert np.isnan(normalized(u)["a"]).any()


@pytest.mark.parametrize(
    ("updates", "params", "message"),
    [
        (PARAMS, None, "params: normalize_by_subset needs the parameters"),
        ({"a": PARAMS["a"]}, PARAMS, "updates has no leaf 'b/c'"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(updates, params, message):
    tx = directions.normalize_by_subset()
    with pytest.raises(ValueError, match=message):
        tx.update(updates, optax.EmptyState(), params)
