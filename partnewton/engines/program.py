"""A loss as a sequence of steps: what the adjoint engine goes through, three times.

The jaxpr of the loss is flattened, and its equations are gathered into steps. Most
steps are one operation. A run of elementwise operations on one variable, such as a
gelu, is one step, with one Gram product at its input. A `scan` is a step with a program
of its own.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import gensym, primitives

from partnewton.engines import (
    convolutions,
    dataflow,
    operations,
    products,
    reductions,
    versions,
)
from partnewton.engines.dataflow import is_variable
from partnewton.engines.singularities import Singularities, singularities_of
from partnewton.engines.versions import Equation, Jaxpr, Variable

__all__ = ["Loop", "Program", "Record", "Step", "program_of", "values_of", "varies"]

# The kinds of steps whose second derivatives vanish.
_STRAIGHT = ("affine", "inert", "linear", "piecewise_linear")

_LARGE_BRANCH = 10  # equations: with fewer, a `cond` is one step

# Of an elementwise function; its partial derivatives are as many as there are pairs and
# triples of inputs.
_MOST_INPUTS = 3

Taps = dict[int, Any]  # step number -> a list of arrays, or the taps of a loop


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A function between some variables.

    Attributes:
      kind: which rule of :mod:`partnewton.engines.rules` passes on its tangents, or
        "inert", where there is nothing to be passed on.
      equations: what it consists of.
      inputs: the variables that it reads, each once.
      outputs: the variables that it writes and others read.
      active_inputs: the places of the inputs that move with the parameters.
      active_outputs: the places of the outputs that do, and that the loss depends on.
      loop: what is inside of a `scan`.
      is_guarded: whether a derivative or an adjoint may be infinite at an entry which
        no subset moves, so that it must not count there.
      has_mask: whether an adjoint may be infinite where the derivatives are zero.
      places: where the equations are in the flattened jaxpr.
    """

    kind: str
    equations: tuple[Equation, ...]
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    active_inputs: tuple[int, ...] = ()
    active_outputs: tuple[int, ...] = ()
    loop: "Loop | None" = None
    is_guarded: bool = False
    has_mask: bool = False
    places: tuple[int, ...] = ()

    @functools.cached_property
    def function(self) -> Callable[..., list[jax.Array]]:
        """From the values of all inputs to those of all outputs."""
        return versions.function_of(self.equations, self.inputs, self.outputs)

    @property
    def is_curved(self) -> bool:
        """Whether it adds to the derivatives of second order."""
        return self.kind not in _STRAIGHT

    @functools.cached_property
    def function_of_rows(self) -> Callable[..., list[jax.Array]]:
        """The same function, to be applied to many rows: see `takes_rows`."""
        return self._with(convolutions.of_rows, products.of_rows, reductions.of_rows)

    @property
    def takes_rows(self) -> bool:
        """Whether `function_of_rows` is of all rows at once; else it is of each."""
        return len(self.equations) == 1 and products.is_batched(self.equations[0])

    @functools.cached_property
    def function_to_be_transposed(self) -> Callable[..., list[jax.Array]]:
        """The same function, to be transposed where it is linear."""
        return self._with(convolutions.to_be_transposed)

    def _with(self, *faster: Callable[[Equation], Callable | None]) -> Callable:
        """The function by a faster way, if there is one for its only equation."""
        if len(self.equations) > 1:
            return self.function
        (equation,) = self.equations
        way = next(filter(None, (way_of(equation) for way_of in faster)), None)
        if way is None:
            return self.function

        def function(*inputs: jax.Array) -> list[jax.Array]:
            values = dict(zip(self.inputs, inputs, strict=True))
            return [way(*values_of(equation.invars, values))]

        return function

    def active(self, function: Callable, inputs: Sequence[jax.Array]) -> Callable:
        """One of the functions, from the active inputs to the active outputs alone.

        Args:
          function: one of those above.
          inputs: the values of all inputs.
        """

        def restricted(*active: jax.Array) -> list[jax.Array]:
            everything = list(inputs)
            for place, x in zip(self.active_inputs, active, strict=True):
                everything[place] = x
            outputs = function(*everything)
            return [outputs[place] for place in self.active_outputs]

        return restricted


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A `scan`: its body as a program from (closed, constants, carry, x) to (carry, y).

    Attributes:
      body: the program of one iteration.
      closed: the values of constants that the body has closed over.
      length, reverse, unroll: as for :func:`jax.lax.scan`.
      num_constants: how many inputs are the same in each iteration.
      num_carry: how many are carried from one to the next.
    """

    body: "Program"
    closed: tuple[Any, ...]
    length: int
    reverse: bool
    unroll: int
    num_constants: int
    num_carry: int

    def split(self, inputs: Sequence[Any]) -> tuple[list, list, list]:
        """The constants, the carry and the xs among some inputs."""
        c, n = self.num_constants, self.num_constants + self.num_carry
        return list(inputs[:c]), list(inputs[c:n]), list(inputs[n:])


@dataclasses.dataclass(frozen=True)
class Record:
    """The values that the steps of a program have met.

    Attributes:
      values: of the inputs of all steps through which tangents pass.
      loops: for each loop among the steps the record of its body, with an axis for the
        iterations in front of every array.
    """

    values: dict[Variable, jax.Array]
    loops: dict[int, "Record"]


jax.tree_util.register_pytree_node(
    Record,
    lambda record: ((list(record.values.values()), record.loops), tuple(record.values)),
    lambda variables, children: Record(
        dict(zip(variables, children[0], strict=True)), children[1]
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A sequence of steps.

    Attributes:
      inputs: the variables that it starts from.
      outputs: what it results in, variables or literals.
      steps: in an order in which they can be executed.
      fixed: the inputs that are the same each time, for the body of a loop.
      final: all from the first operation on that has to be differentiated by jax, as
        one function to the loss and to what else is asked for; None if there is none.
      rest: what is executed behind it, for its outputs or effects.
    """

    inputs: tuple[Variable, ...]
    outputs: tuple[Any, ...]
    steps: tuple[Step, ...]
    fixed: tuple[Variable, ...]
    final: Step | None = None
    rest: tuple[Step, ...] = ()

    @functools.cached_property
    def recorded(self) -> tuple[Variable, ...]:
        """The variables whose values a record holds."""
        steps = [step for step in self.steps if step.active_outputs]
        read = (v for step in steps for v in step.inputs if is_variable(v))
        return tuple(v for v in dict.fromkeys(read) if v not in self._invariant)

    @functools.cached_property
    def _invariant(self) -> frozenset[Variable]:
        """The variables that depend on fixed inputs alone: they need no record."""
        invariant = set(self.fixed)
        for step in self._invariant_steps:
            invariant.update(step.outputs)
        return frozenset(invariant)

    @functools.cached_property
    def _invariant_steps(self) -> tuple[Step, ...]:
        invariant, steps = set(self.fixed), []
        for step in self.steps:
            known = all(v in invariant for v in step.inputs if is_variable(v))
            effects = any(equation.effects for equation in step.equations)
            if self.fixed and known and not effects and not step.loop:
                invariant.update(step.outputs)
                steps.append(step)
        return tuple(steps)

    def moving(self) -> Record:
        """What of a record moves with the parameters, as a record of booleans."""
        active = {step.inputs[i] for step in self.steps for i in step.active_inputs}
        loops = {n: step.loop.body for n, step in enumerate(self.steps) if step.loop}
        return Record(
            {v: v in active for v in self.recorded},
            {n: body.moving() for n, body in loops.items()},
        )

    def invariants(self, fixed: Sequence[jax.Array]) -> dict[Variable, jax.Array]:
        """The values of all variables that depend on the fixed inputs alone."""
        values = dict(zip(self.fixed, fixed, strict=True))
        for step in self._invariant_steps:
            results = step.function(*values_of(step.inputs, values))
            values.update(zip(step.outputs, results, strict=True))
        return values

    def taps(self, leading: tuple[int, ...] = ()) -> Taps:
        """Zeros to be added to what the curved steps result in.

        The derivatives of the loss with respect to these are the adjoints.
        """
        taps: Taps = {}
        for n, step in enumerate(self.steps):
            if step.loop:
                taps[n] = step.loop.body.taps((*leading, step.loop.length))
            elif step.is_curved:
                outputs = [step.outputs[i] for i in step.active_outputs]
                taps[n] = [versions.zeros(v, leading) for v in outputs]
        return taps

    def run(
        self, inputs: Sequence[jax.Array], taps: Taps
    ) -> tuple[list[jax.Array], Record]:
        """Executes the steps of a program that has no final one.

        Args:
          inputs: the values to start from.
          taps: as from :meth:`taps`.

        Returns:
          The outputs, and what was recorded.
        """
        values, record = self.begin(inputs, taps)
        return values_of(self.outputs, values), record

    def begin(
        self, inputs: Sequence[jax.Array], taps: Taps
    ) -> tuple[dict[Variable, jax.Array], Record]:
        """Executes the steps up to the final one: all values, and what was recorded."""
        values = dict(zip(self.inputs, inputs, strict=True))
        loops = {}
        for n, step in enumerate(self.steps):
            read = values_of(step.inputs, values)
            if step.loop:
                results, loops[n] = _run_loop(step.loop, read, taps[n])
            else:
                results = step.function(*read)
            if step.is_curved and not step.loop:
                for place, tap in zip(step.active_outputs, taps[n], strict=True):
                    results[place] = results[place] + tap
            values.update(zip(step.outputs, results, strict=True))
        return values, Record({v: values[v] for v in self.recorded}, loops)

    @functools.cached_property
    def handed_on(self) -> tuple[Variable, ...]:
        """What is computed up to the final step and read from there on."""
        later = [self.final, *self.rest] if self.final else []
        read = [v for step in later for v in step.inputs]
        written = {v for step in self.steps for v in step.outputs}
        return tuple(v for v in dict.fromkeys((*read, *self.outputs)) if v in written)

    def end(self, values: dict[Variable, jax.Array]) -> list[jax.Array]:
        """Executes what is behind the final step: the outputs, from all values."""
        values = dict(values)
        for step in self.rest:
            results = step.function(*values_of(step.inputs, values))
            values.update(zip(step.outputs, results, strict=True))
        return values_of(self.outputs, values)


