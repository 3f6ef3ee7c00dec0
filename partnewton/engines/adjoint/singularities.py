"""Operations at which an infinite derivative may be multiplied by a zero tangent.

In ``sqrt(where(mask, 0, x))``, the derivative of the square root is infinite at the
masked entries. The gradient is finite, since `where` replaces the cotangents there by
zeros. Tangents are zero there, and their products with the infinite derivative have to
be zero. Such products are masked, at the operations that are found here.
"""

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from partnewton.engines.adjoint import dataflow, properties
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.compat import Equation, Variable

__all__ = ["Singularities", "singularities_of"]

_POSITIVE = frozenset(["cosh", "exp", "exp2", "logistic"])
_EVEN = frozenset(["abs", "square"])
# The sign of the result is that of all operands.
_KEEPING_SIGN = frozenset(
    [
        "abs",
        "add",
        "add_any",
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


@dataclasses.dataclass(frozen=True)
class Singularities:
    """Properties of the variables of a jaxpr.

    Attributes:
      positive: those that are known to be greater than zero.
      masked: the active ones that depend on the parameters only through a mask.
      endangered: those of the masked ones whose cotangent may be infinite.
    """

    positive: frozenset[Variable]
    masked: frozenset[Variable]
    endangered: frozenset[Variable]

    def is_singular(self, equation: Equation) -> bool:
        """Whether an elementwise function may have an infinite derivative."""
        return properties.is_singular(equation, self.positive)

    def is_guarded(
        self,
        is_elementwise: bool,
        equations: Sequence[Equation],
        read: Collection[Variable],
    ) -> bool:
        """Whether products of zero and infinity have to be masked in an operation.

        Args:
          is_elementwise: whether it has the rule of elementwise functions.
          equations: the equations of the operation.
          read: its active inputs.
        """
        is_singular = is_elementwise and any(map(self.is_singular, equations))
        if is_singular and any(
            properties.may_mask(e) or properties.has_power(e) for e in equations
        ):
            return True  # a power may be infinite in its second derivative only
        is_infinite = is_singular or self._is_endangered(equations)
        return is_infinite and self.masked.issuperset(read)

    def has_mask(self, equations: Sequence[Equation]) -> bool:
        """Whether an operation has a mask, and cotangents may be infinite there."""
        has_mask = any(map(properties.may_mask, equations))
        return has_mask and self._is_endangered(equations)

    def _is_endangered(self, equations: Sequence[Equation]) -> bool:
        written = (v for e in equations for v in e.outvars)
        return not self.endangered.isdisjoint(written)


def singularities_of(
    equations: Sequence[Equation],
    active: Collection[Variable],
    from_outside: Iterable[Variable],
    to_outside: Iterable[Any],
) -> Singularities:
    """The properties of the variables of a jaxpr.

    Args:
      equations: its equations in order.
      active: the active variables.
      from_outside: variables that count as masked: the inputs of a loop.
      to_outside: variables whose cotangents count as infinite: the results of a loop.
    """
    masked = frozenset(_masked(equations, active, from_outside))
    positive = frozenset(_positive(equations))
    endangered = masked.intersection(filter(is_variable, to_outside))
    for equation in reversed(equations):
        if (
            properties.is_singular(equation, positive)
            or not properties.is_known(equation)
            or not endangered.isdisjoint(equation.outvars)
        ):
            endangered |= masked.intersection(dataflow.operands(equation))
    return Singularities(positive, masked, endangered)


def _masked(
    equations: Sequence[Equation],
    active: Collection[Variable],
    from_outside: Iterable[Variable],
) -> set[Variable]:
    """The active variables that depend on the parameters only through a mask.

    An infinite cotangent makes the gradient infinite, unless each path to the
    parameters contains a `where` or a similar operation. Only then, the summary can be
    finite.
    """
    masked = set(from_outside)
    for equation in equations:
        read = [v for v in dataflow.operands(equation) if v in active]
        if read and (properties.may_mask(equation) or masked.issuperset(read)):
            masked.update(v for v in equation.outvars if v in active)
    return masked


def _positive(equations: Sequence[Equation]) -> set[Variable]:
    """The variables that are greater than zero, except for underflow."""
    positive: set[Variable] = set()
    at_least_zero: set[Variable] = set()

    def is_in(atom: Any, some: Collection[Variable], holds: Callable) -> bool:
        if is_variable(atom):
            return atom in some
        return atom.aval.shape == () and bool(holds(atom.val, 0))

    for equation in equations:
        name, read = equation.primitive.name, equation.invars
        are_positive = [is_in(x, positive, operator.gt) for x in read]
        are_not_negative = [
            flag or is_in(x, at_least_zero, operator.ge)
            for x, flag in zip(read, are_positive, strict=True)
        ]
        has_sign = name in _KEEPING_SIGN
        if (
            name in _POSITIVE
            or (has_sign and all(are_positive))
            or (name == "max" and any(are_positive))
            or (name == "add" and any(are_positive) and all(are_not_negative))
        ):
            positive.update(equation.outvars)
        elif (
            name in _EVEN
            or (name == "integer_pow" and equation.params["y"] % 2 == 0)
            or (name == "mul" and read[0] is read[1])
            or (has_sign and all(are_not_negative))
            or (name == "max" and any(are_not_negative))
        ):
            at_least_zero.update(equation.outvars)
    return positive
