"""Builds the program of a loss from its jaxpr: operations, and their rules."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from partnewton.engines import compat
from partnewton.engines.adjoint import dataflow, properties
from partnewton.engines.adjoint.dataflow import is_inexact, is_variable
from partnewton.engines.adjoint.fusion import grouped, ordered
from partnewton.engines.adjoint.graph import (
    Graph,
    active_in_loop,
    active_variables,
    flattened,
)
from partnewton.engines.adjoint.op import Loop, Op, OpRule
from partnewton.engines.adjoint.primitives.bilinear import BILINEAR, is_product
from partnewton.engines.adjoint.primitives.elementwise import (
    ELEMENTWISE,
    is_real_function,
)
from partnewton.engines.adjoint.primitives.generic import GENERIC
from partnewton.engines.adjoint.primitives.linear import LINEAR, PIECEWISE_LINEAR
from partnewton.engines.adjoint.primitives.scan import SCAN
from partnewton.engines.adjoint.program import Program
from partnewton.engines.adjoint.registry import registered_rule
from partnewton.engines.adjoint.singularities import Singularities, singularities_of
from partnewton.engines.compat import Equation, Variable

__all__ = ["program_of"]


def program_of(
    jaxpr: Any, opaque: Collection[int] = (), branches: dict[int, int] | None = None
) -> tuple[Program, list[jax.Array]]:
    """The program of a loss, the first output of a closed jaxpr.

    All inputs of the jaxpr are active.

    Args:
      jaxpr: the closed jaxpr.
      opaque: the positions, in the flattened jaxpr, of equations that become part of
        the final step.
      branches: maps positions of `cond` equations to the branch that replaces them.

    Returns:
      A program whose inputs are constants followed by the inputs of the jaxpr, and the
      values of these constants.
    """
    flat = flattened(jaxpr, branches)
    active = active_variables(flat, flat.inputs)
    singularities = singularities_of(flat, active)
    needed = [n == 0 for n in range(len(flat.outputs))]
    program = _program_of_graph(flat, active, singularities, needed, opaque=opaque)
    return program, list(flat.constants.values())


def _program_of_graph(
    flat: Graph,
    active: Collection[Variable],
    singularities: Singularities,
    needed: Sequence[bool],
    num_fixed: int | None = None,
    opaque: Collection[int] = (),
) -> Program:
    """Gathers the equations of a flat jaxpr into operations.

    Args:
      flat: the jaxpr.
      active: the variables that depend on the parameters.
      singularities: where infinite derivatives may have to be masked.
      needed: for each output whether the loss depends on it.
      num_fixed: for the body of a loop, how many inputs do not change; else None.
      opaque: the places of equations that are left to jax, besides those that must be.
    """
    pairs = zip(flat.outputs, needed, strict=True)
    wanted = {v for v, flag in pairs if flag and is_variable(v)}
    relevant = dataflow.needed(flat.equations, wanted & active, active)
    is_body = num_fixed is not None
    before, final, after = list(range(len(flat.equations))), [], []
    if not is_body:
        left = [*opaque, *_opaque_places(flat, active)]
        before, final, after = dataflow.final_part(
            flat.equations, flat.outputs[0], left
        )
    groups = grouped(flat.equations, before, active, relevant, singularities)
    groups = ordered(groups, flat.equations)
    *parts, last, rest = _gathered(flat, [*groups, final, after])
    ops = tuple(_op_of(part, flat, active, relevant, singularities) for part in parts)
    all_inputs = (*flat.constants, *flat.inputs)
    fixed = all_inputs[: len(flat.constants) + num_fixed] if is_body else ()
    program = Program(all_inputs, tuple(flat.outputs), ops, fixed, is_body)
    if not final:
        return program
    return dataclasses.replace(
        program,
        final=_final_op(last, flat.outputs[0], relevant),
        rest=(rest.constant_op(),) if after else (),
    )


def _opaque_places(flat: Graph, active: Collection[Variable]) -> list[int]:
    """The positions of the equations that belong to the final step."""
    return [
        i
        for i, equation in enumerate(flat.equations)
        if not active.isdisjoint(dataflow.operands(equation))
        and dataflow.is_opaque(equation)
    ]


class _Group(NamedTuple):
    """Equations that become one operation.

    Attributes:
      equations: the equations.
      inputs: what they read and do not write themselves, each once.
      outputs: what they write and others read.
      places: where they are in the flat jaxpr.
    """

    equations: tuple[Equation, ...]
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    places: tuple[int, ...]

    def constant_op(self) -> Op:
        """An operation without active outputs."""
        return Op(None, self.equations, self.inputs, self.outputs, places=self.places)


def _gathered(flat: Graph, groups: Sequence[Sequence[int]]) -> list[_Group]:
    """Each group of equations, with what it reads and writes."""
    readers = _reading_groups(flat, groups)
    found = []
    for n, group in enumerate(groups):
        equations = tuple(flat.equations[i] for i in group)
        results = [v for e in equations for v in e.outvars]
        written = tuple(v for v in results if readers.get(v, set()) - {n})
        found.append(
            _Group(equations, tuple(_outer_variables(equations)), written, tuple(group))
        )
    return found


def _reading_groups(
    flat: Graph, groups: Sequence[Sequence[int]]
) -> dict[Variable, set[int]]:
    """The groups that read each variable; -1 stands for an output."""
    readers: dict[Variable, set[int]] = {}
    for v in filter(is_variable, flat.outputs):
        readers[v] = {-1}
    for n, group in enumerate(groups):
        for i in group:
            for v in dataflow.operands(flat.equations[i]):
                readers.setdefault(v, set()).add(n)
    return readers


def _outer_variables(equations: Sequence[Equation]) -> list[Variable]:
    """The variables that equations read from outside, each once."""
    written = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(
        v for equation in equations for v in dataflow.operands(equation)
    )
    return [v for v in read if v not in written]


def _op_of(
    group: _Group,
    flat: Graph,
    active: Collection[Variable],
    relevant: Collection[Variable],
    singularities: Singularities,
) -> Op:
    """A group of equations as an operation, with its rule."""
    equations, inputs, outputs, places = group
    active_inputs = tuple(i for i, v in enumerate(inputs) if v in active)
    active_outputs = tuple(i for i, v in enumerate(outputs) if v in relevant)
    if not active_inputs or not active_outputs:
        return group.constant_op()
    if places[0] in flat.bodies:
        body = flat.bodies[places[0]], singularities.bodies[places[0]]
        op = _scan_op(equations[0], *body, active, relevant)
        return dataclasses.replace(op, places=places)
    read = [inputs[i] for i in active_inputs]
    rule = _rule_of(equations, read, active)
    return Op(
        rule,
        equations,
        inputs,
        outputs,
        active_inputs,
        active_outputs,
        is_guarded=singularities.is_guarded(rule is ELEMENTWISE, equations, read),
        has_mask=singularities.has_mask(equations),
        places=places,
    )


def _rule_of(
    equations: Sequence[Equation],
    active_inputs: Sequence[Variable],
    active: Collection[Variable],
) -> OpRule:
    """The rule of an operation that consists of some equations."""
    places = [dataflow.active_places(e, active) for e in equations]
    if len(equations) == 1:
        (equation,), (active_operands,) = equations, places
        registered = registered_rule(equation, active_operands)
        if registered is not None:
            return registered
        if is_product(equation, active_operands):
            return BILINEAR
        if properties.is_linear(equation, active_operands):
            is_affine = properties.is_affine(equation, active_operands)
            return PIECEWISE_LINEAR if is_affine else LINEAR
    if all(
        properties.is_linear(e, some) or properties.is_piecewise_linear(e)
        for e, some in zip(equations, places, strict=True)
    ):
        return PIECEWISE_LINEAR
    if is_real_function(equations, active_inputs, active):
        return ELEMENTWISE
    return GENERIC


def _scan_op(
    equation: Equation,
    flat: Graph,
    singularities: Singularities,
    active: Collection[Variable],
    relevant: Collection[Variable],
) -> Op:
    """The operation of a `scan`, with the inputs and outputs of the equation."""
    num_constants, num_carry = compat.arity(equation)
    flags = [is_variable(v) and v in active for v in equation.invars]
    flags, outputs = active_in_loop(equation, flat, flags)
    needed = [
        active_output and (n < num_carry or v in relevant)
        for n, (v, active_output) in enumerate(
            zip(equation.outvars, outputs, strict=True)
        )
    ]
    read = [v for v, flag in zip(flat.inputs, flags, strict=True) if flag]
    inside = active_variables(flat, read)
    loop = Loop(
        body=_program_of_graph(flat, inside, singularities, needed, num_constants),
        closed=tuple(flat.constants.values()),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
        num_constants=num_constants,
        num_carry=num_carry,
    )
    return Op(
        SCAN,
        (equation,),
        tuple(equation.invars),
        tuple(equation.outvars),
        tuple(n for n, flag in enumerate(flags) if flag),
        tuple(n for n, flag in enumerate(needed) if flag),
        loop,
    )


def _final_op(group: _Group, value: Variable, relevant: Collection[Variable]) -> Op:
    """The operation of the final step, whose first output is the loss."""
    outputs = (value, *(v for v in group.outputs if v is not value))
    inputs = enumerate(group.inputs)
    active_inputs = tuple(i for i, v in inputs if v in relevant and is_inexact(v))
    return dataclasses.replace(
        group.constant_op(), outputs=outputs, active_inputs=active_inputs
    )