def values_of(atoms: Sequence[Any], values: dict[Variable, Any]) -> list[Any]:
    """The values of some variables and literals."""
    return [values[atom] if is_variable(atom) else atom.val for atom in atoms]


def _run_loop(
    loop: Loop, read: list[jax.Array], taps: Taps
) -> tuple[list[jax.Array], Record]:
    constants, carry, xs = loop.split(read)

    def body(carry: list, scanned: tuple) -> tuple:
        x, taps = scanned
        outputs, record = loop.body.run([*loop.closed, *constants, *carry, *x], taps)
        return outputs[: loop.num_carry], (outputs[loop.num_carry :], record)

    carry, (ys, record) = jax.lax.scan(
        body,
        carry,
        (xs, taps),
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    return [*carry, *ys], record


# --- From a jaxpr to a program -------------------------------------------------------


def program_of(
    jaxpr: Any, opaque: Collection[int] = (), branches: dict[int, int] | None = None
) -> tuple[Program, list[jax.Array]]:
    """The program of a loss, whose value is the first output of its closed jaxpr.

    All inputs of the jaxpr move.

    Args:
      jaxpr: the closed jaxpr.
      opaque: the places of equations that are left to jax, among all that the calls
        in the jaxpr amount to; see `Step.places`.
      branches: for the places of some equations that are a `cond`, which of its
        branches stands there instead.

    Returns:
      A program whose inputs are some constants and the inputs, and the values of these
      constants.
    """
    flat = _flattened(jaxpr, branches)
    needed = [n == 0 for n in range(len(flat.outputs))]
    program = _program(flat, flat.inputs, needed, opaque=opaque)
    return program, list(flat.constants.values())


class BranchPoint(NamedTuple):
    """A `cond` that most of a loss may be inside of.

    Attributes:
      place: of its equation.
      branches: the numbers of the branches that may be taken.
      index: from the inputs of the jaxpr to the place in `branches` of what is taken.
    """

    place: int
    branches: tuple[int, ...]
    index: Callable[..., jax.Array]


def branch_point_of(
    jaxpr: Any, branches: dict[int, int] | None = None
) -> BranchPoint | None:
    """The only large `cond` that a loss depends on, if there is just one.

    With several, the programs of all combinations would be too many.
    """
    flat = _flattened(jaxpr, branches)
    if any(equation.effects for equation in flat.equations):
        return None
    active = _active(flat, flat.inputs)
    found = [
        place
        for place, equation in enumerate(flat.equations)
        if equation.primitive is primitives.cond_p
        and any(v in active for v in equation.outvars)
        and versions.num_equations(equation) >= _LARGE_BRANCH
    ]
    if len(found) != 1:
        return None
    (place,) = found
    equation = flat.equations[place]
    chosen, count = equation.invars[0], len(equation.params["branches"])
    if not is_variable(chosen):
        number = min(max(int(chosen.val), 0), count - 1)
        return BranchPoint(place, (number,), lambda *leaves: 0)
    needed = dataflow.needed(flat.equations[:place], [chosen], None)
    before = [e for e in flat.equations[:place] if not needed.isdisjoint(e.outvars)]
    inputs = [*flat.constants, *flat.inputs]
    function = versions.function_of(before, inputs, [chosen])
    constants = list(flat.constants.values())

    def index(*leaves: jax.Array) -> jax.Array:
        return function(*constants, *leaves)[0]

    return BranchPoint(place, tuple(range(count)), index)


def varies(jaxpr: Any, place: int = 0) -> bool:
    """Whether the results of a closed jaxpr move with an input, almost everywhere."""
    flat = _flattened(jaxpr)
    active = _active(flat, [flat.inputs[place]])
    return not active.isdisjoint(filter(is_variable, flat.outputs))


@dataclasses.dataclass(frozen=True, eq=False)
class _Flat:
    """A jaxpr with all calls of other jaxprs written out.

    Attributes:
      constants: the variables that stand for constants, and their values.
      inputs: the variables of the inputs.
      equations: what is between them and the outputs.
      outputs: variables or literals.
      bodies: the flat bodies of the equations that are a `scan`, by place.
    """

    constants: dict[Variable, Any]
    inputs: list[Variable]
    equations: list[Equation]
    outputs: list[Any]
    bodies: dict[int, "_Flat"]


def _flattened(closed: Any, branches: dict[int, int] | None = None) -> _Flat:
    branches = branches or {}
    fresh = gensym()
    jaxpr = versions.open_jaxpr(closed)
    flat = _Flat({}, list(jaxpr.invars), [], [], {})

    def write_out(jaxpr: Jaxpr, constants: Sequence[Any], names: dict) -> list[Any]:
        for v, value in zip(jaxpr.constvars, constants, strict=True):
            names[v] = fresh(v.aval)
            flat.constants[names[v]] = value

        def renamed(atom: Any) -> Any:
            return names[atom] if is_variable(atom) else atom

        def named(atom: Any) -> Variable:
            """A variable for a literal, too: a carry that starts from it may move."""
            if not is_variable(atom):
                literal, atom = atom, fresh(atom.aval)
                flat.constants[atom] = np.asarray(literal.val, atom.aval.dtype)
            return atom

        for equation in jaxpr.eqns:
            inputs = [renamed(atom) for atom in equation.invars]
            called = versions.inlined(equation) or products.in_order(equation)
            if equation.primitive is primitives.cond_p:
                taken = branches.get(len(flat.equations))
                if taken is not None:
                    called, inputs = equation.params["branches"][taken], inputs[1:]
            if called is None:
                outputs = [fresh(v.aval) for v in equation.outvars]
                if _is_scan(equation):
                    inputs = [named(atom) for atom in inputs]
                    body = _flattened(equation.params["jaxpr"])
                    flat.bodies[len(flat.equations)] = body
                flat.equations.append(equation.replace(invars=inputs, outvars=outputs))
            else:
                inner = versions.open_jaxpr(called)
                inner_names = dict(zip(inner.invars, inputs, strict=True))
                outputs = write_out(inner, versions.constants_of(called), inner_names)
            names.update(zip(equation.outvars, outputs, strict=True))
        return [renamed(atom) for atom in jaxpr.outvars]

    names = {v: v for v in jaxpr.invars}
    flat.outputs.extend(write_out(jaxpr, versions.constants_of(closed), names))
    return flat


def _program(
    flat: _Flat,
    moving: Collection[Variable],
    needed: Sequence[bool],
    num_fixed: int | None = None,
    opaque: Collection[int] = (),
) -> Program:
    """Gathers the equations of a flat jaxpr into steps.

    Args:
      flat: the jaxpr.
      moving: the inputs that move with the parameters.
      needed: for each output whether the loss depends on it.
      num_fixed: for the body of a loop, how many inputs do not change; else None.
      opaque: the places of equations that are left to jax, besides those that must be.
    """
    active = _active(flat, moving)
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
    groups = _groups(flat.equations, first, active, relevant, singularities)
    groups = _ordered(groups, flat.equations)
    readers = _readers(flat, [*groups, last, rest])

    def gathered(n: int, group: Sequence[int]) -> tuple[tuple, list, list]:
        """The equations of a group, what they read and what others read of them."""
        equations = tuple(flat.equations[i] for i in group)
        results = [v for e in equations for v in e.outvars]
        others = [v for v in results if readers.get(v, set()) - {n}]
        return equations, _read(equations), others

    steps = []
    for n, group in enumerate(groups):
        equations, read, written = gathered(n, group)
        active_inputs = [i for i, v in enumerate(read) if v in active]
        active_outputs = [i for i, v in enumerate(written) if v in relevant]
        common = {"places": tuple(group)}
        if not active_inputs or not active_outputs:
            inert = Step("inert", equations, tuple(read), tuple(written), **common)
            steps.append(inert)
            continue
        if _is_scan(equations[0]):
            # Inputs may repeat and outputs may be of no use, but all have their places.
            (i,) = group
            loop = _loop_step(equations[0], flat.bodies[i], active, relevant)
            steps.append(dataclasses.replace(loop, **common))
            continue
        kind = _kind(equations, [read[i] for i in active_inputs], active)
        steps.append(
            Step(
                kind,
                equations,
                tuple(read),
                tuple(written),
                tuple(active_inputs),
                tuple(active_outputs),
                is_guarded=singularities.is_guarded(
                    kind, equations, [read[i] for i in active_inputs]
                ),
                has_mask=singularities.has_mask(equations),
                **common,
            )
        )
    inputs = (*flat.constants, *flat.inputs)
    fixed = inputs[: len(flat.constants) + num_fixed] if num_fixed is not None else ()
    program = Program(inputs, tuple(flat.outputs), tuple(steps), fixed)
    if not last:
        return program
    equations, read, written = gathered(len(groups), last)
    value = flat.outputs[0]
    final = Step(
        "final",
        equations,
        tuple(read),
        (value, *(v for v in written if v is not value)),
        tuple(i for i, v in enumerate(read) if v in relevant and _is_inexact(v)),
        places=tuple(last),
    )
    equations, read, written = gathered(len(groups) + 1, rest)
    behind = Step("inert", equations, tuple(read), tuple(written), places=tuple(rest))
    return dataclasses.replace(program, final=final, rest=(behind,) if rest else ())


def _readers(flat: _Flat, groups: Sequence[Sequence[int]]) -> dict[Variable, set[int]]:
    """The groups that read each variable; -1 stands for an output."""
    readers: dict[Variable, set[int]] = {}
    for v in filter(is_variable, flat.outputs):
        readers[v] = {-1}
    for n, group in enumerate(groups):
        for i in group:
            for v in dataflow.operands(flat.equations[i]):
                readers.setdefault(v, set()).add(n)
    return readers


def _is_inexact(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, np.inexact)


def _is_real(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _is_scan(equation: Equation) -> bool:
    return equation.primitive is primitives.scan_p


def _read(equations: Sequence[Equation]) -> list[Variable]:
    """What some equations read and do not write themselves, each once."""
    written = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(
        v for equation in equations for v in dataflow.operands(equation)
    )
    return [v for v in read if v not in written]


# What moves, and what matters.


def _active(flat: _Flat, moving: Iterable[Variable]) -> set[Variable]:
    """The variables whose derivative along the parameters may differ from zero."""
    active = {v for v in moving if _is_inexact(v)}
    for i, equation in enumerate(flat.equations):
        read = [v for v in dataflow.operands(equation) if v in active]
        if not read or not operations.moves(equation):
            continue
        active.update(dataflow.references(equation))
        if i in flat.bodies:
            flags = [is_variable(v) and v in active for v in equation.invars]
            _, flags = _active_in_loop(equation, flat.bodies[i], flags)
        else:
            flags = [True] * len(equation.outvars)
        pairs = zip(equation.outvars, flags, strict=True)
        active.update(v for v, flag in pairs if flag and _is_inexact(v))
    return active


def _active_in_loop(
    equation: Equation, body: _Flat, flags: Sequence[bool]
) -> tuple[list[bool], list[bool]]:
    """Which inputs and outputs of the body of a `scan` are active, in any iteration."""
    num_constants, num_carry = _arity(equation)
    flags = list(flags)
    while True:
        pairs = zip(body.inputs, flags, strict=True)
        active = _active(body, [v for v, flag in pairs if flag])
        outputs = [is_variable(v) and v in active for v in body.outputs]
        carried = flags[num_constants : num_constants + num_carry]
        grown = [a or b for a, b in zip(carried, outputs[:num_carry], strict=True)]
        if grown == carried:
            return flags, outputs
        flags[num_constants : num_constants + num_carry] = grown


def _arity(equation: Equation) -> tuple[int, int]:
    """How many constants and how many carried values a `scan` has.

    What is scanned over has one axis more outside of the body than inside.
    """
    body = versions.open_jaxpr(equation.params["jaxpr"])
    num_xs = sum(
        outer.aval.ndim > inner.aval.ndim
        for outer, inner in zip(equation.invars, body.invars, strict=True)
    )
    num_carry = sum(
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(equation.outvars, body.outvars, strict=True)
    )
    return len(body.invars) - num_xs - num_carry, num_carry


# Which equations make one step.


def _groups(
    equations: Sequence[Equation],
    places: Iterable[int],
    active: Collection[Variable],
    relevant: Collection[Variable],
    singularities: Singularities,
) -> list[list[int]]:
    """The equations at some places in groups.

    All elementwise equations that depend on one and the same variable alone, a gelu for
    example, are one group: one function of that variable. Every other equation is a
    group of its own.
    """
    run_of: dict[Variable, Variable] = {}  # a run is called as what it starts from
    runs: dict[Variable, list[int]] = {}
    behind: dict[Variable, set[Variable]] = {}  # the runs that a variable comes after
    before: dict[Variable, set[Variable]] = {}  # the runs that a run comes after
    groups = []
    for i in places:
        equation = equations[i]
        awaited = dataflow.awaited(equation)
        read = {v for v in awaited if v in active}
        names = {run_of.get(v, v) for v in read}
        written = [v for v in equation.outvars if v in relevant]
        # No run may wait for what comes after itself, by way of a mask or of a
        # stop_gradient for example.
        fixed = [behind.get(v, set()) for v in awaited if v not in read]
        is_start = not names.isdisjoint(_all_before(set().union(*fixed), before))
        # What is infinite behind a mask would spoil the derivative of the whole run.
        is_start |= singularities.is_singular(equation) and not read.isdisjoint(
            singularities.masked & run_of.keys()
        )
        after = set().union(*(behind.get(v, set()) for v in awaited))
        if (
            written
            and len(read if is_start else names) == 1
            and len({v.aval.shape for v in (*read, *written)}) == 1
            and all(_is_real(v.aval) for v in (*read, *written))
            and operations.is_elementwise(equation)
        ):
            name = equation.outvars[0] if is_start else names.pop()
            run_of.update(dict.fromkeys(equation.outvars, name))
            if name not in runs:
                groups.append(runs.setdefault(name, []))
            runs[name].append(i)
            before.setdefault(name, set()).update(after - {name})
            after = {name}
        else:
            groups.append([i])
        behind.update(dict.fromkeys(dataflow.provided(equation), after))
    return groups


def _all_before(
    runs: Iterable[Variable], before: dict[Variable, set[Variable]]
) -> set[Variable]:
    """Some runs and all that they come after."""
    found, left = set(), list(runs)
    while left:
        run = left.pop()
        if run not in found:
            found.add(run)
            left.extend(before.get(run, ()))
    return found


def _ordered(
    groups: Sequence[list[int]], equations: Sequence[Equation]
) -> list[list[int]]:
    """The groups in an order in which they can be executed, as near to the old one."""
    group_of = {i: n for n, group in enumerate(groups) for i in group}
    waits_for: list[set[int]] = [set() for _ in groups]
    writer: dict[Any, int] = {}
    for i, n in sorted(group_of.items()):
        waits_for[n].update(
            writer[v] for v in dataflow.awaited(equations[i]) if v in writer
        )
        writer.update(dict.fromkeys(dataflow.provided(equations[i]), n))
    waits_for = [others - {n} for n, others in enumerate(waits_for)]
    waiting: dict[int, list[int]] = {}
    for n, others in enumerate(waits_for):
        for other in others:
            waiting.setdefault(other, []).append(n)
    left = [len(others) for others in waits_for]
    ready = [(groups[n][0], n) for n, count in enumerate(left) if count == 0]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, n = heapq.heappop(ready)
        ordered.append(groups[n])
        for other in waiting.get(n, ()):
            left[other] -= 1
            if left[other] == 0:
                heapq.heappush(ready, (groups[other][0], other))
    return ordered


# What a step is.


def _kind(
    equations: Sequence[Equation],
    active_inputs: Sequence[Variable],
    active: Collection[Variable],
) -> str:
    """The rule for some equations that are one step."""
    places = [
        [n for n, v in enumerate(e.invars) if is_variable(v) and v in active]
        for e in equations
    ]
    linear = list(map(operations.is_linear, equations, places))
    if all(linear) and len(equations) == 1:
        affine = operations.is_affine(equations[0], places[0])
        return "affine" if affine else "linear"
    straight = map(operations.is_piecewise_linear, equations)
    if all(a or b for a, b in zip(linear, straight, strict=True)):
        return "piecewise_linear"
    if _is_elementwise(equations, active_inputs, active):
        return "elementwise"
    is_product = equations[0].primitive.name in operations.PRODUCTS
    return "product" if is_product and len(active_inputs) == 2 else "local"


def _is_elementwise(
    equations: Sequence[Equation],
    active_inputs: Sequence[Variable],
    active: Collection[Variable],
) -> bool:
    """Whether the equations are about real numbers, entry by entry."""
    written = [v.aval for e in equations for v in e.outvars if v in active]
    read = [v.aval for v in active_inputs]
    ndim = written[0].ndim
    return (
        all(operations.is_elementwise(e) for e in equations)
        and all(map(_is_real, (*read, *written)))
        and len({x.shape for x in written}) == 1
        and all(x.ndim in (0, ndim) for x in read)
        and len(read) <= _MOST_INPUTS
    )


def _loop_step(
    equation: Equation,
    flat: _Flat,
    active: Collection[Variable],
    relevant: Collection[Variable],
) -> Step:
    """A `scan` as a step; its inputs and outputs have the places of the equation's."""
    num_constants, num_carry = _arity(equation)
    flags = [is_variable(v) and v in active for v in equation.invars]
    flags, outputs = _active_in_loop(equation, flat, flags)
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
    return Step(
        "loop",
        (equation,),
        tuple(equation.invars),
        tuple(equation.outvars),
        tuple(n for n, flag in enumerate(flags) if flag),
        tuple(n for n, flag in enumerate(needed) if flag),
        loop,
    )
