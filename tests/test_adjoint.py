"""The engine "adjoint": operations, tangents, lowerings, and transformations of jax."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from support import models
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import compat
from partnewton.engines.adjoint import inner, lowerings, sweeps
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.lowerings import (
    convolutions,
    memory,
    products,
    reductions,
)
from partnewton.engines.adjoint.primitives.bilinear import BILINEAR, is_product
from partnewton.engines.adjoint.program import Program
from partnewton.engines.adjoint.registry import TABLES

PyTree = Any


each_engine = pytest.mark.parametrize("engine", ["adjoint", "jvp_of_grad"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def program_for(loss: Callable, *args: Any) -> Program:
    """The program that the engine makes of a loss."""
    return program_of(compat.traced(loss, *args)[1])[0]


# --- One operation at a time ---------------------------------------------------------


class Case(NamedTuple):
    """An operation of one or two arrays, each of which depends on the parameters."""

    rule: str
    function: Callable
    shapes: tuple[tuple[int, ...], ...]


V, M = (6,), (3, 4)
IMAGE = (1, 4, 4, 1)
WINDOW = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
KEEP = np.array([True, False, True, True, False, False])
TRIANGLE = np.tril(normal(3, 3)) + 3 * np.eye(3)


def max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -np.inf, lax.max, *WINDOW)


def pulled_from_two(x: jax.Array, y: jax.Array) -> jax.Array:
    """A transposed function with two uses of its argument."""
    _, pull = jax.vjp(lambda z: (normal(6, 6) @ z, z[::-1]), np.zeros(6))
    return pull((x, y))[0]


def complex_of(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.complex(x, y) * np.exp(1j * normal(6))


OPERATIONS = {
    "add": Case("linear", lambda x, y: x + y, (V, V)),
    "add_any": Case("linear", pulled_from_two, (V, V)),
    "broadcast_in_dim": Case("linear", lambda x: jnp.broadcast_to(x, (2, 6)), (V,)),
    "complex": Case("linear", lambda x, y: jnp.abs(complex_of(x, y)), (V, V)),
    "concatenate": Case("linear", lambda x, y: jnp.concatenate([x, y]), (V, M[1:])),
    "conj": Case("linear", lambda x, y: lax.real(lax.conj(complex_of(x, y))), (V, V)),
    "convert_element_type": Case(
        "linear", lambda x: lax.real(x.astype(complex) * 1j**0.5), (V,)
    ),
    "copy": Case("linear", lambda x: jnp.array(x, copy=True), (V,)),
    "cumsum": Case("linear", lambda x: jnp.cumsum(x, axis=1), (M,)),
    "div": Case("linear", lambda x: x / normal(6), (V,)),
    "dynamic_slice": Case(
        "linear", lambda x: lax.dynamic_slice(x, (jnp.argmin(normal(3)),), (3,)), (V,)
    ),
    "dynamic_update_slice": Case(
        "linear",
        lambda x, y: lax.dynamic_update_slice(x, y, (jnp.argmin(normal(2)),)),
        (V, (4,)),
    ),
    "device_put": Case("linear", jax.device_put, (V,)),
    "fft": Case("linear", lambda x: jnp.abs(jnp.fft.rfft(x)), (V,)),
    "gather": Case("piecewise_linear", lambda x: x[jnp.array([[0, 5], [5, 2]])], (V,)),
    "imag": Case("linear", lambda x, y: lax.imag(complex_of(x, y)), (V, V)),
    "name": Case("linear", lambda x: checkpoint_name(x, "x"), (V,)),
    "neg": Case("linear", lambda x: -x, (V,)),
    "optimization_barrier": Case("linear", lambda x: lax.optimization_barrier(x), (V,)),
    "pad": Case("linear", lambda x, y: lax.pad(x, y, [(1, 2, 1)]), (V, ())),
    "real": Case("linear", lambda x, y: lax.real(complex_of(x, y)), (V, V)),
    "reduce_precision": Case("linear", lambda x: lax.reduce_precision(x, 11, 52), (V,)),
    "reduce_sum": Case("linear", lambda x: jnp.sum(x, axis=0), (M,)),
    "reduce_window_sum": Case(
        "linear", lambda x: lax.reduce_window(x, 0.0, lax.add, *WINDOW), (IMAGE,)
    ),
    "reshape": Case("linear", lambda x: x.reshape(2, 6), (M,)),
    "rev": Case("linear", lambda x: x[::-1], (V,)),
    "scatter-add": Case(
        "linear", lambda x, y: x.at[jnp.array([1, 1, 3])].add(y), (V, (3,))
    ),
    "select_n": Case("linear", lambda x, y: jnp.where(KEEP, x, y), (V, V)),
    "slice": Case("linear", lambda x: x[1:5:2], (V,)),
    "split": Case("linear", lambda x: lax.split(x, (2, 4))[1], (V,)),
    "squeeze": Case("linear", lambda x: x.reshape(1, 6)[0], (V,)),
    "stack": Case("linear", lambda x, y: jnp.stack([x, y]), (V, V)),
    "sub": Case("linear", lambda x, y: x - y, (V, V)),
    "tile": Case("linear", lambda x: jnp.tile(x, 2), (V,)),
    "transpose": Case("linear", lambda x: x.T, (M,)),
    "triangular_solve": Case(
        "linear",
        lambda x: jax.scipy.linalg.solve_triangular(TRIANGLE, x, lower=True),
        (M,),
    ),
    "conv_general_dilated": Case(
        "bilinear",
        lambda x, y: lax.conv_general_dilated(x, y, (1,), "SAME"),
        ((2, 2, 5), (3, 2, 3)),
    ),
    "dot_general": Case("bilinear", lambda x, y: x @ y, (M, (4, 2))),
    "mul": Case("elementwise", lambda x, y: x * y, (M, M)),
    "abs": Case("piecewise_linear", jnp.abs, (V,)),
    "clamp": Case(
        "piecewise_linear", lambda x, y: lax.clamp(x, y, 2 * np.ones(6)), (V, V)
    ),
    "cummax": Case("piecewise_linear", lax.cummax, (V,)),
    "cummin": Case("piecewise_linear", lax.cummin, (V,)),
    "max": Case("piecewise_linear", jnp.maximum, (V, V)),
    "min": Case("piecewise_linear", jnp.minimum, (V, V)),
    "reduce_max": Case("piecewise_linear", lambda x: jnp.max(x, axis=1), (M,)),
    "reduce_min": Case("piecewise_linear", lambda x: jnp.min(x, axis=1), (M,)),
    "reduce_window_max": Case("piecewise_linear", max_pool, (IMAGE,)),
    "reduce_window_min": Case(
        "piecewise_linear",
        lambda x: lax.reduce_window(x, np.inf, lax.min, *WINDOW),
        (IMAGE,),
    ),
    "rem": Case("piecewise_linear", lax.rem, (V, V)),
    "scatter": Case(
        "piecewise_linear", lambda x, y: x.at[jnp.array([1, 4])].set(y), (V, (2,))
    ),
    "select_and_gather_add": Case(
        "piecewise_linear",
        lambda x, y: jax.jvp(max_pool, (x,), (y,))[1],
        (IMAGE, IMAGE),
    ),
    "select_and_scatter_add": Case(
        "piecewise_linear",
        lambda x, y: jax.vjp(max_pool, x)[1](y)[0],
        (IMAGE, (1, 2, 2, 1)),
    ),
    "sort": Case("piecewise_linear", jnp.sort, (M,)),
    "top_k": Case("piecewise_linear", lambda x: lax.top_k(x, 2)[0], (M,)),
}

# Those that concern devices: see support/adjoint_on_devices.py.
OF_DEVICES = frozenset(
    [
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "mesh_cast",
        "pbroadcast",
        "pcast",
        "ppermute",
        "psum",
        "psum_invariant",
        "psum_scatter",
        "pvary",
        "reduce_scatter",
        "reshard",
        "sharding_constraint",
    ]
)


def loss_around(case: Case) -> tuple[Callable, PyTree, PyTree]:
    """A loss with the operation in it, a point and a direction.

    Its operands depend on all parameters, with second derivatives. Products with
    constant matrices separate it from its neighbours, as an operation of its own.
    """
    sizes = [int(np.prod(shape)) for shape in case.shapes]

    def loss(p: PyTree) -> jax.Array:
        h = jnp.concatenate([jnp.sin(p["a"]), jnp.cos(p["b"])])
        operands = [
            (normal(n, len(h), seed=i) @ h).reshape(shape)
            for i, (n, shape) in enumerate(zip(sizes, case.shapes, strict=True))
        ]
        z = case.function(*operands).reshape(-1)
        return jnp.sum(jnp.sin(0.3 * normal(7, len(z)) @ z))

    names = {"a": (3,), "b": (2,)}
    return (
        loss,
        {k: jnp.array(normal(*shape, seed=5)) for k, shape in names.items()},
        {k: jnp.array(normal(*shape, seed=6)) for k, shape in names.items()},
    )


def with_both_engines(function, loss, params, direction, **kwargs):
    """The results of a function of the library, with both engines."""
    return [
        quick_jit(functools.partial(function, loss, engine=engine, **kwargs))(
            params, direction
        )
        for engine in ("adjoint", "jvp_of_grad")
    ]


def assert_summaries_agree(*args, rtol=1e-12, **kwargs):
    """Both engines on a summary; relative to the largest entry of each field."""
    summary, expected = with_both_engines(pn.summarize, *args, **kwargs)
    floor = 1e-2 * float(np.max(np.abs(expected.hessian)))
    for field in expected._fields:
        pair = [np.asarray(getattr(x, field)) for x in (summary, expected)]
        assert_close(*pair, rtol, field, floor)
    return expected


def assert_tensors_agree(*args, rtol=1e-12, **kwargs):
    """Both engines on derivative tensors; relative to the largest entry of each."""
    tensors, expected = with_both_engines(pn.derivative_tensors, *args, **kwargs)
    floor = 1e-2 * float(np.max(np.abs(expected[1])))
    for d, (x, y) in enumerate(zip(tensors, expected, strict=True), start=1):
        assert_close(x, np.asarray(y), rtol, f"tensor of order {d}", floor)


def assert_engines_agree(*args, **kwargs):
    """Both engines on summary and tensors."""
    assert_tensors_agree(*args, **kwargs)
    return assert_summaries_agree(*args, **kwargs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_against_the_reference(name):
    case = OPERATIONS[name]
    with jax.enable_x64(True):
        loss, params, direction = loss_around(case)
        found = {
            (op.equations[0].primitive.name, op.rule.name)
            for op in program_for(loss, params).ops
            if len(op.equations) == 1 and op.rule
        }
        if name == "stack" and (name, case.rule) not in found:
            pytest.skip("up to jax 0.10.0, this is a concatenate")
        assert (name, case.rule) in found
        per_element = pn.partitions.per_element
        found = assert_summaries_agree(
            loss, params, direction, param_labels=per_element, rtol=1e-11
        )
        assert np.all(found.hessian != 0)
        assert np.all(found.third != 0)


ONE_OF_EACH_KIND = ["reduce_sum", "gather", "dot_general", "mul", "max"]


@pytest.mark.parametrize("name", some(OPERATIONS, default=ONE_OF_EACH_KIND))
def test_tensors_of_an_operation_against_the_reference(name):
    with jax.enable_x64(True):
        assert_tensors_agree(
            *loss_around(OPERATIONS[name]),
            param_labels=pn.partitions.per_element,
            rtol=1e-11,
        )


def test_each_registered_operation_has_its_case():
    known = {*TABLES.linear, *TABLES.piecewise_linear}
    known |= {"conv_general_dilated", "dot_general", "mul"}
    assert known - OPERATIONS.keys() - OF_DEVICES == {"copy_p"}
    assert OPERATIONS.keys() <= known


ROW, COLUMN = (1, 4), (3, 1)


@jax.custom_jvp
def gate(*x: jax.Array) -> jax.Array:
    return jnp.sin(x[0]) * jnp.exp(x[1]) / sum(1 + y**2 for y in x[2:])


@gate.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return jax.jvp(gate.fun, primals, tangents)


def normalised(x: jax.Array) -> jax.Array:
    """Reads at its end a value computed from its start, behind a stop_gradient."""
    y = jnp.sin(x)
    return y * jnp.exp(y - lax.stop_gradient(jnp.max(jnp.cumsum(y))))


ELEMENTWISE = {
    "quotient": Case("elementwise", lambda x, y: x / (2 + y**2), (M, M)),
    "quotient_by_column": Case("elementwise", lambda x, y: x / (2 + y**2), (M, COLUMN)),
    "quotient_of_row": Case("elementwise", lambda x, y: x / (2 + y**2), (ROW, M)),
    "row_and_column": Case("elementwise", lambda x, y: lax.mul(x, y), (ROW, COLUMN)),
    "scalar": Case("elementwise", lambda x, y: x * y, (M, ())),
    "power": Case("elementwise", lambda x, y: (2 + jnp.sin(x)) ** y, (M, ROW)),
    "three_inputs": Case("elementwise", gate, (M, M, M)),
    "three_shapes": Case("elementwise", gate, (M, COLUMN, ROW)),
    "four_inputs": Case("generic", gate, (M, M, M, M)),
    "two_results": Case(
        "elementwise", lambda x: jnp.stack([jnp.sin(x), x * jnp.exp(-x)]), (V,)
    ),
    "stopped": Case("elementwise", normalised, (V,)),
}


@pytest.mark.parametrize(
    "name",
    some(
        ELEMENTWISE,
        default=["row_and_column", "four_inputs", "stopped"],
    ),
)
def test_elementwise_functions_against_the_reference(name):
    case = ELEMENTWISE[name]
    with jax.enable_x64(True):
        loss, params, direction = loss_around(case)
        found = {op.rule.name for op in program_for(loss, params).ops if op.rule}
        assert ("generic" in found) == (case.rule == "generic")
        per_element = pn.partitions.per_element
        found = assert_engines_agree(
            loss, params, direction, param_labels=per_element, rtol=1e-11
        )
        assert np.all(found.hessian != 0)
        assert np.all(found.third != 0)


class Convolution(NamedTuple):
    """A convolution, and whether its kernel is larger than its image."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    arguments: dict[str, Any]
    is_swapped: bool

    def apply(self, x: jax.Array, y: jax.Array) -> jax.Array:
        arguments = {"window_strides": (1, 1), **self.arguments}
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, y, dimension_numbers=numbers, **arguments)


