"""Dependencies between equations, and the equations that belong to the final step.

A mutable array, `jax.new_ref`, is read and written by each equation that has it among
its operands. Equations with other effects, such as ordered callbacks, keep their order.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import Literal, primitives

from partnewton.engines import compat
from partnewton.engines.compat import Equation, Variable

__all__ = [
    "active_places",
    "awaited",
    "final_part",
    "has_other_effects",
    "is_inexact",
    "is_opaque",
    "is_variable",
    "modified",
    "needed",
    "operands",
    "provided",
    "references",
    "values_of",
]

# Calls with a custom rule for reverse mode, which need not be the derivative.
_REVERSE_RULES = (
    "custom_transpose_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "linear_call",
)


def is_variable(atom: Any) -> bool:
    """Whether it is a variable and not a literal."""
    return not isinstance(atom, Literal)


def is_inexact(atom: Any) -> bool:
    """Whether a variable or literal is real or complex."""
    return jnp.issubdtype(atom.aval.dtype, np.inexact)


def values_of(atoms: Sequence[Any], values: dict[Variable, Any]) -> list[Any]:
    """The values of some variables and literals."""
    return [values[atom] if is_variable(atom) else atom.val for atom in atoms]


def operands(equation: Equation) -> list[Variable]:
    """The variables among the operands."""
    return [atom for atom in equation.invars if is_variable(atom)]


def active_places(equation: Equation, active: Collection[Variable]) -> list[int]:
    """The positions of the active operands."""
    pairs = enumerate(equation.invars)
    return [n for n, atom in pairs if is_variable(atom) and atom in active]


def references(equation: Equation) -> list[Variable]:
    """The mutable arrays among the operands and the results."""
    everything = (*operands(equation), *equation.outvars)
    return [v for v in everything if compat.is_reference(v)]


def has_other_effects(equation: Equation) -> bool:
    """Whether an equation has effects other than those on mutable arrays."""
    return bool(equation.effects) and not references(equation)


def modified(equation: Equation) -> list[Variable]:
    """The variables that it writes: results, and mutable arrays among the operands."""
    return list(dict.fromkeys((*equation.outvars, *references(equation))))


def awaited(equation: Equation) -> list[Any]:
    """What an equation depends on: its operands, and the effects before its own."""
    return [*operands(equation), *(["effects"] if equation.effects else [])]


def provided(equation: Equation) -> list[Any]:
    """What others may depend on: the variables that it writes, and its effects."""
    return [*modified(equation), *(["effects"] if equation.effects else [])]


def needed(
    equations: Sequence[Equation],
    wanted: Iterable[Variable],
    among: Collection[Variable] | None = None,
) -> set[Variable]:
    """The variables on which some others depend, through variables in `among`."""
    found = {v for v in wanted if is_variable(v)}
    for equation in reversed(equations):
        if any(v in found for v in modified(equation)):
            read = operands(equation)
            found.update(v for v in read if among is None or v in among)
    return found


def is_opaque(equation: Equation) -> bool:
    """Whether an equation must not be differentiated by itself.

    These are equations with a custom rule for reverse mode only, which need not be a
    derivative, and equations with mutable arrays.
    """
    return _has_own_rule(equation) or _has_reference(equation)


def _has_own_rule(equation: Equation) -> bool:
    if equation.primitive is primitives.custom_jvp_call_p:
        return False
    is_rule = equation.primitive.name in _REVERSE_RULES
    return is_rule or any(map(_has_own_rule, _inside(equation)))


def _has_reference(equation: Equation) -> bool:
    return bool(references(equation)) or any(map(_has_reference, _inside(equation)))


def _inside(equation: Equation) -> list[Equation]:
    insides = core.jaxprs_in_params(equation.params)
    return [e for inside in insides for e in compat.open_jaxpr(inside).eqns]


def final_part(
    equations: Sequence[Equation],
    value: Any,
    opaque: Collection[int],
) -> tuple[list[int], list[int], list[int]]:
    """The equations before, in and after the final step.

    The final step consists of the equations on which a value depends and that depend on
    the results of an opaque equation. All equations of a mutable array are in the same
    part.

    Args:
      equations: all of them, in order.
      value: the variable, which is the loss.
      opaque: the positions of the opaque equations.

    Returns:
      The positions of the equations before, in and after it. All are before it if the
      value depends on no opaque equation.
    """
    late = _closed(equations, opaque)
    if not late:
        return list(range(len(equations))), [], []
    wanted = needed(equations, [value])
    while True:
        inside = [i for i in late if any(v in wanted for v in modified(equations[i]))]
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
    """The opaque equations and all that depend on them, also by mutable arrays."""
    late, moved = set(opaque), set()
    while True:
        size, has_effects = len(late), False
        moved.update(r for i in late for r in references(equations[i]))
        for i, equation in enumerate(equations):
            touched = {*operands(equation), *references(equation)}
            follows = has_effects and has_other_effects(equation)
            if i in late or follows or not moved.isdisjoint(touched):
                late.add(i)
                moved.update(modified(equation))
                has_effects |= has_other_effects(equation)
        if len(late) == size:
            return sorted(late)
