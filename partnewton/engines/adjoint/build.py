"""Builds the program of a loss from its jaxpr: operations, and their rules."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax

from partnewton.engines import compat
from partnewton.engines.adjoint import dataflow, registry
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.fusion import grouped, ordered
from partnewton.engines.adjoint.graph import (
    Graph,
    active_in_loop,
    active_variables,
    flattened,
    is_inexact,
    is_scan,
)
from partnewton.engines.adjoint.op import Loop, Op, Rule
from partnewton.engines.adjoint.primitives import (
    ELEMENTWISE,
    GENERIC,
    LINEAR,
    PIECEWISE_LINEAR,
    SCAN,
    is_real_function,
)
from partnewton.engines.adjoint.program import Program
from partnewton.engines.adjoint.singularities import singularities_of
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
    needed = [n == 0 for n in range(len(flat.outputs))]
    program = _program(flat, flat.inputs, needed, opaque=opaque)
    return program, list(flat.constants.values())


def _program(
    flat: Graph,
    moving: Collection[Variable],
    needed: Sequence[bool],
    num_fixed: int | None = None,
    opaque: Collection[int] = (),
) -> Program:
    """Groups the equations of a flattened jaxpr into operations.

    Args:
      flat: the jaxpr.
      moving: the active inputs.
      needed: for each output whether the loss depends on it.
      num_fixed: for the body of a loop, the number of inputs that are the same in each
        iteration; None for a loss.
      opaque: the positions of equations that become part of the final step, besides
        those that always do.
    """
    active = active_variables(flat, moving)
    pairs = zip(flat.outputs, needed, strict=True)
    wanted = {v for v, flag in pairs if flag and is_variable(v)}
    relevant = dataflow.needed(flat.equations, wanted & active, active)
    first, last, rest = list(range(len(flat.equations))), [], []
    if num_fixed is None:
        left = [
            i
            for i, equation in enumerate(flat.equations)
            if i in opaque
            or (
                not active.isdisjoint(dataflow.operands(equation))
                and dataflow.is_opaque(equation)
            )
        ]
        first, last, rest = dataflow.final_part(flat.equations, flat.outputs[0], left)
    outside = ((), ()) if num_fixed is None else (moving, flat.outputs)
    singularities = singularities_of(flat.equations, active, *outside)
    groups = grouped(flat.equations, first, active, relevant, singularities)
    groups = ordered(groups, flat.equations)
    readers = _readers(flat, [*groups, last, rest])

    def gathered(n: int, group: Sequence[int]) -> tuple[tuple, list, list]:
        """The equations of a group, what they read, and what is read of them."""
        equations = tuple(flat.equations[i] for i in group)
        results = [v for e in equations for v in e.outvars]
        others = [v for v in results if readers.get(v, set()) - {n}]
        return equations, _read(equations), others

    ops = []
    for n, group in enumerate(groups):
        equations, read, written = gathered(n, group)
        active_inputs = [i for i, v in enumerate(read) if v in active]
        active_outputs = [i for i, v in enumerate(written) if v in relevant]
        common = {"places": tuple(group)}
        if not active_inputs or not active_outputs:
            op = Op(None, equations, tuple(read), tuple(written), **common)
            ops.append(op)
            continue
        if is_scan(equations[0]):
            # All inputs and outputs are kept, even if repeated or unused.
            (i,) = group
            op = _scan_op(equations[0], flat.bodies[i], active, relevant)
            ops.append(dataclasses.replace(op, **common))
            continue
        rule = _rule(equations, [read[i] for i in active_inputs], active)
        ops.append(
            Op(
                rule,
                equations,
                tuple(read),
                tuple(written),
                tuple(active_inputs),
                tuple(active_outputs),
                is_guarded=singularities.is_guarded(
                    rule is ELEMENTWISE,
                    equations,
                    [read[i] for i in active_inputs],
                ),
                has_mask=singularities.has_mask(equations),
                **common,
            )
        )
    inputs = (*flat.constants, *flat.inputs)
    fixed = inputs[: len(flat.constants) + num_fixed] if num_fixed is not None else ()
    program = Program(inputs, tuple(flat.outputs), tuple(ops), fixed)
    if not last:
        return program
    equations, read, written = gathered(len(groups), last)
    value = flat.outputs[0]
    final = Op(
        None,
        equations,
        tuple(read),
        (value, *(v for v in written if v is not value)),
        tuple(i for i, v in enumerate(read) if v in relevant and is_inexact(v)),
        places=tuple(last),
    )
    equations, read, written = gathered(len(groups) + 1, rest)
    behind = Op(None, equations, tuple(read), tuple(written), places=tuple(rest))
    return dataclasses.replace(program, final=final, rest=(behind,) if rest else ())


def _readers(flat: Graph, groups: Sequence[Sequence[int]]) -> dict[Variable, set[int]]:
    """The groups that read each variable; -1 stands for an output."""
    readers: dict[Variable, set[int]] = {}
    for v in filter(is_variable, flat.outputs):
        readers[v] = {-1}
    for n, group in enumerate(groups):
        for i in group:
            for v in dataflow.operands(flat.equations[i]):
                readers.setdefault(v, set()).add(n)
    return readers


def _read(equations: Sequence[Equation]) -> list[Variable]:
    """The variables that equations read from outside, each once."""
    written = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(
        v for equation in equations for v in dataflow.operands(equation)
    )
    return [v for v in read if v not in written]


def _rule(
    equations: Sequence[Equation],
    active_inputs: Sequence[Variable],
    active: Collection[Variable],
) -> Rule:
    """The rule of an operation that consists of some equations."""
    places = [
        [n for n, v in enumerate(e.invars) if is_variable(v) and v in active]
        for e in equations
    ]
    if len(equations) == 1:
        (equation,), (active_places,) = equations, places
        custom = registry.custom_rule(equation, active_places)
        if custom is not None:
            return custom
        if registry.is_linear(equation, active_places):
            is_affine = registry.is_affine(equation, active_places)
            return PIECEWISE_LINEAR if is_affine else LINEAR
    if all(
        registry.is_linear(e, some) or registry.is_piecewise_linear(e)
        for e, some in zip(equations, places, strict=True)
    ):
        return PIECEWISE_LINEAR
    if is_real_function(equations, active_inputs, active):
        return ELEMENTWISE
    return GENERIC


def _scan_op(
    equation: Equation,
    flat: Graph,
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
    moving = [v for v, flag in zip(flat.inputs, flags, strict=True) if flag]
    loop = Loop(
        body=_program(flat, moving, needed, num_constants),
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