CONVOLUTIONS = {
    "same": Convolution((2, 2), (3, 3), {"padding": "SAME"}, True),
    "of_one_entry": Convolution((1, 1), (3, 3), {"padding": "SAME"}, True),
    "uneven": Convolution((2, 3), (3, 3), {"padding": [(2, 0), (1, 3)]}, True),
    "strided": Convolution(
        (2, 2), (3, 3), {"padding": "SAME", "window_strides": (2, 1)}, True
    ),
    "dilated": Convolution(
        (2, 2), (3, 2), {"padding": [(2, 2), (1, 2)], "rhs_dilation": (2, 1)}, True
    ),
    "transposed": Convolution(
        (2, 2), (3, 3), {"padding": [(1, 1), (2, 1)], "lhs_dilation": (2, 3)}, True
    ),
    "larger_image": Convolution((4, 4), (3, 3), {"padding": "SAME"}, False),
    "grouped": Convolution(
        (2, 2), (3, 3), {"padding": "SAME", "feature_group_count": 2}, False
    ),
}


@pytest.mark.parametrize("name", some(CONVOLUTIONS, default=["same"]))
def test_convolutions(name):
    case = CONVOLUTIONS[name]
    channels = 2 // case.arguments.get("feature_group_count", 1)
    shapes = {"x": (2, *case.image, 2), "k": (*case.kernel, channels, 4), "b": (2,)}
    with jax.enable_x64(True):
        params = {k: jnp.array(normal(*v, seed=5)) for k, v in shapes.items()}
        direction = {k: jnp.array(normal(*v, seed=6)) for k, v in shapes.items()}

        def loss(p: PyTree) -> jax.Array:
            # Both operands have second derivatives along several subsets.
            x, k = jnp.sin(p["x"] * p["b"]), jnp.sin(p["k"]) * jnp.sum(p["b"] ** 2)
            return jnp.sum(jnp.tanh(case.apply(x, k)) ** 2)

        (op,) = (
            op
            for op in program_for(loss, params).ops
            if op.equations[0].primitive.name == "conv_general_dilated"
        )
        faster = convolutions.convolution_of_rows(op.equations[0])
        assert (faster is not None) == case.is_swapped
        found = assert_engines_agree(loss, params, direction)
        assert np.all(found.hessian != 0)
        assert np.all(found.third != 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_inner_products_of_rows_that_are_longer_than_a_block(weighted, monkeypatch):
    monkeypatch.setattr(memory, "_BEYOND_CACHE", 0)
    length = 2 * memory._BLOCK + 3
    a, b = normal(9, length), normal(8, length)
    weight = normal(length) if weighted else np.ones(length)
    with jax.enable_x64(True):
        arguments = [jnp.array(x) for x in (a, b)]
        arguments += [jnp.array(weight)] if weighted else []
        blocks = quick_jit(inner.gram)(*arguments)
    np.testing.assert_allclose(blocks, (a * weight) @ b.T, rtol=1e-12, atol=1e-12)


def test_inner_products_of_many_long_rows_are_computed_in_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_BEYOND_CACHE", 2**12)
    a, weight = normal(9, 40, 60), normal(40, 60)
    with jax.enable_x64(True):
        a, weight = jnp.array(a), jnp.array(weight)
        text = jax.jit(inner.gram).lower(a, a, weight).as_text()
        found = quick_jit(inner.gram)(a, a, weight)
    assert ("stablehlo.while" in text) == (jax.default_backend() == "cpu")
    np.testing.assert_allclose(found, np.einsum("imn,jmn,mn->ij", a, a, weight))


# --- Operations ----------------------------------------------------------------------


def curved_rules(loss: Callable, *shapes: tuple[int, ...]) -> list[str]:
    """The rules of the operations that are curved, in order."""
    ops = program_for(loss, *[jnp.ones(shape) for shape in shapes]).ops
    return [op.rule.name for op in ops if op.is_curved]


W1, W2 = (5, 5), (5, 5)
X = normal(3, 5).astype(np.float32)


def residual(w1, w2):
    x = jnp.tanh(X @ w1)
    return jnp.sum(jnp.sin(x + jnp.tanh(x @ w2)))


def gated(w):
    x = jnp.tanh(X @ w)
    return jnp.sum(jnp.tanh(x) * (jnp.tanh(x) @ normal(5, 5)))


def layer_norm(w):
    x = X @ w
    x = x - jnp.mean(x, axis=1, keepdims=True)
    return jnp.sum(x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-3))


