"""Tables of primitives, by name, and the functions that add to them.

jax differentiates operations that are in none of the tables. So a correct entry makes
the engine faster and does not change a result.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from partnewton.engines.adjoint.op import Apply, OpRule
from partnewton.engines.compat import Equation

__all__ = [
    "TABLES",
    "definition_of",
    "register_elementwise",
    "register_linear",
    "register_piecewise_constant",
    "register_piecewise_linear",
    "registered_rule",
    "rule",
]

# Whether a rule applies to an equation, given the positions of its active operands.
When = Callable[[Equation, Collection[int]], bool]


class Tables(NamedTuple):
    """What is declared about primitives, by their names."""

    linear: dict[str, Collection[int] | None]  # the positions of operands; None for all
    piecewise_linear: set[str]
    piecewise_constant: set[str]
    elementwise: dict[str, str | None]  # the value of `singular`
    rules: dict[str, list[tuple[OpRule, When | None]]]  # the last one first


TABLES = Tables({}, set(), set(), {}, {})


def register_linear(*names: str, operands: Collection[int] | None = None) -> None:
    """Declares that primitives are linear in some of their operands jointly.

    The operation itself is applied to the rows of the tangents, and has no terms.

    Args:
      names: the names of the primitives.
      operands: the positions of the operands in which they are linear while the other
        operands are constant; by default all.

    Example:
      >>> register_linear("fft")
      >>> register_linear("div", operands=(0,))  # x / 2, but not 2 / x
    """
    TABLES.linear.update(dict.fromkeys(_checked(names), operands))


def register_piecewise_linear(*names: str) -> None:
    """Declares that primitives are piecewise linear functions of real operands.

    Args:
      names: the names of the primitives.

    Example:
      >>> register_piecewise_linear("max", "sort")
    """
    TABLES.piecewise_linear.update(_checked(names))


def register_piecewise_constant(*names: str) -> None:
    """Declares that primitives are piecewise constant functions of real operands.

    Args:
      names: the names of the primitives.

    Example:
      >>> register_piecewise_constant("floor", "sign")
    """
    TABLES.piecewise_constant.update(_checked(names))


def register_elementwise(*names: str, singular: str | None = None) -> None:
    """Declares that an entry of the result depends on the same entry of the operands.

    Derivatives of an elementwise operation are arrays of the shape of its result.
    Consecutive elementwise equations of one variable become a single operation.

    Args:
      names: the names of the primitives.
      singular: where a derivative of any order is infinite: None for nowhere, "zero"
        for where the operand, or a divisor, is zero, "elsewhere" for other numbers.

    Example:
      >>> register_elementwise("tanh", "exp")
      >>> register_elementwise("sqrt", singular="zero")
    """
    if singular not in (None, "zero", "elsewhere"):
        choices = 'None, "zero" or "elsewhere"'
        raise ValueError(f"singular must be {choices}, got {singular!r}.")
    TABLES.elementwise.update(dict.fromkeys(_checked(names), singular))


def rule(
    *names: str, when: When | None = None, is_curved: bool = True
) -> Callable[[Apply], Apply]:
    """Registers a function as the rule of primitives.

    The engine calls ``function(op, primals, cotangents, jets, request)`` when it traces
    a summary; see :class:`~partnewton.engines.Apply`. If several rules apply
    to an operation, the one that was registered last is used; a registered rule takes
    precedence over those of the engine. If a rule raises an exception other than a
    `NameError`, there is a warning, and jax differentiates the operation.

    Args:
      names: the names of the primitives.
      when: whether the rule applies, as a function of an equation and of the positions
        of its active operands; by default it always applies.
      is_curved: whether the rule returns terms, for which it needs the cotangents.

    Returns:
      A decorator that returns the function unchanged.

    Example:
      >>> from partnewton.engines import Jet, Terms, push
      >>> def doubled(places):
      ...     return lambda row: [2 * row]
      >>> @rule("double", is_curved=False)
      ... def double_rule(op, primals, cotangents, jets, request):
      ...     first, second = (push(doubled, [x]) for x in jets[0])
      ...     return [Jet(first[0], second and second[0])], Terms()
    """
    _checked(names)

    def register(apply: Apply) -> Apply:
        if not callable(apply):
            raise TypeError(f"A rule is a function, got {type(apply).__name__}.")
        inner = definition_of(apply)
        rule_name = getattr(inner, "__name__", type(inner).__name__)
        new = OpRule(rule_name, apply, is_curved, is_registered=True)
        for name in names:
            TABLES.rules.setdefault(name, []).insert(0, (new, when))
        return apply

    return register


def registered_rule(equation: Equation, active: Collection[int]) -> OpRule | None:
    """The rule that was registered for an equation with some active operands."""
    for found, when in TABLES.rules.get(equation.primitive.name, []):
        if when is None or when(equation, active):
            return found
    return None


def definition_of(function: Callable) -> Callable:
    """The function that a decorated function or a `functools.partial` calls."""
    while True:
        inner = inspect.unwrap(function)
        if isinstance(inner, functools.partial):
            inner = inner.func
        if inner is function:
            return function
        function = inner


def _checked(names: Sequence[str]) -> Sequence[str]:
    for x in names:
        if not isinstance(x, str):
            raise TypeError(
                f"A primitive is registered by its name, a string, got {x!r}."
            )
    return names
