"""Metrics: every number under its name, and no waiting for it."""

import re

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from flax import nnx
from support import documents
from support.selection import some

import partnewton as pn
from partnewton import plot

PARAMS = {"layer": {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array(0.5)}}


def loss(params, x):
    layer = params["layer"]
    return jnp.mean((x @ layer["kernel"] + layer["bias"]) ** 2 + layer["bias"] ** 4)


X = jnp.array([[1.0, -1.0], [0.5, 2.0], [3.0, 1.0]])


def step(tx, params, state):
    grads = jax.grad(loss)(params, X)
    updates, state = tx.update(grads, state, params, value_fn=loss, x=X)
    return optax.apply_updates(params, updates), state


@pytest.fixture
def trained():
    tx = optax.chain(optax.clip(1e6), pn.scale_by_partition_newton(), optax.scale(-1))
    return step(tx, PARAMS, tx.init(PARAMS))


def test_metrics_are_the_numbers_of_the_state(trained):
    params, state = trained
    ours, found = state[1], pn.metrics(state, params)
    summary = pn.summarize(lambda p: loss(p, X), PARAMS, jax.grad(loss)(PARAMS, X))
    names = pn.subset_names(params)
    np.testing.assert_allclose(found["loss"], loss(PARAMS, X), rtol=1e-6)
    assert found["predicted_decrease"] == ours.predicted_decrease
    assert found["notfinite_count"] == 0
    assert found["count"] == 1
    for s, name in enumerate(names):
        assert found[f"learning_rate/{name}"] == ours.learning_rates[s]
        curvature = found[f"curvature/{name}"]
        np.testing.assert_allclose(curvature, summary.hessian[s, s], rtol=1e-6)
    assert {x.shape for x in found.values()} == {()}
    assert len(found) >= 5 + 2 * len(names)


def test_metrics_can_be_outputs_of_a_jitted_step(trained):
    params, state = trained
    tx = optax.chain(optax.clip(1e6), pn.scale_by_partition_newton(), optax.scale(-1))

    @jax.jit
    def logged_step(params, state):
        params, state = step(tx, params, state)
        return params, state, pn.metrics(state, params)

    with jax.transfer_guard("disallow"):
        _, after, found = logged_step(params, state)
    outside = pn.metrics(after)
    assert found.keys() == outside.keys()
    jax.tree.map(np.testing.assert_array_equal, found, outside)


@pytest.mark.slow
def test_metrics_include_the_lookback_multiplier():
    tx = pn.partition_newton()
    jitted = jax.jit(lambda params, state: step(tx, params, state))
    params, state = jitted(PARAMS, jax.jit(tx.init)(PARAMS))
    factors = []
    for _ in range(10):
        params, state = jitted(params, state)
        factors.append(float(pn.metrics(state)["factor"]))
    assert factors[:9] == [1.0] * 9
    assert factors[9] != 1  # looked back at the eleventh update
    by_type = [x for x in state if isinstance(x, pn.ScaleByLookbackState)]
    assert factors[9] == by_type[0].factor
    assert "factor" not in pn.metrics(pn.paper_newton().init(PARAMS))


def test_metrics_become_plain_numbers_in_one_transfer(trained):
    _, state = trained
    plain = {name: x.item() for name, x in jax.device_get(pn.metrics(state)).items()}
    assert all(isinstance(x, int | float) for x in plain.values())


def by_kind(container, state):
    """The same state as it is kept in different places."""
    if container == "chain":
        return state
    if container == "host":
        return jax.device_get(state)
    return jax.tree.map(lambda x: x[None], state)  # an ensemble of one


@pytest.mark.parametrize(
    "container", some(["chain", "host", "ensemble"], default=["chain"])
)
def test_metrics_contain_every_scalar_wherever_it_is_stored(trained, container):
    _, state = trained
    expected = jax.device_get(pn.metrics(state))
    found = jax.device_get(pn.metrics(by_kind(container, state)))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert np.shape(x) == ((1,) if container == "ensemble" else ())
        np.testing.assert_array_equal(np.squeeze(x), expected[name])


@pytest.mark.slow
def test_metrics_of_subspace_newton():
    tx = pn.subspace_newton(history=1)
    before, state = step(tx, PARAMS, tx.init(PARAMS))
    params, state = step(tx, before, state)
    found = pn.metrics(state)
    np.testing.assert_allclose(found["loss"], loss(before, X), rtol=1e-6)
    decrease = loss(before, X) - loss(params, X)
    np.testing.assert_allclose(found["decrease"], decrease, rtol=1e-4)
    assert found["count"] == 2
    assert found["refused_count"] == found["notfinite_count"] == 0
    moves = jax.tree.map(lambda x, y: jnp.sqrt(jnp.mean((x - y) ** 2)), params, before)
    rates = jax.tree.leaves(moves)
    for name, rms in zip(pn.subset_names(params), rates, strict=True):
        np.testing.assert_allclose(found[f"learning_rate/{name}"], rms, rtol=1e-4)
    assert pn.learning_rates(state).keys() == set(pn.subset_names(params))


@pytest.mark.parametrize(
    ("page", "make"),
    [
        ("docs/logging.md", pn.partition_newton),
        ("docs/full_batch.md", pn.subspace_newton),
    ],
)
def test_pages_name_all_metrics(page, make):
    text = (documents.ROOT / page).read_text(encoding="utf-8")
    table = text[text.index("| name | meaning |") :].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall("`(.*?)`", cell)}
    found = pn.metrics(make().init({"NAME": jnp.ones(2)}))
    assert named == found.keys()


class Model(nnx.Module):
    def __init__(self, params):
        self.layer = nnx.Dict(jax.tree.map(nnx.Param, params["layer"]))


def test_metrics_contain_every_scalar_of_an_nnx_optimizer():
    rule = pn.rules.newton()  # which compiles quickly
    tx = optax.chain(pn.scale_by_partition_newton(rule), pn.scale_by_lookback())
    model = Model(PARAMS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def logged_step(model, optimizer):
        grads = nnx.state(model, nnx.Param)
        optimizer.update(model, grads, value_fn=lambda p: loss(p, X))
        return pn.metrics(optimizer.opt_state), nnx.as_pure(optimizer.opt_state)

    inside, bare = logged_step(model, optimizer)
    outside = pn.metrics(optimizer.opt_state)
    for found in (inside, outside):
        jax.tree.map(np.testing.assert_array_equal, found, pn.metrics(bare))
    assert outside["count"] == 1
    assert {"loss", "status", "factor", "predicted_decrease"} <= outside.keys()
    assert all(isinstance(x, jax.Array) for x in outside.values())
    rates = pn.learning_rates(optimizer.opt_state)
    assert rates == pn.learning_rates(bare)
    assert rates.keys() == {"layer/bias", "layer/kernel"}


def test_figures_can_be_drawn_from_an_nnx_state():
    matplotlib.use("Agg")
    tx = pn.scale_by_partition_newton()
    optimizer = nnx.Optimizer(Model(PARAMS), tx, wrt=nnx.Param)
    names = list(pn.learning_rates(optimizer.opt_state))
    assert plot.hessian(optimizer.opt_state.summary, names).get_images()


def test_a_state_without_the_method_has_no_metrics():
    state = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(ValueError, match="exactly one ScaleByPartitionNewtonState"):
        pn.metrics(state, PARAMS)