def gelu(w1, w2):
    return jnp.sum(jax.nn.gelu(X @ w1) @ w2)


def elu(w1, w2):
    return jnp.sum(jnp.sin(jax.nn.elu(jax.nn.elu(X @ w1) @ w2)))


def softmax(w):
    return jnp.sum(jax.nn.softmax(X @ w) @ normal(5, 2))


def dropout(w1, w2):
    x = jnp.tanh(X @ w1)
    return jnp.sum(jnp.where(normal(3, 5) > 0, x / 0.5, 0.0) @ w2)


@pytest.mark.parametrize(
    ("loss", "shapes", "expected"),
    [
        (residual, (W1, W2), ["elementwise", "bilinear", *["elementwise"] * 2]),
        (gated, (W1,), ["elementwise", "elementwise"]),
        (layer_norm, (W1,), ["elementwise"] * 3),
        (gelu, (W1, W2), ["elementwise", "bilinear"]),
        (elu, (W1, W2), ["elementwise", "bilinear", "elementwise"]),
        (softmax, (W1,), ["elementwise"] * 2),
        (dropout, (W1, W2), ["elementwise", "bilinear"]),
    ],
)
def test_runs_of_elementwise_equations_are_one_operation(loss, shapes, expected):
    assert curved_rules(loss, *shapes) == expected


