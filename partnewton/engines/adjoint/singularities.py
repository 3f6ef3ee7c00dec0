"""Operations at which an infinite derivative may be multiplied by a zero tangent.

In ``z = sqrt(y)`` with ``y = where(mask, 0, x)``, the derivative of the square root is
infinite at the masked entries, and the tangent of y is zero there. The gradient is
finite: the infinite cotangent of y is replaced by zero when it passes `where`. In a
summary, such a product has to be zero, too. The operations in which these products are
masked are those that satisfy two conditions:

- An operand is *masked*: each path from the parameters to it contains a `where` or a
  similar operation. Otherwise, the gradient would be infinite as well.
- A derivative is infinite at some number, that of a square root at zero for example,
  or the cotangent of the result may be infinite, since the result is *endangered*.

Cotangents are propagated backwards, and so are infinite ones: the operands of a
function with an infinite derivative are endangered, and those of any operation with an
endangered result, as far as they are masked. In the example, y is endangered.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from partnewton.engines import compat
from partnewton.engines.adjoint import dataflow, properties
from partnewton.engines.adjoint.dataflow import is_inexact, is_variable
from partnewton.engines.adjoint.graph import Graph
from partnewton.engines.adjoint.signs import positive_variables
from partnewton.engines.compat import Equation, Variable

__all__ = ["Singularities", "singularities_of"]


@dataclasses.dataclass(frozen=True)
class Singularities:
    """Properties of the variables of a flattened jaxpr.

    Attributes:
      positive: those that are known to be greater than zero.
      masked: those that depend on the parameters only through a mask.
      endangered: those of the masked ones whose cotangent may be infinite.
      bodies: the properties in the body of each `scan`, by the position of its
        equation.
    """

    positive: frozenset[Variable]
    masked: frozenset[Variable]
    endangered: frozenset[Variable]
    bodies: dict[int, "Singularities"]

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


def singularities_of(flat: Graph, active: Collection[Variable]) -> Singularities:
    """The properties of the variables of a flattened jaxpr.

    Args:
      flat: the jaxpr.
      active: the active variables.
    """
    return _propagated_backwards(flat, frozenset(_masked(flat, active)), ())


def _masked(flat: Graph, active: Collection[Variable]) -> set[Variable]:
    """The active variables that depend on the parameters only through a mask."""
    masked: set[Variable] = set()
    for equation in flat.equations:
        read = [v for v in dataflow.operands(equation) if v in active]
        if read and (properties.may_mask(equation) or masked.issuperset(read)):
            masked.update(v for v in equation.outvars if v in active)
    return masked


def _propagated_backwards(
    flat: Graph, masked: frozenset[Variable], results: Collection[Any]
) -> Singularities:
    """The properties of variables, given the endangered ones among the results."""
    positive = positive_variables(flat.equations)
    endangered, bodies = masked.intersection(filter(is_variable, results)), {}
    for place, equation in reversed(list(enumerate(flat.equations))):
        if not properties.is_differentiable(equation):
            continue
        if place in flat.bodies:
            bodies[place], reached = _in_loop(equation, flat.bodies[place], endangered)
            endangered |= masked.intersection(reached)
        elif (
            properties.is_singular(equation, positive)
            or not properties.is_known(equation)
            or not endangered.isdisjoint(equation.outvars)
        ):
            endangered |= masked.intersection(dataflow.operands(equation))
    return Singularities(positive, masked, endangered, bodies)


def _in_loop(
    equation: Equation, body: Graph, endangered: Collection[Variable]
) -> tuple[Singularities, list[Variable]]:
    """The properties in the body of a `scan`, and the operands that are endangered.

    All variables of the body count as masked: in the first iteration, the carry may be
    constant. The carry is endangered if it is in any iteration.
    """
    written = [v for e in body.equations for v in e.outvars]
    masked = frozenset(filter(is_inexact, (*body.inputs, *written)))
    num_constants, num_carry = compat.arity(equation)
    flags = [v in endangered for v in equation.outvars]
    while True:
        results = [v for v, flag in zip(body.outputs, flags, strict=True) if flag]
        found = _propagated_backwards(body, masked, results)
        reached = [v in found.endangered for v in body.inputs]
        carried = reached[num_constants : num_constants + num_carry]
        grown = [a or b for a, b in zip(flags, carried, strict=False)]
        if grown == flags[:num_carry]:
            break
        flags[:num_carry] = grown
    pairs = zip(equation.invars, reached, strict=True)
    return found, [v for v, flag in pairs if flag and is_variable(v)]
