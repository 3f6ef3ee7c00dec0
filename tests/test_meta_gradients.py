"""Derivatives through a whole update, against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.selection import some

import partnewton as pn

INPUTS = np.array([[1.0, 0.4], [0.2, 0.8], [-0.5, 0.6]])
PARAMS = {"w": np.array([0.5, -0.3]), "b": np.array(0.2)}
DIRECTION = {"w": np.array([0.4, -0.8]), "b": np.array(-0.7)}
rules = pn.rules


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def loss(params, scale):
    z = scale * (INPUTS @ params["w"] + params["b"] - 1.0)
    return jnp.mean(jnp.cosh(z)) + 0.1 * jnp.sum(params["w"] ** 4)


def downhill(*transformations):
    return optax.chain(*transformations, optax.scale(-1.0))


def damped(number):
    return downhill(pn.scale_by_partition_newton(rules.cubic(number)))


def halved(number):
    """The first rates are far too long, and are halved twice."""
    return downhill(
        optax.scale(number),
        pn.scale_by_partition_newton(EIGHTFOLD, backtracking=4),
    )


def _eightfold(summary):
    rates, decrease, status = rules.newton()(summary)
    return rules.Proposal(8.0 * rates, decrease, status)


EIGHTFOLD = rules.Rule(_eightfold, third_order=False)


def preset(number):
    return pn.partition_newton(number, direction=optax.trace(0.5), update_interval=1)


def looking_back(number):
    return downhill(
        optax.scale(0.1 * number), pn.scale_by_lookback(0.5, update_interval=1)
    )


CASES = {
    "damped": (damped, 1),
    "halved": (halved, 1),
    "looking_back": (looking_back, 3),
    "partition_newton": (preset, 1),
}


def outcome(name, params, direction, scale, number):
    """A loss on other data after some updates, and the state."""
    make, num_updates = CASES[name]
    tx = make(number)
    state = tx.init(params)
    for _ in range(num_updates):
        updates, state = tx.update(
            direction, state, params, value_fn=lambda params: loss(params, scale)
        )
        params = optax.apply_updates(params, updates)
    return loss(params, 0.7) + jnp.sum(params["w"]), state


@pytest.mark.parametrize("name", some(CASES, default=["looking_back"]))
def test_both_modes_agree_with_finite_differences(name):
    """By parameters, direction, a number of the loss and a number of the optimizer."""
    point = (PARAMS, DIRECTION, 1.3, 1.1)
    tangent = (
        {"w": np.array([0.3, 0.7]), "b": np.array(-0.4)},
        {"w": np.array([-0.2, 0.5]), "b": np.array(0.6)},
        0.5,
        0.3,
    )

    def along(t):
        moved = jax.tree.map(lambda x, dx: x + t * dx, point, tangent)
        return outcome(name, *moved)

    @jax.jit
    def derivatives(ts):
        values, states = jax.lax.map(along, ts)
        _, forward = jax.jvp(lambda t: along(t)[0], (0.0,), (1.0,))
        reverse = jax.grad(lambda *x: outcome(name, *x)[0], (0, 1, 2, 3))(*point)
        return values, states, forward, reverse

    ts = 1e-4 * np.array([-2.0, -1.0, 1.0, 2.0])
    values, states, forward, reverse = derivatives(ts)
    expected = np.dot([1, -8, 8, -1], values) / 12e-4
    np.testing.assert_allclose(forward, expected, rtol=1e-8)
    products = jax.tree.map(np.vdot, reverse, tangent)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-8)
    if name == "halved":
        newton = states[1].hessian @ states[1].learning_rates[..., None]
        np.testing.assert_allclose(newton[..., 0], 2 * states[1].gradient, rtol=1e-6)
    if name == "looking_back":
        assert np.all(states[1].factor != 1)