def masks_of_each_other(params: PyTree) -> jax.Array:
    """Two runs of elementwise equations that depend on each other through masks."""
    x = jnp.tanh(params["x"])
    y = jnp.where(x > 0, jnp.sin(params["y"]), params["y"])
    return jnp.sum(jnp.where(y > 0, jnp.exp(x), x) * y)


def test_operations_have_an_order_if_runs_depend_on_each_other_through_masks():
    with jax.enable_x64(True):
        params = {"x": jnp.array(normal(20)), "y": jnp.array(normal(20, seed=1))}
        assert_engines_agree(masks_of_each_other, params, params)


# --- Sparsity over subsets -----------------------------------------------------------

LAYERS = [(3, 7), (7, 11), (11, 13), (13, 2)]


def layers(dtype: Any = np.float32) -> list[dict[str, jax.Array]]:
    return [
        {
            "w": jnp.array(normal(*shape, seed=i) / shape[0] ** 0.5, dtype),
            "b": jnp.array(normal(shape[1], seed=i), dtype),
        }
        for i, shape in enumerate(LAYERS)
    ]


def dense(params: PyTree, x: Any, activation: Callable = jnp.tanh) -> jax.Array:
    *hidden, last = params
    for p in hidden:
        x = activation(x @ p["w"] + p["b"])
    return x @ last["w"] + last["b"]


