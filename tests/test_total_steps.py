"""A horizon: the decay of the lengths at the end of the training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.selection import some

import partnewton as pn
from partnewton.presets import _DECAY_FRACTION

STEPS = 100
BEGIN = round(STEPS * (1 - _DECAY_FRACTION))
CURVATURE = jnp.geomspace(0.1, 10.0, 8)
PARAMS = {"x": jnp.ones(8)}


def loss(params, noise):
    return jnp.sum(CURVATURE * (params["x"] - noise) ** 2)


@functools.partial(jax.jit, static_argnames=("tx", "steps"))
def train(tx, seed=0, steps=STEPS, scale=1.0):
    """Parameters, factors, lengths and updates after each step."""

    def step(carry, key):
        params, state = carry
        noise = scale * jax.random.normal(key, (8,))
        grads = jax.grad(loss)(params, noise)
        updates, state = tx.update(grads, state, params, value_fn=loss, noise=noise)
        params = optax.apply_updates(params, updates)
        found = pn.metrics(state)
        return (params, state), (
            params["x"],
            found["factor"],
            found["learning_rate/x"],
            updates["x"],
        )

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), keys)[1]


PLAIN = pn.partition_newton()
WITH_END = pn.partition_newton(total_steps=STEPS)


@pytest.mark.slow
def test_until_the_decay_begins_nothing_changes():
    for x, y in zip(train(WITH_END), train(PLAIN), strict=True):
        np.testing.assert_allclose(x[:BEGIN], y[:BEGIN], rtol=1e-6)


def test_then_the_factor_is_kept_and_the_lengths_decrease_linearly_to_zero():
    _, factors, lengths, updates = train(WITH_END, steps=STEPS + 3)
    np.testing.assert_array_equal(factors[BEGIN:], factors[BEGIN])
    _, others, _, _ = train(PLAIN)
    assert np.any(others[BEGIN:] != factors[BEGIN]), "it would change otherwise"
    remaining = np.clip(np.arange(STEPS, -3, -1) / (STEPS - BEGIN), 0, 1)
    expected = 0.2 * factors * lengths * remaining
    np.testing.assert_allclose(
        np.sqrt(np.mean(updates**2, -1)), expected, rtol=1e-4, atol=1e-9
    )
    assert np.all(expected[:STEPS] > 0)
    assert not np.any(updates[STEPS:])


@pytest.mark.parametrize(
    "case",  # learning_rate, total_steps, and the largest factor
    some(
        [
            (0.2, None, 5.0),
            (0.2, STEPS, 10.0),
            (1.0, None, 1.0),
            (1.0, STEPS, 2.0),
            (4.0, STEPS, 1.0),
            (optax.constant_schedule(1e-3), None, 5.0),
            (optax.constant_schedule(1e-3), STEPS, 10.0),
        ],
        default=[(0.2, STEPS, 10.0)],
    ),
)
def test_the_bound_of_the_factor(case):
    learning_rate, total_steps, largest = case
    tx = pn.partition_newton(learning_rate, lookback_rate=9.0, total_steps=total_steps)
    _, factors, _, _ = train(tx, steps=12, scale=0.0)
    assert np.max(factors) == pytest.approx(largest, rel=1e-6)


def test_a_schedule_is_multiplied_by_the_decay():
    schedule = optax.linear_schedule(0.5, 0.1, STEPS)
    tx = pn.partition_newton(schedule, lookback_rate=0.0, total_steps=STEPS)
    _, _, lengths, updates = train(tx)
    remaining = np.clip(np.arange(STEPS, 0, -1) / (STEPS - BEGIN), 0, 1)
    expected = schedule(np.arange(STEPS)) * lengths * remaining
    np.testing.assert_allclose(np.sqrt(np.mean(updates**2, -1)), expected, rtol=1e-4)


@pytest.mark.slow
def test_under_noise_the_last_parameters_are_closer_to_the_minimum():
    seeds = jnp.arange(16)

    def final(tx):
        x = jax.vmap(lambda seed: train(tx, seed)[0][-1])(seeds)
        return jnp.mean(CURVATURE * x**2)

    assert final(WITH_END) < 0.6 * final(PLAIN)


def test_the_number_of_steps_may_be_injected():
    injected = optax.inject_hyperparams(pn.partition_newton)(total_steps=STEPS)
    # Its lengths are those of the preset: of the state, only one part is looked at.
    ours, theirs = train(injected)[0], train(WITH_END)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-5, ValueError), ("100", TypeError)]
)
def test_a_number_of_steps_below_one_is_an_error(value, error):
    with pytest.raises(error, match="total_steps must"):
        pn.partition_newton(total_steps=value)
