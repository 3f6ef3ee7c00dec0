"""Variables that are greater than zero, as far as the equations show it.

A variable has one of three signs: 2 if it is greater than zero (except for underflow),
1 if it is at least zero, and 0 if nothing is known of it. In ``sqrt(x**2 + 1e-6)``, the
signs of ``x**2`` and of the literal are 1 and 2, hence that of the sum is 2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.compat import Equation, Variable

__all__ = ["positive_variables"]

_POSITIVE = frozenset(["cosh", "exp", "exp2", "logistic"])
_EVEN = frozenset(["abs", "square"])
# The sign of the result is the smallest of those of the operands.
_KEEPING_SIGN = frozenset(
    [
        "abs",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "cumsum",
        "div",
        "mul",
        "reduce_max",
        "reduce_min",
        "reduce_sum",
        "reshape",
        "rsqrt",
        "sqrt",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)


def positive_variables(equations: Sequence[Equation]) -> frozenset[Variable]:
    """The variables that equations write and that are greater than zero."""
    signs: dict[Variable, int] = {}
    for equation in equations:
        sign = _sign_of_result(equation, [_sign(x, signs) for x in equation.invars])
        signs.update(dict.fromkeys(equation.outvars, sign))
    return frozenset(v for v, sign in signs.items() if sign == 2)


def _sign(atom: Any, signs: dict[Variable, int]) -> int:
    if is_variable(atom):
        return signs.get(atom, 0)
    if np.shape(atom.val) != ():
        return 0
    return 2 if atom.val > 0 else int(atom.val >= 0)


def _sign_of_result(equation: Equation, signs: Sequence[int]) -> int:
    name = equation.primitive.name
    if name in _POSITIVE:
        return 2
    if name == "max":
        return max(signs)
    if name in ("add", "add_any"):
        return max(signs) if min(signs) > 0 else 0
    least = min(signs) if name in _KEEPING_SIGN else 0
    return max(least, 1) if _is_even(equation) else least


def _is_even(equation: Equation) -> bool:
    """Whether it is an even power of its operand, or its absolute value."""
    name, read = equation.primitive.name, equation.invars
    if name == "integer_pow":
        return equation.params["y"] % 2 == 0
    return name in _EVEN or (name == "mul" and read[0] is read[1])