def dense_loss(params: PyTree) -> jax.Array:
    x = normal(5, 3).astype(params[0]["w"].dtype)
    return jnp.mean(jnp.sin(dense(params, x)) ** 2)


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all values of a jaxpr and of those inside of it."""
    found = set()
    for equation in compat.open_jaxpr(jaxpr).eqns:
        found.update(v.aval.shape for v in equation.outvars)
        for inside in core.jaxprs_in_params(equation.params):
            found |= shapes_in(inside)
    return found


def stacked_weights(engine: str, **kwargs: Any) -> set[tuple[int, ...]]:
    params = layers()
    summary = functools.partial(pn.summarize, dense_loss, engine=engine, **kwargs)
    found = shapes_in(jax.make_jaxpr(summary)(params, params))
    assert (1, 7, 11) in found or (7, 11) in found
    return {x for x in found if x[1:] in LAYERS and x[0] > 1}


def test_no_stack_of_weights_is_ever_built():
    assert stacked_weights("adjoint") == set()
    # The same search finds the stacks of the reference engine.
    assert (8, 7, 11) in stacked_weights(pn.engines.JvpOfGrad(batch_size=8))


@pytest.mark.usefixtures("registry_is_restored")
def test_tangents_have_rows_for_the_subsets_on_which_a_value_depends():
    met = []

    def watched(op, primals, cotangents, jets, request):
        met.append([(x.first.start, x.first.span.stop) for x in jets])
        return BILINEAR.apply(op, primals, cotangents, jets, request)

    pn.engines.rule("dot_general", when=is_product)(watched)
    compute = functools.partial(pn.summarize, dense_loss, engine="adjoint")
    jax.eval_shape(compute, layers(), layers())
    # Products of layers 2 to 4: the first operand depends on all layers before.
    assert met == [
        [(0, 2), (2, 3)],
        [(0, 4), (4, 5)],
        [(0, 6), (6, 7)],
    ]


# --- Large sweeps, compiled in parts --------------------------------------------------


@pytest.mark.parametrize("batch_size", some([None, 4], default=[None]))
@pytest.mark.parametrize(
    "name",
    some(
        ["convolutional_network", "attention", "lstm"],
        default=["convolutional_network"],
    ),
)
def test_sweeps_of_separately_compiled_operations_are_the_same(
    name, batch_size, monkeypatch
):
    with jax.enable_x64(True):
        problem = models.make(name, jnp.float64)

        def summary_and_calls():
            # A new function each time, since jax caches the trace of a function.
            compute = functools.partial(
                pn.summarize, problem.loss, engine=pn.engines.Adjoint(batch_size)
            )
            compiled = jax.jit(compute).lower(problem.params, problem.direction)
            calls = compiled.compile().as_text().count(" call(")
            return quick_jit(compute)(problem.params, problem.direction), calls

        expected, fused = summary_and_calls()
        monkeypatch.setattr(sweeps, "_CACHED_BYTES", 0)
        monkeypatch.setattr(memory, "_LARGE", 0)
        found, outlined = summary_and_calls()
    assert (outlined > fused) == (jax.default_backend() == "cpu")
    for field in expected._fields:
        x, y = getattr(found, field), getattr(expected, field)
        assert_close(x, np.asarray(y), 1e-12, field)


@pytest.mark.parametrize("cached", some([0, 2**23], default=[0]))
def test_a_loop_may_start_from_a_literal(cached, monkeypatch):
    monkeypatch.setattr(sweeps, "_CACHED_BYTES", cached)

    def loss(params: PyTree) -> jax.Array:
        def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(carry + x), None

        return lax.scan(body, 0.0, jnp.tanh(params["x"] * params["y"]))[0]

    with jax.enable_x64(True):
        params = {"x": jnp.array(normal(5)), "y": jnp.array(normal(5, seed=1))}
        assert_engines_agree(loss, params, params)


@pytest.mark.parametrize("cached", some([0, 2**23], default=[2**23]))
def test_a_summary_is_nan_where_the_loss_is_not_finite(cached, monkeypatch):
    monkeypatch.setattr(sweeps, "_CACHED_BYTES", cached)

    def loss(params: PyTree) -> jax.Array:
        return dense_loss(params) / 0.0

    summary = pn.summarize(loss, layers(), layers(), engine="adjoint")
    for x in (summary.gradient, summary.hessian, summary.third):
        assert np.all(np.isnan(x))


# --- Sums over the last axes ---------------------------------------------------------


@pytest.mark.parametrize("axes", [(2,), (1, 2), (0,), (0, 2), (0, 1, 2), ()])
@pytest.mark.parametrize(
    "dtype", some([np.float32, np.float64, jnp.bfloat16], default=[np.float32])
)
def test_sums_by_products(axes, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.array(np.round(8 * normal(3, 4, 5)), dtype)
        found = quick_jit(lambda x: reductions.sum_over(x, axes))(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.sum(np.asarray(x, float), axes))


def test_lowerings_can_be_disabled():
    def primitives() -> set[str]:
        jaxpr = jax.make_jaxpr(lambda x: lowerings.sum_over(x, (1,)))(jnp.ones((2, 3)))
        return {e.primitive.name for e in compat.open_jaxpr(jaxpr).eqns}

    assert ("dot_general" in primitives()) == (jax.default_backend() == "cpu")
    with lowerings.disabled():
        assert primitives() == {"reduce_sum"}


# --- Batched products ----------------------------------------------------------------


@pytest.mark.parametrize("with_rows", ["a", "b", "ab", ""])
def test_batched_products_of_rows(with_rows):
    a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    (equation,) = jax.make_jaxpr(lax.batch_matmul)(a, b).eqns
    product = products.product_of_rows(equation)
    axes = [0 if name in with_rows else None for name in "ab"]
    with jax.enable_x64(True):
        a, b = (
            jnp.array(normal(*([7] if axis == 0 else []), *x.shape))
            for axis, x in zip(axes, (a, b), strict=True)
        )
        found = quick_jit(product)(a, b)
    np.testing.assert_allclose(found, np.matmul(a, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "shapes", "in_order"),
    [
        pytest.param(
            "btnh,bsnh->bnts",
            [(2, 3, 4, 5), (2, 7, 4, 5)],
            False,
            marks=pytest.mark.slow,
        ),
        ("bnts,bsnh->btnh", [(2, 4, 3, 7), (2, 7, 4, 5)], False),
        pytest.param(
            "abcde,feda->ebfc",
            [(2, 3, 4, 5, 6), (7, 6, 5, 2)],
            False,
            marks=pytest.mark.slow,
        ),
        ("ab,ab->b", [(5, 6), (5, 6)], False),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], True),
        pytest.param("ij,jk->ik", [(3, 4), (4, 5)], True, marks=pytest.mark.slow),
    ],
)
def test_the_axes_of_batched_products_are_transposed_once(formula, shapes, in_order):
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y)

    def loss(params: list[jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(product(*map(jnp.tanh, params))))

    operands = [jnp.ones(shape) for shape in shapes]
    (equation,) = [
        e
        for e in compat.open_jaxpr(compat.traced(product, *operands)[1]).eqns
        if e.primitive.name in ("dot_general", "jit")
    ]
    if equation.primitive.name == "jit":
        inner = compat.open_jaxpr(compat.inlined(equation)).eqns
        (equation,) = [e for e in inner if e.primitive.name == "dot_general"]
    assert (products.in_order(equation) is None) == in_order

    with jax.enable_x64(True):
        params = [jnp.array(normal(*s, seed=i)) for i, s in enumerate(shapes)]
        assert_engines_agree(loss, params, params)
        ops = program_for(loss, params).ops
    for equation in (e for op in ops for e in op.equations):
        if products.is_batched(equation):
            assert products.in_order(equation) is None


def test_a_summary_with_batched_products_can_be_differentiated():
    def loss(params: PyTree) -> jax.Array:
        x, y = (jnp.tanh(p) for p in params)
        return jnp.sum(jnp.sin(jnp.einsum("btnh,bsnh->bnts", x, y)))

    def curvature(params: PyTree, engine: str) -> jax.Array:
        return jnp.sum(pn.summarize(loss, params, params, engine=engine).hessian)

    with jax.enable_x64(True):
        params = [jnp.array(normal(2, 3, 2, 3)), jnp.array(normal(2, 4, 2, 3))]
        gradient = quick_jit(jax.grad(functools.partial(curvature, engine="adjoint")))
        reference = functools.partial(curvature, engine="jvp_of_grad")
        expected = quick_jit(jax.grad(reference))(params)
        for x, y in zip(gradient(params), expected, strict=True):
            assert_close(x, np.asarray(y), 1e-12, "gradient")


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


def test_the_third_order_takes_one_pass_a_subset():
    adjoint = [passes(depth, "adjoint") for depth in (4, 16)]
    reference = [passes(depth, "jvp_of_grad") for depth in (4, 16)]
    assert adjoint[1] < 1.5 * adjoint[0]
    assert reference[1] > 2.5 * reference[0]
    assert adjoint[1] < reference[1] / 4


# --- Custom differentiation rules ----------------------------------------------------


@jax.custom_vjp
def rounded(x: jax.Array) -> jax.Array:
    """Rounds; a straight-through estimator of the gradient."""
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def by_stop_gradient(x: jax.Array) -> jax.Array:
    return x + lax.stop_gradient(jnp.round(x) - x)


def estimator_losses(quantised: Callable) -> list[Callable]:
    return [
        lambda p: 0.5 * quantised(p["w"]) ** 2,
        lambda p: p["a"] * quantised(p["w"]),  # a before w
        lambda p: p["z"] * quantised(p["w"]),  # z after w
    ]


POINT = {"a": jnp.array(3.0), "w": jnp.array(1.7), "z": jnp.array(5.0)}
ONES = {"a": jnp.array(1.0), "w": jnp.array(1.0), "z": jnp.array(1.0)}
SURROGATE = [
    [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
    [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
]
# The derivative of the value of `round` is zero. For a * rounded(w), the gradient with
# respect to w has the derivative one along a, and that with respect to a has the
# derivative zero along w. A summary contains the symmetric part.
OF_THE_GRADIENT = [np.multiply(0.5, x) for x in SURROGATE]
OF_THE_GRADIENT[0] = np.zeros((3, 3))


@each_engine
@pytest.mark.parametrize(
    ("quantised", "expected"),
    [(rounded, OF_THE_GRADIENT), (by_stop_gradient, SURROGATE)],
)
def test_straight_through_estimators(quantised, engine, expected):
    for loss, hessian in zip(estimator_losses(quantised), expected, strict=True):
        summary = pn.summarize(loss, POINT, ONES, engine=engine)
        gradient = jax.grad(loss)(POINT)
        assert summary.gradient.tolist() == jax.tree.leaves(gradient)
        np.testing.assert_array_equal(summary.hessian, hessian)
        np.testing.assert_array_equal(summary.third, 0)


@each_engine
def test_a_custom_vjp_keeps_its_own_rule(engine):
    """A rule with twice the derivative of tanh is propagated as it is."""

    @jax.custom_vjp
    def steep(x):
        return jnp.tanh(x)

    steep.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g / jnp.cosh(x) ** 2,))
    summary = pn.summarize(lambda w: 3 * steep(w), 0.4, 1.0, engine=engine)
    slope, bend, jerk = (
        functools.reduce(lambda f, _: jax.grad(f), range(n), jnp.tanh)(0.4)
        for n in (1, 2, 3)
    )
    np.testing.assert_allclose(summary.gradient, [6 * slope], rtol=1e-6)
    np.testing.assert_allclose(summary.hessian, [[6 * bend]], rtol=1e-6)
    np.testing.assert_allclose(summary.third, [6 * jerk], rtol=1e-5)


# --- Where it can be used ------------------------------------------------------------


def small_loss(p: PyTree, x: Any = 1.0) -> jax.Array:
    return jnp.sum(jnp.tanh(p["w"] @ p["v"] * x) * jnp.exp(p["v"]))


def small_params(seed: int = 0) -> PyTree:
    return {
        "v": jnp.array(normal(3, seed=seed), np.float32),
        "w": jnp.array(normal(3, 3, seed=seed), np.float32),
    }


def small(p: PyTree, x: Any = 1.0, engine: str = "adjoint") -> pn.Summary:
    loss = functools.partial(small_loss, x=x)
    return pn.summarize(loss, p, small_params(9), engine=engine)


def assert_same(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, np.asarray(y), rtol, "summary")


def expected_of(params: PyTree, xs: Any = 1.0) -> pn.Summary:
    return small(params, xs, engine="jvp_of_grad")


def test_under_vmap_over_parameters_and_over_data():
    many = [small_params(seed) for seed in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *many)
    xs = jnp.arange(1.0, 4.0)
    found = jax.jit(jax.vmap(small))(batch, xs)
    expected = [expected_of(p, x) for p, x in zip(many, xs, strict=True)]
    assert_same(found, jax.tree.map(lambda *x: np.stack(x), *expected))


def test_under_cond_scan_and_checkpoint():
    params = small_params()
    expected = expected_of(params)

    def nothing(params):
        return jax.tree.map(jnp.zeros_like, expected)

    @jax.jit
    def compute(flag, params):
        in_cond = lax.cond(flag, small, nothing, params)
        in_checkpoint = jax.checkpoint(small)(params)
        _, in_scan = lax.scan(lambda p, _: (p, small(p)), params, length=2)
        return in_cond, in_checkpoint, jax.tree.map(lambda x: x[1], in_scan)

    for found in compute(True, params):
        assert_same(found, expected)
    assert_same(compute(False, params)[0], nothing(params))


def test_an_entry_of_a_summary_has_a_gradient():
    def entry(params, engine):
        summary = small(params, engine=engine)
        return summary.hessian[0, 1] + summary.third[0] + summary.gradient[1]

    gradient = jax.jit(jax.grad(entry), static_argnames="engine")
    params = small_params()
    assert_same(
        gradient(params, engine="adjoint"), gradient(params, engine="jvp_of_grad"), 1e-4
    )


@pytest.mark.slow
def test_parameters_in_bfloat16():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
    summary = small(half)
    assert {x.dtype for x in summary} == {np.dtype(np.float32)}
    exact = expected_of(jax.tree.map(lambda x: x.astype(np.float32), half))
    assert_same(summary, exact, 2**-5)


def test_aux_may_hold_anything():
    def loss(p):
        aux = {"name": "tanh", "none": None, "n": 3, "v": 2 * p["v"], "x": np.ones(2)}
        return small_loss(p), aux

    params = small_params()
    summary, aux = pn.summarize(
        loss, params, small_params(9), has_aux=True, engine="adjoint"
    )
    assert_same(summary, expected_of(params))
    assert (aux["name"], aux["none"], aux["n"]) == ("tanh", None, 3)
    np.testing.assert_array_equal(aux["v"], 2 * params["v"])
    np.testing.assert_array_equal(aux["x"], np.ones(2))


@pytest.mark.parametrize(
    "check",
    some(["sharded_map", "explicit_mesh", "collectives"], default=["sharded_map"]),
)
def test_on_four_devices(check):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "support.adjoint_on_devices", check],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.usefixtures("registry_is_restored")
def test_the_examples_of_the_page_about_the_engine():
    page = Path(__file__).parent.parent / "docs" / "engine.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), str(page), "exec"), {})
