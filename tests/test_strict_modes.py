"""All strict modes of jax at once: no rank or dtype is promoted, no NaN is made."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partnewton as pn


@pytest.fixture(autouse=True)
def _strict():
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.debug_nans(True))
        stack.enter_context(jax.enable_checks(True))
        yield


def problem(dtype):
    params = {
        "w": jnp.array([[0.5, -1.0, 0.3], [0.2, 0.4, -0.6]], dtype),
        "b": jnp.array([0.1, 0.0, -0.1], dtype),
        "dead": jnp.zeros((2, 2), dtype),
    }
    x = jnp.array([[1.0, -0.5], [0.3, 0.8]], dtype)

    def loss(params, x=x):
        h = jnp.tanh(x @ params["w"] + params["b"][None, :])
        return jnp.mean((h.astype(jnp.float32) - 0.5) ** 2)

    return loss, params


OPTIMIZERS = {
    "partition_newton": pn.partition_newton(update_interval=1),
    "paper_newton": pn.paper_newton(
        normalize="norm",
        update_interval=1,
        backtracking=2,
        average=pn.averaging.uniform(warm_up=0),
        smoothing=pn.averaging.exponential(),
        weight_decay=0.1,
    ),
    "options": pn.partition_newton(
        0.1, update_interval=1, weight_decay=0.1, total_steps=10
    ),
    "small": optax.chain(
        pn.directions.skip_nonfinite(
            pn.directions.equilibrated(optax.scale_by_rms(), decay=0.9)
        ),
        pn.clip_by_parameter_rms(0.1),
        pn.scale_by_lookback(update_interval=1),
        optax.scale_by_learning_rate(0.1),
        pn.track_average(),
    ),
}


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("partition_newton", "jit", jnp.float32),
        pytest.param("partition_newton", "jit", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("options", "jit", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("paper_newton", "jit", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("paper_newton", "eager", jnp.float32, marks=pytest.mark.slow),
        pytest.param("small", "jit", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("small", "eager", jnp.float32, marks=pytest.mark.slow),
        pytest.param("small", "eager", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_two_steps(name, mode, dtype):
    loss, params = problem(dtype)
    tx = OPTIMIZERS[name]
    state = tx.init(params)

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    before = loss(params)
    for _ in range(2):
        params, state = (jax.jit(step) if mode == "jit" else step)(params, state)
    assert loss(params) < before
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))
    if name != "small":
        logged = jax.device_get(pn.metrics(state))
        assert logged["notfinite_count"] == 0
        np.testing.assert_array_equal(logged["learning_rate/dead"], 0)


@pytest.mark.parametrize("engine", ["adjoint", "jvp_of_grad"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_summary(engine, dtype):
    loss, params = problem(dtype)
    direction = jax.grad(loss)(params)
    summary = jax.jit(
        lambda params: pn.summarize(loss, params, direction, engine=engine)
    )(params)
    assert all(np.isfinite(x).all() for x in summary)
    assert summary.gradient[0] > 0
