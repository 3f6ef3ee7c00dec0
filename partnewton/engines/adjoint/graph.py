"""The flattened jaxpr of a loss, and which of its variables are active."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import gensym, primitives

from partnewton.engines import compat
from partnewton.engines.adjoint import dataflow, lowerings, properties
from partnewton.engines.adjoint.dataflow import is_inexact, is_variable
from partnewton.engines.compat import Equation, Variable

__all__ = [
    "BranchPoint",
    "Graph",
    "active_in_loop",
    "active_variables",
    "branch_point_of",
    "depends_on",
    "flattened",
]

_LARGE_BRANCH = 10  # equations: with fewer, a `cond` is one operation


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A jaxpr in which calls of other jaxprs are inlined.

    Attributes:
      constants: the variables of constants, and their values.
      inputs: the variables of the inputs.
      equations: the equations in order.
      outputs: variables or literals.
      bodies: the flattened body of each `scan`, by the position of its equation.
    """

    constants: dict[Variable, Any]
    inputs: list[Variable]
    equations: list[Equation]
    outputs: list[Any]
    bodies: dict[int, "Graph"]


def flattened(closed: Any, branches: dict[int, int] | None = None) -> Graph:
    """A closed jaxpr with all calls inlined, and with new variables.

    A `cond` is replaced by a branch if `branches` has the number of one for the
    position of its equation in the result.
    """
    branches = branches or {}
    fresh = gensym()
    flat = Graph({}, list(compat.open_jaxpr(closed).invars), [], [], {})

    def write_out(closed: Any, inputs: Sequence[Any]) -> list[Any]:
        jaxpr = compat.open_jaxpr(closed)
        names = dict(zip(jaxpr.invars, inputs, strict=True))
        for v, value in zip(jaxpr.constvars, compat.constants_of(closed), strict=True):
            names[v] = fresh(v.aval)
            flat.constants[names[v]] = value

        def renamed(atom: Any) -> Any:
            return names[atom] if is_variable(atom) else atom

        def named(atom: Any) -> Variable:
            """A variable for a literal, which may be the initial value of a carry."""
            if not is_variable(atom):
                literal, atom = atom, fresh(atom.aval)
                flat.constants[atom] = np.asarray(literal.val, atom.aval.dtype)
            return atom

        for equation in jaxpr.eqns:
            inputs = [renamed(atom) for atom in equation.invars]
            called = compat.called_jaxpr(equation) or lowerings.in_order(equation)
            if equation.primitive is primitives.cond_p:
                taken = branches.get(len(flat.equations))
                if taken is not None:
                    called, inputs = equation.params["branches"][taken], inputs[1:]
            if called is None:
                outputs = [fresh(v.aval) for v in equation.outvars]
                if equation.primitive is primitives.scan_p:
                    inputs = [named(atom) for atom in inputs]
                    body = flattened(equation.params["jaxpr"])
                    flat.bodies[len(flat.equations)] = body
                flat.equations.append(equation.replace(invars=inputs, outvars=outputs))
            else:
                outputs = write_out(called, inputs)
            names.update(zip(equation.outvars, outputs, strict=True))
        return [renamed(atom) for atom in jaxpr.outvars]

    flat.outputs.extend(write_out(closed, flat.inputs))
    return flat


def active_variables(flat: Graph, inputs: Iterable[Variable]) -> set[Variable]:
    """The variables whose derivative with respect to some inputs may be nonzero."""
    active = {v for v in inputs if is_inexact(v)}
    for i, equation in enumerate(flat.equations):
        read = [v for v in dataflow.operands(equation) if v in active]
        if not read or not properties.is_differentiable(equation):
            continue
        active.update(dataflow.references(equation))
        written = equation.outvars
        if i in flat.bodies:
            flags = [is_variable(v) and v in active for v in equation.invars]
            _, flags = active_in_loop(equation, flat.bodies[i], flags)
            written = itertools.compress(written, flags)
        active.update(filter(is_inexact, written))
    return active


def active_in_loop(
    equation: Equation, body: Graph, flags: Sequence[bool]
) -> tuple[list[bool], list[bool]]:
    """Which inputs and outputs of the body of a `scan` are active, in any iteration."""
    num_constants, num_carry = compat.arity(equation)
    flags = list(flags)
    while True:
        active = active_variables(body, itertools.compress(body.inputs, flags))
        outputs = [is_variable(v) and v in active for v in body.outputs]
        carried = flags[num_constants : num_constants + num_carry]
        grown = [a or b for a, b in zip(carried, outputs[:num_carry], strict=True)]
        if grown == carried:
            return flags, outputs
        flags[num_constants : num_constants + num_carry] = grown


class BranchPoint(NamedTuple):
    """A `cond` that may contain most of a loss.

    Attributes:
      place: the position of its equation.
      branches: the numbers of the branches that can be selected.
      index: maps the inputs of the jaxpr to a position in `branches`, the selected one.
    """

    place: int
    branches: tuple[int, ...]
    index: Callable[..., jax.Array]


def branch_point_of(
    jaxpr: Any, branches: dict[int, int] | None = None
) -> BranchPoint | None:
    """The large `cond` that a loss depends on, if there is exactly one.

    With several, there would be a program for each combination of branches.
    """
    flat = flattened(jaxpr, branches)
    if any(equation.effects for equation in flat.equations):
        return None
    active = active_variables(flat, flat.inputs)
    found = [
        (place, equation)
        for place, equation in enumerate(flat.equations)
        if equation.primitive is primitives.cond_p
        and not active.isdisjoint(equation.outvars)
        and compat.num_equations(equation) >= _LARGE_BRANCH
    ]
    if len(found) != 1:
        return None
    ((place, equation),) = found
    chosen, count = equation.invars[0], len(equation.params["branches"])
    if not is_variable(chosen):
        number = int(np.clip(chosen.val, 0, count - 1))
        return BranchPoint(place, (number,), lambda *leaves: 0)
    needed = dataflow.needed(flat.equations[:place], [chosen], None)
    before = [e for e in flat.equations[:place] if not needed.isdisjoint(e.outvars)]
    function = compat.function_of(before, [*flat.constants, *flat.inputs], [chosen])

    def index(*leaves: jax.Array) -> jax.Array:
        return function(*flat.constants.values(), *leaves)[0]

    return BranchPoint(place, tuple(range(count)), index)


def depends_on(jaxpr: Any, place: int = 0) -> bool:
    """Whether the results of a closed jaxpr depend on an input, almost everywhere."""
    flat = flattened(jaxpr)
    active = active_variables(flat, [flat.inputs[place]])
    return not active.isdisjoint(filter(is_variable, flat.outputs))
