"""Buffers may be donated: those of a state are distinct, and not the parameters'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partnewton as pn

PARAMS = {"w": jnp.array([[1.0, 2.0], [-0.5, 0.3]]), "b": jnp.array([0.1, -0.2])}

newton = pn.rules.newton()
averages = {
    "none": pn.averaging.none(),
    "exponential": pn.averaging.exponential(),
    "uniform": pn.averaging.uniform(),
    "relative": pn.averaging.relative(pn.averaging.uniform()),
    "nonnegative": pn.averaging.nonnegative(pn.averaging.uniform()),
}
TRANSFORMATIONS = {
    "partition_newton": pn.partition_newton(rule=newton),
    "paper_newton": pn.paper_newton(rule=newton),
    "options": pn.partition_newton(rule=newton, weight_decay=0.1, total_steps=9),
    "scale_by_lookback": pn.scale_by_lookback(),
    "track_average": optax.with_extra_args_support(pn.track_average()),
    "subspace_newton": pn.subspace_newton(),
    "clip_by_parameter_rms": optax.with_extra_args_support(pn.clip_by_parameter_rms()),
    "skip_nonfinite": pn.directions.skip_nonfinite(optax.adam(0.1)),
    "equilibrated": pn.directions.equilibrated(optax.adam(0.1)),
} | {
    f"average {name}": pn.scale_by_partition_newton(newton, average=x)
    for name, x in averages.items()
}
TRANSFORMATIONS["smoothing"] = pn.scale_by_partition_newton(
    newton, smoothing=pn.averaging.nonnegative(pn.averaging.exponential())
)


def loss(params):
    return jnp.sum((jnp.tanh(params["w"]) @ params["b"] - 1.0) ** 2)


def fresh():
    return jax.tree.map(lambda x: jnp.array(x, copy=True), PARAMS)


def pointers(tree):
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.size]
    return [x.unsafe_buffer_pointer() for x in arrays]


@pytest.mark.parametrize("init", ["eager", "jit"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_no_two_arrays_of_a_fresh_state_share_a_buffer(name, init):
    params, tx = fresh(), TRANSFORMATIONS[name]
    state = (jax.jit(tx.init) if init == "jit" else tx.init)(params)
    found = pointers((params, state))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "name",
    [
        "partition_newton",
        "subspace_newton",
        "scale_by_lookback",
        "clip_by_parameter_rms",
        "average uniform",
    ],
)
def test_parameters_and_states_are_donated(name):
    tx = TRANSFORMATIONS[name]

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params = fresh()
    state = tx.init(params)
    for _ in range(2):
        before = params
        params, state = donating(params, state)
        assert before["w"].is_deleted()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["scale_by_lookback", "average uniform"])
def test_results_of_an_update_outside_of_jit_can_be_donated(name):
    tx, params = TRANSFORMATIONS[name], fresh()
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    found = pointers((params, updates, state))
    assert len(set(found)) == len(found)
