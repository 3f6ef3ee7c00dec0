"""The fast engine: exact zeros, and the tensor of third order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from support import models
from support.both_engines import normal
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import compat

PyTree = Any


# --- Exact zeros ---------------------------------------------------------------------


def relu_network(params: PyTree) -> jax.Array:
    x = normal(2, 6, 6, 1).astype(params["conv"].dtype)
    x = lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + params["bias"])
    window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = lax.reduce_window(x, -np.inf, lax.max, *window).reshape(2, -1)
    x = jax.nn.relu(x @ params["hidden"])
    return jnp.mean((x @ params["last"] - 1) ** 2)


@pytest.mark.parametrize("dtype", some([np.float32, np.float64], default=[np.float32]))
def test_piecewise_linear_networks_have_no_third_order(dtype):
    shapes = {"conv": (3, 3, 1, 2), "bias": (2,), "hidden": (18, 5), "last": (5, 3)}
    with jax.enable_x64(dtype == np.float64):
        params = {k: jnp.array(normal(*x) / 3, dtype) for k, x in shapes.items()}
        direction = jax.grad(relu_network)(params)
        compute = functools.partial(pn.summarize, relu_network, engine="adjoint")
        summary = quick_jit(compute)(params, direction)
        assert summary.third.dtype == dtype
        assert np.all(summary.hessian != 0)
        np.testing.assert_array_equal(summary.third, 0)
        # With several tensors in a subset, the loss is not multilinear.
        in_one = functools.partial(compute, param_labels=pn.partitions.whole)
        whole = quick_jit(in_one)(params, direction)
        assert np.all(whole.third != 0)


# --- The whole third order -----------------------------------------------------------

HARD = [
    "mlp",
    "convolutional_network",
    "attention",
    "lstm",
    "custom_vjp",
    "scan_over_constants",
    "scan_over_layers",
    "scan_in_a_scan",
    "scatters",
    "embedding_and_gathers",
]


@pytest.mark.parametrize("name", some(HARD, default=["mlp"]))
def test_tensors_of_third_order_are_those_of_the_reference(name):
    with jax.enable_x64(True):
        problem = models.make(name, jnp.float64)

        def tensors(engine):
            compute = functools.partial(
                pn.derivative_tensors, problem.loss, engine=engine
            )
            return quick_jit(compute)(problem.params, problem.direction)

        *_, found = tensors("adjoint")
        *_, expected = tensors("jvp_of_grad")
    assert_close(found, np.asarray(expected), 1e-9, name)
    for axes in ((1, 0, 2), (0, 2, 1)):
        np.testing.assert_array_equal(found, np.transpose(found, axes))


def products_in(jaxpr: Any) -> float:
    """The number of multiplications in matrix products, loops multiplied out."""
    total = 0.0
    for equation in compat.open_jaxpr(jaxpr).eqns:
        inner = sum(map(products_in, core.jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = np.prod([shape[i] for i in contracted])
            total += float(size * np.prod(equation.outvars[0].aval.shape))
    return total


def passes(depth: int, engine: str) -> float:
    """The cost of the third order of a chain, in gradients per subset."""
    width = 256
    params = [jnp.ones((width, width))] * depth
    x = jnp.ones((4, width))

    def loss(params):
        return jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x))

    tensors = functools.partial(pn.derivative_tensors, loss, engine=engine)
    work = products_in(jax.make_jaxpr(tensors)(params, params))
    return work / products_in(jax.make_jaxpr(jax.grad(loss))(params)) / depth


@pytest.mark.slow
def test_the_third_order_tensor_takes_one_pass_per_subset():
    adjoint = [passes(depth, "adjoint") for depth in (4, 16)]
    reference = [passes(depth, "jvp_of_grad") for depth in (4, 16)]
    assert adjoint[1] < 1.5 * adjoint[0]
    assert reference[1] > 2.5 * reference[0]
    assert adjoint[1] < reference[1] / 4
