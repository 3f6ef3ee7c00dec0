"""Operations without terms: linear and piecewise linear functions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.registry import (
    register_linear,
    register_piecewise_constant,
    register_piecewise_linear,
)
from partnewton.engines.adjoint.rows import push, with_zeros
from partnewton.engines.adjoint.tangent import Jet, Tangent, densify
from partnewton.engines.adjoint.terms import Terms

__all__ = ["LINEAR", "PIECEWISE_LINEAR", "jets_of", "linearized"]

# fmt: off
register_linear(
    "add", "add_any", "all_gather", "all_gather_invariant", "all_to_all",
    "broadcast_in_dim", "complex", "concatenate", "conj", "convert_element_type",
    "copy", "copy_p", "cumsum", "device_put", "fft", "imag", "mesh_cast", "name", "neg",
    "optimization_barrier", "pad", "pbroadcast", "pcast", "ppermute", "psum",
    "psum_invariant", "psum_scatter", "pvary", "real", "reduce_precision",
    "reduce_scatter", "reduce_sum", "reduce_window_sum", "reshape", "reshard", "rev",
    "select_n", "sharding_constraint", "slice", "split", "squeeze", "stack", "sub",
    "tile", "transpose",
)
register_linear("div", "dynamic_slice", "gather", operands=(0,))
register_linear("dynamic_update_slice", operands=(0, 1))
register_linear("scatter-add", operands=(0, 2))
register_linear("triangular_solve", operands=(1,))

register_piecewise_linear(
    "abs", "clamp", "cummax", "cummin", "max", "min", "reduce_max", "reduce_min",
    "reduce_window_max", "reduce_window_min", "rem", "scatter", "select_and_gather_add",
    "select_and_scatter_add", "sort", "top_k",
)
# fmt: on
register_piecewise_constant("ceil", "floor", "round", "sign")


def linear(
    op: Op,
    primals: Sequence[jax.Array],
    cotangents: Any,
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = A x: zdot = A xdot, zddot = A xddot."""
    by_rows, takes_rows = lowerings.function_of_rows(op)
    function = op.function_of_active(primals, function=by_rows)
    of_members = functools.partial(with_zeros, function, op.take_active(primals))
    return _pushed(op, of_members, jets, takes_rows), Terms()


def piecewise_linear(
    op: Op,
    primals: Sequence[jax.Array],
    cotangents: Any,
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = f(x) with f linear around x: zdot = Df xdot, zddot = Df xddot."""
    jvp = linearized(op.function_of_active(primals), op.take_active(primals))
    return _pushed(op, jvp, jets), Terms()


def linearized(
    function: Callable, at: Sequence[jax.Array]
) -> Callable[[tuple[int, ...]], Callable]:
    """The derivative with respect to some operands, for :func:`push`."""
    _, jvp = jax.linearize(function, *at)
    return functools.partial(with_zeros, jvp, at)


def _pushed(
    op: Op, of_members: Callable, jets: Sequence[Jet], takes_rows: bool = False
) -> list[Jet]:
    """The jets of A x, from those of x."""
    columns = zip(*jets, strict=True)
    return jets_of(op, *(push(of_members, x, takes_rows=takes_rows) for x in columns))


def jets_of(
    op: Op, first: list[Tangent] | None, second: list[Tangent] | None = None
) -> list[Jet]:
    """The jets of the active outputs, from columns that may be missing."""
    nothing = [None] * len(op.active_outputs)
    pairs = zip(first or nothing, second or nothing, strict=True)
    # With equal spans, later operations compute with both orders at once.
    return [Jet(x, y and Tangent(densify(y, x.span), x.start)) for x, y in pairs]


LINEAR = OpRule("linear", linear, is_curved=False)
PIECEWISE_LINEAR = OpRule("piecewise_linear", piecewise_linear, is_curved=False)
