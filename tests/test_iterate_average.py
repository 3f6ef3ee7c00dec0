"""The average of the iterates: against sums by hand, and what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.oracles import types_of

import partnewton as pn
from partnewton import partitions

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}


def run(tx, steps, params=PARAMS):
    """Parameters, after each of some steps, and the last state."""
    state, seen = tx.init(params), []
    for step in steps:
        updates, state = tx.update(step, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def some_steps(n, params=PARAMS):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        for _ in range(n)
    ]


# k = 1 / fraction, and the weight of the parameters after s steps, up to a factor.
WEIGHTS = {1: lambda s: 1.0, 2: lambda s: s, 3: lambda s: s * (s + 1) / 2}


@pytest.mark.parametrize("k", WEIGHTS)
def test_it_is_the_mean_with_weights_that_grow_with_a_power_of_time(k):
    tx = optax.chain(optax.scale(0.5), pn.track_average(1 / k))
    seen, state = run(tx, some_steps(20))
    weights = [WEIGHTS[k](s) for s in range(1, 21)]
    average = pn.averaged_params(state, seen[-1])
    for name in PARAMS:
        expected = np.average([p[name] for p in seen], axis=0, weights=weights)
        np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-6)


def test_before_the_first_step_it_is_the_parameters():
    state = pn.track_average().init(PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal, pn.averaged_params(state, PARAMS), PARAMS
    )


def test_updates_pass_unchanged():
    (step,) = some_steps(1)
    tx = pn.track_average()
    updates, _ = tx.update(step, tx.init(PARAMS), PARAMS)
    assert updates is step


def test_under_noise_the_average_is_closer_to_the_minimum():
    """Gradient descent with a constant step on a quadratic, with unit noise."""
    tx = optax.chain(optax.sgd(0.3), pn.track_average(0.1))

    def step(carry, key):
        x, state = carry
        updates, state = tx.update(x + jax.random.normal(key, x.shape), state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.ones(100)
    keys = jax.random.split(jax.random.key(0), 1000)
    (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), keys)
    average = pn.averaged_params(state, x)
    assert jnp.mean(average**2) < 0.1 * jnp.mean(x**2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision_the_average_is_kept_in_single_precision(dtype):
    params = jnp.ones(3, dtype)
    state, tx = pn.track_average(0.01).init(params), pn.track_average(0.01)
    _, state = tx.update(jnp.zeros(3, dtype), state, params)
    for _ in range(100):  # each step moves it by less than half an ulp of the dtype
        _, state = tx.update(jnp.full(3, 2.0**-6, dtype), state, params)
    assert state.average.dtype == jnp.float32
    average = pn.averaged_params(state, params)
    assert average.dtype == dtype
    assert np.all(state.average > 1 + 2.0**-8)


def test_leaves_that_are_frozen_or_no_numbers_take_no_memory():
    params = {"a": jnp.ones(2), "frozen": jnp.ones(3), "key": jax.random.key(0)}
    labels = {"a": 0, "frozen": partitions.FROZEN, "key": partitions.FROZEN}
    tx = pn.track_average(param_labels=labels)
    updates = {"a": jnp.ones(2), "frozen": jnp.zeros(3), "key": jnp.zeros(())}
    _, state = tx.update(updates, tx.init(params), params)
    assert jax.tree.structure(state.average) == jax.tree.structure(
        {"a": 0, "frozen": None, "key": None}
    )
    average = pn.averaged_params(state, params)
    np.testing.assert_array_equal(average["a"], 2)
    assert average["frozen"] is params["frozen"]
    assert average["key"] is params["key"]


def test_none_in_the_parameters_stays_none():
    params = {"a": jnp.ones(2), "activation": None}
    tx = pn.track_average()
    _, state = tx.update(params, tx.init(params), params)
    average = pn.averaged_params(state, params)
    assert average["activation"] is None
    np.testing.assert_array_equal(average["a"], 2)


def test_it_may_end_the_chain_of_a_preset_in_a_scan():
    tx = optax.chain(pn.partition_newton(), pn.track_average())

    def loss(params):
        return jnp.sum(params["a"] ** 2) + params["b"] ** 2

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    before = tx.init(PARAMS)
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=20))(
        (PARAMS, before)
    )
    assert types_of(state) == types_of(before)
    assert loss(pn.averaged_params(state, params)) < loss(PARAMS)


def test_the_average_of_an_nnx_model_is_a_state_for_it():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), pn.track_average())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
    optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    average = pn.averaged_params(optimizer.opt_state, params)
    nnx.update(model, average)
    np.testing.assert_allclose(model.kernel[...], params["kernel"][...], rtol=1e-6)


def test_map_params_reaches_the_average():
    tx = pn.track_average()
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, tx.init(PARAMS))
    np.testing.assert_array_equal(doubled.average["a"], 2 * PARAMS["a"])
    assert doubled.count == 0


# --- wrong arguments -------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_out_of_its_range_is_an_error(fraction):
    with pytest.raises(ValueError, match="fraction must"):
        pn.track_average(fraction)


def test_missing_parameters_are_an_error():
    tx = pn.track_average()
    with pytest.raises(ValueError, match="params: track_average"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("count", [0, 2])
def test_an_optimizer_without_one_average_is_an_error(count):
    tx = optax.chain(optax.sgd(0.1), *[pn.track_average()] * count)
    with pytest.raises(ValueError, match=f"found {count}"):
        pn.averaged_params(tx.init(PARAMS), PARAMS)
