"""Tables of primitives, by name, and the functions that add to them.

jax differentiates operations that are in none of the tables. So a correct entry makes
the engine faster and does not change a result.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.op import Apply, Rule
from partnewton.engines.compat import Equation, Variable

__all__ = [
    "custom_rule",
    "has_power",
    "is_affine",
    "is_differentiable",
    "is_elementwise",
    "is_known",
    "is_linear",
    "is_piecewise_linear",
    "is_singular",
    "may_mask",
    "register_elementwise",
    "register_linear",
    "register_piecewise_constant",
    "register_piecewise_linear",
    "rule",
]

_LINEAR: dict[str, Collection[int] | None] = {}  # in which operands; None for all
_PIECEWISE_LINEAR: set[str] = set()
_PIECEWISE_CONSTANT: set[str] = set()
_ELEMENTWISE: dict[str, str | None] = {}  # where a derivative is infinite


class _Custom(NamedTuple):
    rule: Rule
    when: Callable[[Equation, Collection[int]], bool]


_CUSTOM: dict[str, list[_Custom]] = {}


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
    _LINEAR.update(dict.fromkeys(_checked(names), operands))


def register_piecewise_linear(*names: str) -> None:
    """Declares that primitives are linear in real operands, almost everywhere.

    Args:
      names: the names of the primitives.

    Example:
      >>> register_piecewise_linear("max", "sort")
    """
    _PIECEWISE_LINEAR.update(_checked(names))


def register_piecewise_constant(*names: str) -> None:
    """Declares that primitives are constant in real operands, almost everywhere.

    Args:
      names: the names of the primitives.

    Example:
      >>> register_piecewise_constant("floor", "sign")
    """
    _PIECEWISE_CONSTANT.update(_checked(names))


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
        raise ValueError(
            f'singular must be None, "zero" or "elsewhere", got {singular!r}.'
        )
    _ELEMENTWISE.update(dict.fromkeys(_checked(names), singular))


def rule(
    *names: str,
    when: Callable[[Equation, Collection[int]], bool] | None = None,
    is_curved: bool = True,
) -> Callable[[Apply], Apply]:
    """Registers a function as the rule of primitives.

    The engine calls ``function(op, primals, cotangents, jets, request)`` when it traces
    a summary; see :class:`~partnewton.engines.Apply`. If several rules apply
    to an operation, the one that was registered last is used.

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
        new = Rule(apply.__name__, apply, is_curved)
        for name in names:
            applies = when or (lambda equation, active: True)
            _CUSTOM.setdefault(name, []).insert(0, _Custom(new, applies))
        return apply

    return register


def _checked(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"Primitives are registered by their names, strings, got {name!r}."
            )
    return names


# --- What is known of an equation ----------------------------------------------------


def custom_rule(equation: Equation, active: Collection[int]) -> Rule | None:
    """The rule that was registered for an equation with some active operands."""
    for entry in _CUSTOM.get(equation.primitive.name, []):
        if entry.when(equation, active):
            return entry.rule
    return None


def is_differentiable(equation: Equation) -> bool:
    """Whether an operation may have a nonzero derivative."""
    name = equation.primitive.name
    is_constant = name in _PIECEWISE_CONSTANT and _is_real(equation)
    return name != "stop_gradient" and not is_constant


def is_linear(equation: Equation, active: Collection[int]) -> bool:
    """Whether an operation is linear in the operands at the places `active`."""
    name = equation.primitive.name
    if is_bilinear(equation):
        return len(active) <= 1
    if name not in _LINEAR:
        return not active
    operands = _LINEAR[name]
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
    operands = _LINEAR[name]
    return any(
        (operands is None or n in operands) and n not in active
        for n, atom in enumerate(equation.invars)
        if _is_inexact(atom)
    )


def is_piecewise_linear(equation: Equation) -> bool:
    """Whether an operation is linear in all operands, almost everywhere."""
    return equation.primitive.name in _PIECEWISE_LINEAR and _is_real(equation)


def is_elementwise(equation: Equation) -> bool:
    """Whether each entry of the result depends on the same entry of the operands."""
    if equation.effects:
        return False
    if equation.primitive is primitives.custom_jvp_call_p:
        inside = equation.params["call_jaxpr"]
    else:
        inside = compat.inlined(equation)
    if inside is None:
        return equation.primitive.name in _ELEMENTWISE
    return all(map(is_elementwise, compat.open_jaxpr(inside).eqns))


def is_known(equation: Equation) -> bool:
    """Whether an operation is in a table, or consists of such operations."""
    name = equation.primitive.name
    return (
        is_elementwise(equation)
        or is_bilinear(equation)
        or name in _LINEAR
        or name in _PIECEWISE_LINEAR
    )


# --- Masks, and derivatives that are infinite ----------------------------------------

# Operations with zero derivatives between some entries, besides those that are
# piecewise linear or unknown. They may mask a cotangent that is not finite.
_MASKING = frozenset(
    [
        "concatenate",
        "dynamic_update_slice",
        "gather",
        "pad",
        "scatter-add",
        "select_n",
        "stack",
    ]
)


def may_mask(equation: Equation) -> bool:
    """Whether entries of the result may be constant although the operands are not."""
    name = equation.primitive.name
    if name in ("concatenate", "pad", "stack"):
        return not all(
            _is_inexact(atom) and is_variable(atom) for atom in equation.invars
        )
    is_plain = name in _LINEAR or is_bilinear(equation) or name in _ELEMENTWISE
    return name in _MASKING or name in _PIECEWISE_LINEAR or not is_plain


def is_singular(equation: Equation, positive: Collection[Variable] = ()) -> bool:
    """Whether an elementwise function has an infinite derivative at some number.

    Args:
      equation: the function.
      positive: the variables that are greater than zero.
    """
    return any(
        _ELEMENTWISE.get(e.primitive.name) and not _is_kept_away(e, positive)
        for e in _elementary(equation)
    )


def has_power(equation: Equation) -> bool:
    """Whether an elementwise function contains a non-integer power."""
    return any(e.primitive.name == "pow" for e in _elementary(equation))


def _elementary(equation: Equation) -> list[Equation]:
    """The equations inside an equation, if it is a `custom_jvp`, or the equation."""
    if equation.primitive is not primitives.custom_jvp_call_p:
        return [equation]
    inside = compat.open_jaxpr(equation.params["call_jaxpr"])
    return [e for inner in inside.eqns for e in _elementary_or_inlined(inner)]


def _elementary_or_inlined(equation: Equation) -> list[Equation]:
    inside = compat.inlined(equation)
    if inside is None:
        return _elementary(equation)
    inner = compat.open_jaxpr(inside).eqns
    return [e for x in inner for e in _elementary_or_inlined(x)]


def _is_kept_away(equation: Equation, positive: Collection[Variable]) -> bool:
    """Whether the operands exclude the point with the infinite derivative."""
    name, read = equation.primitive.name, equation.invars
    if name == "integer_pow" and equation.params["y"] >= 0:
        return True
    if _ELEMENTWISE[name] != "zero":
        return False
    atom = read[1] if name == "div" else read[0]
    return atom in positive if is_variable(atom) else name == "div"


def _is_inexact(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, np.inexact)


def _is_real(equation: Equation) -> bool:
    return not any(
        jnp.issubdtype(atom.aval.dtype, np.complexfloating)
        for atom in (*equation.invars, *equation.outvars)
    )
