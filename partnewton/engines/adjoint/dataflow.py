"""What equations read and write, and which of them only jax itself can differentiate.

A mutable array, `jax.new_ref`, is read and written by each equation that has it among
its operands; equations with other effects, such as ordered callbacks, follow each other
as they do in the jaxpr.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import Literal, primitives

from partnewton.engines import compat
from partnewton.engines.compat import Equation, Variable

__all__ = [
    "awaited",
    "final_part",
    "has_other_effects",
    "has_own_rule",
    "is_opaque",
    "is_variable",
    "needed",
    "operands",
    "provided",
    "references",
    "values_of",
    "written",
]

# Calls whose derivative in reverse mode is given by somebody, true or not.
_REVERSE_RULES = (
    "custom_transpose_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "linear_call",
)


def is_variable(atom: Any) -> bool:
    """Whether it is a variable and not a literal."""
    return not isinstance(atom, Literal)


def values_of(atoms: Sequence[Any], values: dict[Variable, Any]) -> list[Any]:
    """The values of some variables and literals."""
    return [values[atom] if is_variable(atom) else atom.val for atom in atoms]


def operands(equation: Equation) -> list[Variable]:
    """The variables among the operands."""
    return [atom for atom in equation.invars if is_variable(atom)]


def references(equation: Equation) -> list[Variable]:
    """The mutable arrays among the operands and the results."""
    everything = (*operands(equation), *equation.outvars)
    return [v for v in everything if compat.is_reference(v)]


def has_other_effects(equation: Equation) -> bool:
    """Whether an equation has effects beside those on mutable arrays."""
    return bool(equation.effects) and not references(equation)


def written(equation: Equation) -> list[Variable]:
    """The results, and the mutable arrays among the operands."""
    return list(dict.fromkeys((*equation.outvars, *references(equation))))


def awaited(equation: Equation) -> list[Any]:
    """What an equation waits for: its operands, and the effects before its own."""
    return [*operands(equation), *(["effects"] if equation.effects else [])]


def provided(equation: Equation) -> list[Any]:
    """What others may wait for: what it writes, and its effects."""
    return [*written(equation), *(["effects"] if equation.effects else [])]


def needed(
    equations: Sequence[Equation],
    wanted: Iterable[Variable],
    among: Collection[Variable] | None = None,
) -> set[Variable]:
    """The variables that some others depend on, by way of variables in `among`."""
    found = {v for v in wanted if is_variable(v)}
    for equation in reversed(equations):
        if any(v in found for v in written(equation)):
            read = operands(equation)
            found.update(v for v in read if among is None or v in among)
    return found


def is_opaque(equation: Equation) -> bool:
    """Whether an equation is no local function that may be differentiated forwards.

    That is where a rule for reverse mode alone is in force, which need be no
    derivative, and where mutable arrays carry what is to be differentiated.
    """
    return has_own_rule(equation) or _has_reference(equation)


def has_own_rule(equation: Equation) -> bool:
    """Whether a rule for reverse mode alone is in force somewhere in an equation."""
    if equation.primitive.name in _REVERSE_RULES:
        return True
    if equation.primitive is primitives.custom_jvp_call_p:
        return False
    insides = core.jaxprs_in_params(equation.params)
    return any(
        has_own_rule(e) for inside in insides for e in compat.open_jaxpr(inside).eqns
    )


def _has_reference(equation: Equation) -> bool:
    if references(equation):
        return True
    insides = core.jaxprs_in_params(equation.params)
    return any(
        _has_reference(e) for inside in insides for e in compat.open_jaxpr(inside).eqns
    )


def final_part(
    equations: Sequence[Equation],
    value: Any,
    opaque: Collection[int],
) -> tuple[list[int], list[int], list[int]]:
    """The equations before, in and after the part that begins with an opaque one.

    The part in the middle is all that a value needs and that depends, in whatever way,
    on what an opaque equation writes. All equations that deal with one mutable array
    are on one side.

    Args:
      equations: all of them, in order.
      value: the variable that is computed.
      opaque: the places of the opaque equations.

    Returns:
      The places of the equations before, in and after it. All are before it if the
      value needs no opaque equation.
    """
    late = _closed(equations, opaque)
    if not late:
        return list(range(len(equations))), [], []
    wanted = needed(equations, [value])
    while True:
        inside = [i for i in late if any(v in wanted for v in written(equations[i]))]
        tied = {r for i in inside for r in references(equations[i])}
        if tied <= wanted:
            break
        wanted = needed(equations, wanted | tied)
    if not inside:
        return list(range(len(equations))), [], []
    chosen = set(inside)
    before = [i for i in range(len(equations)) if i not in late]
    return before, inside, [i for i in sorted(late) if i not in chosen]


def _closed(equations: Sequence[Equation], opaque: Collection[int]) -> list[int]:
    """The opaque equations and all that depend on them, mutable arrays included."""
    late, moved = set(opaque), set()
    while True:
        size, has_effects = len(late), False
        moved.update(r for i in late for r in references(equations[i]))
        for i, equation in enumerate(equations):
            touched = {*operands(equation), *references(equation)}
            follows = has_effects and has_other_effects(equation)
            if i in late or follows or not moved.isdisjoint(touched):
                late.add(i)
                moved.update(written(equation))
                has_effects |= has_other_effects(equation)
        if len(late) == size:
            return sorted(late)
