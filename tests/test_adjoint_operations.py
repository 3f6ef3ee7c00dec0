"""The fast engine: each operation by itself, against the reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from support.both_engines import (
    assert_engines_agree,
    assert_summaries_agree,
    assert_tensors_agree,
    normal,
    program_for,
)
from support.selection import some

import partnewton as pn
from partnewton.engines.adjoint.registry import TABLES

PyTree = Any


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


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_its_rule(name):
    case = OPERATIONS[name]
    with jax.enable_x64(True):
        loss, params, _ = loss_around(case)
        found = {
            (op.equations[0].primitive.name, op.rule.name)
            for op in program_for(loss, params).ops
            if len(op.equations) == 1 and op.rule
        }
    if name == "stack" and (name, case.rule) not in found:
        pytest.skip("up to jax 0.10.0, this is a concatenate")
    assert (name, case.rule) in found


# Each rule, on one and two operands, and all that the engine distinguishes: operands in
# which an operation is not linear, complex numbers, sums of rows, masks.
SOME_OF_EACH_KIND = [
    "complex",
    "concatenate",
    "conv_general_dilated",
    "dot_general",
    "dynamic_update_slice",
    "gather",
    "max",
    "mul",
    "reduce_sum",
    "reduce_window_max",
    "scatter",
    "scatter-add",
    "select_n",
    "sort",
    "sub",
    "triangular_solve",
]


@pytest.mark.parametrize("name", some(OPERATIONS, default=SOME_OF_EACH_KIND))
def test_an_operation_against_the_reference(name):
    with jax.enable_x64(True):
        loss, params, direction = loss_around(OPERATIONS[name])
        per_element = pn.partitions.per_element
        found = assert_summaries_agree(
            loss, params, direction, param_labels=per_element, rtol=1e-11
        )
        assert np.all(found.hessian != 0)
        assert np.all(found.third != 0)


ONE_OF_EACH_KIND = ["reduce_sum", "dot_general", "mul", "max"]


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
    some(ELEMENTWISE, default=["row_and_column"]),
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
