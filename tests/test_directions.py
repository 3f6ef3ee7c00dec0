"""Directions: bad batches, and units of rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from partnewton import directions

PARAMS = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.array([[1.0], [-2.0]])}}


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)
        for _ in range(n)
    ]


# --- skip_nonfinite --------------------------------------------------------------

INNER = {
    "adam": optax.scale_by_adam,
    "momentum": lambda: optax.ema(0.9),
    "muon": lambda: optax.contrib.muon(1.0),
}


@pytest.mark.parametrize("name", INNER)
def test_skip_nonfinite_on_finite_batches_is_the_inner_direction(name):
    plain, ours = INNER[name](), directions.skip_nonfinite(INNER[name]())
    one, other = plain.init(PARAMS), ours.init(PARAMS)
    for grads in gradients(3):
        expected, one = plain.update(grads, one, PARAMS)
        actual, other = ours.update(grads, other, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        jax.tree.map(np.testing.assert_array_equal, other, one)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", INNER)
def test_a_batch_that_is_not_finite_leaves_the_state_unchanged(name, bad):
    tx = directions.skip_nonfinite(INNER[name]())
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS), PARAMS)
    broken = {**second, "a": second["a"].at[1].set(bad)}
    updates, after = tx.update(broken, state, PARAMS)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    healed, _ = tx.update(second, after, PARAMS)
    untouched, _ = tx.update(second, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, healed, untouched)


def test_a_batch_that_makes_the_state_overflow_leaves_it_unchanged():
    tx = directions.skip_nonfinite(optax.scale_by_adam())
    huge = jax.tree.map(lambda x: 1e30 * x, PARAMS)  # finite, but not its square
    updates, state = tx.update(huge, tx.init(PARAMS), PARAMS)
    assert all(np.all(np.isnan(u)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(PARAMS))


def test_a_traced_hyperparameter_does_not_change_the_dtypes_of_the_state():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32)}

        def second(decay):
            tx = directions.skip_nonfinite(optax.ema(decay))
            first = tx.init(params)
            return first, tx.update(params, first)

        first, (updates, state) = jax.jit(second)(jnp.asarray(0.5, jnp.float64))
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, state)
    assert updates["w"].dtype == jnp.float32


def test_extra_arguments_reach_the_direction():
    tx = directions.skip_nonfinite(optax.contrib.reduce_on_plateau())
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=2.0)
    np.testing.assert_allclose(state.best_value, 2.0)


# --- equilibrated --------------------------------------------------------------------

MATRIX = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}


def matrices(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"b": rng.normal(size=3), "w": rng.normal(size=(4, 3)) * np.geomspace(1, 30, 3)}
        for _ in range(n)
    ]


def run_equilibrated(inner, gradients, **kwargs):
    tx = directions.equilibrated(inner, **kwargs)
    state = tx.init(MATRIX)
    for grads in gradients:
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        updates, state = tx.update(grads, state, MATRIX)
    return updates


def test_rows_and_columns_are_scaled_before_and_after_the_inner_direction():
    gradients, power, decay, eps = matrices(5), 0.25, 0.9, 1e-2
    rows, columns = np.zeros((4, 1)), np.zeros((1, 3))
    momentum = np.zeros((4, 3))
    for grads in gradients:
        square = grads["w"] ** 2
        rows = decay * rows + (1 - decay) * square.mean(1, keepdims=True)
        columns = decay * columns + (1 - decay) * square.mean(0, keepdims=True)
        r, c = rows / rows.mean() + eps, columns / columns.mean() + eps
        units = (r * c) ** -power
        momentum = 0.5 * momentum + units * grads["w"]
    actual = run_equilibrated(
        optax.trace(0.5), gradients, power=power, decay=decay, eps=eps
    )
    np.testing.assert_allclose(actual["w"], units * momentum, rtol=1e-5)
    weights = 0.5 ** np.arange(4, -1, -1)
    momentum = sum(w * g["b"] for w, g in zip(weights, gradients, strict=True))
    np.testing.assert_allclose(actual["b"], momentum, rtol=1e-5, atol=1e-6)


def test_with_the_power_zero_it_is_the_inner_direction():
    gradients = [
        jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), g) for g in matrices(3)
    ]
    inner = optax.contrib.muon(1.0)
    state = inner.init(MATRIX)
    for grads in gradients:
        expected, state = inner.update(grads, state, MATRIX)
    actual = run_equilibrated(inner, gradients, power=0.0)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.slow
def test_with_the_power_a_half_inputs_and_outputs_may_have_any_units():
    """G -> A G B where W -> A^-1 W B^-1 is the same network: so does the step."""
    A = np.array([[1.0], [100.0], [0.01], [5.0]])
    B = np.array([[1.0, 20.0, 0.1]])
    # Entries of one size: only then are the means of A G B those of G in other units.
    even = [{"b": g["b"], "w": np.sign(g["w"])} for g in matrices(4)]
    uneven = [{"b": g["b"], "w": A * g["w"] * B} for g in even]
    kwargs = {"power": 0.5, "eps": 0.0}
    plain = run_equilibrated(optax.contrib.muon(1.0), even, **kwargs)["w"]
    scaled = run_equilibrated(optax.contrib.muon(1.0), uneven, **kwargs)["w"] * A * B
    ratio = np.asarray(scaled / plain)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=2e-2)


def test_a_row_without_gradient_stays_zero_and_leaves_the_others_alone():
    gradients = matrices(2)
    for grads in gradients:
        grads["w"][1] = 0.0
    updates = run_equilibrated(optax.identity(), gradients)
    assert np.all(np.isfinite(updates["w"]))
    np.testing.assert_array_equal(updates["w"][1], 0.0)
    none = run_equilibrated(
        optax.identity(), [jax.tree.map(np.zeros_like, gradients[0])]
    )
    np.testing.assert_array_equal(none["w"], 0.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_an_equilibrated_direction_keeps_dtypes(dtype):
    params = {"w": jnp.full((3, 2), 300.0, dtype)}  # the square overflows float16
    tx = directions.equilibrated(optax.trace(0.9), power=jnp.asarray(0.25))
    state = jax.jit(tx.init)(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert updates["w"].dtype == dtype
    assert np.all(np.isfinite(np.asarray(updates["w"], np.float32)))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
