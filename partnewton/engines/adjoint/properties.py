"""Properties of an equation, from the tables of primitives."""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_inexact, is_variable
from partnewton.engines.adjoint.registry import TABLES
from partnewton.engines.compat import Equation, Variable

__all__ = [
    "has_power",
    "is_affine",
    "is_bilinear",
    "is_differentiable",
    "is_elementwise",
    "is_known",
    "is_linear",
    "is_piecewise_linear",
    "is_singular",
    "may_mask",
]


def is_differentiable(equation: Equation) -> bool:
    """Whether an operation may have a nonzero derivative."""
    name = equation.primitive.name
    is_constant = name in TABLES.piecewise_constant and _is_real(equation)
    return name != "stop_gradient" and not is_constant


def is_linear(equation: Equation, active: Collection[int]) -> bool:
    """Whether an operation is linear in the operands at the places `active`."""
    name = equation.primitive.name
    if is_bilinear(equation):
        return len(active) <= 1
    if name not in TABLES.linear:
        return not active
    operands = TABLES.linear[name]
    return operands is None or set(active) <= set(operands)


def is_bilinear(equation: Equation) -> bool:
    """Whether an operation is linear in either operand while the other is constant."""
    return equation.primitive.name in ("conv_general_dilated", "dot_general", "mul")


def is_affine(equation: Equation, active: Sequence[int]) -> bool:
    """Whether a linear operation may have a constant term, as in ``x + 1``.

    It has one if other operands in which it is linear are constant, or if a gather
    fills in values.
    """
    name = equation.primitive.name
    if name == "gather":
        return True
    if is_bilinear(equation):
        return False
    operands = TABLES.linear[name]
    return any(
        (operands is None or n in operands) and n not in active
        for n, atom in enumerate(equation.invars)
        if is_inexact(atom)
    )


def is_piecewise_linear(equation: Equation) -> bool:
    """Whether an operation is linear in all operands, almost everywhere."""
    return equation.primitive.name in TABLES.piecewise_linear and _is_real(equation)


def is_elementwise(equation: Equation) -> bool:
    """Whether each entry of the result depends on the same entry of the operands."""
    names = {e.primitive.name for e in _elementary(equation)}
    return not equation.effects and names <= TABLES.elementwise.keys()


def is_known(equation: Equation) -> bool:
    """Whether an operation is in a table, or consists of such operations."""
    names = {*TABLES.linear, *TABLES.piecewise_linear}
    is_listed = equation.primitive.name in names or is_bilinear(equation)
    return is_listed or is_elementwise(equation)


def may_mask(equation: Equation) -> bool:
    """Whether entries of the result may be constant although the operands are not."""
    name = equation.primitive.name
    if name in ("concatenate", "pad", "stack"):
        return not all(is_inexact(x) and is_variable(x) for x in equation.invars)
    if name in ("dynamic_update_slice", "gather", "scatter-add", "select_n"):
        return True
    if name in TABLES.piecewise_linear:
        return True
    return not (is_bilinear(equation) or name in {*TABLES.linear, *TABLES.elementwise})


def is_singular(equation: Equation, positive: Collection[Variable] = ()) -> bool:
    """Whether an elementwise function may have an infinite derivative.

    The variables `positive` are known to be greater than zero.
    """
    return any(
        TABLES.elementwise.get(e.primitive.name) and not _is_kept_away(e, positive)
        for e in _elementary(equation)
    )


def has_power(equation: Equation) -> bool:
    """Whether an elementwise function contains a non-integer power."""
    return any(e.primitive.name == "pow" for e in _elementary(equation))


def _elementary(equation: Equation) -> list[Equation]:
    """The equations inside of an equation that is a call, or the equation."""
    if equation.primitive is primitives.custom_jvp_call_p:
        inside = equation.params["call_jaxpr"]
    else:
        inside = compat.called_jaxpr(equation)
    if inside is None:
        return [equation]
    return [e for inner in compat.open_jaxpr(inside).eqns for e in _elementary(inner)]


def _is_kept_away(equation: Equation, positive: Collection[Variable]) -> bool:
    """Whether the operands exclude the point with the infinite derivative."""
    name, read = equation.primitive.name, equation.invars
    if name == "integer_pow" and equation.params["y"] >= 0:
        return True
    if TABLES.elementwise[name] != "zero":
        return False
    atom = read[1] if name == "div" else read[0]
    return atom in positive if is_variable(atom) else name == "div"


def _is_real(equation: Equation) -> bool:
    return not any(
        jnp.issubdtype(atom.aval.dtype, np.complexfloating)
        for atom in (*equation.invars, *equation.outvars)
    )
