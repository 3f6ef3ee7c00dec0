"""Parts of a program that repeat, such as the layers of a network.

The program is a sequence of operations, in which a part that repeats is a period. For
example, the operations of a perceptron,

    dot add tanh  dot add tanh  dot add tanh  reduce_sum,

have a period of 3 operations, which occurs three times. Candidates are found by shapes
and names of operations (:mod:`partnewton.engines.adjoint.periods`). Then the parts are
compared as functions: by their equations, and by what is connected with what.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.op import Op
from partnewton.engines.adjoint.periods import repetitions
from partnewton.engines.adjoint.program import Program
from partnewton.engines.compat import Variable
from partnewton.engines.keys import NoKeyError, key_of_program

__all__ = ["LEAST_PARTS", "Part", "Repeat", "repeats_in"]

LEAST_PARTS = 3  # with two, padding costs more than the scan saves
_LEAST_OPERATIONS = 6  # in all parts but one: those that are compiled once less


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive operations of a program.

    Attributes:
      numbers: of the operations in the program.
      ops: the operations.
      inputs: the variables that the operations read, each once.
      read: the active ones that they read from outside.
      written: those that they write and that are read outside.
      kept: the positions of those that are also read after the next part.
    """

    numbers: tuple[int, ...]
    ops: tuple[Op, ...]
    inputs: tuple[Variable, ...]
    read: tuple[Variable, ...]
    written: tuple[Variable, ...]
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Consecutive parts that are the same function of their inputs."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        """The number of the first operation."""
        return self.parts[0].numbers[0]

    @property
    def stop(self) -> int:
        """One more than the number of the last operation."""
        return self.parts[-1].numbers[-1] + 1


def repeats_in(program: Program) -> list[Repeat]:
    """The repeated parts of a program, in order."""
    numbers = [n for n, op in enumerate(program.ops) if op.rule]
    outlines = [_outline(program.ops[n]) for n in numbers]
    found = []
    for start, period, count in repetitions(outlines, _LEAST_OPERATIONS):
        stretches = [
            numbers[start + k * period : start + (k + 1) * period] for k in range(count)
        ]
        found.extend(_repeats_among(program, stretches))
    return found


def _outline(op: Op) -> Hashable:
    """A hashable value, which is equal for two operations that are equal."""
    names = tuple(equation.primitive.name for equation in op.equations)
    # XLA's CPU backend has no fast convolution inside of a loop.
    if op.loop or "conv_general_dilated" in names:
        return op
    atoms = tuple(
        (v.aval.shape, v.aval.dtype) if is_variable(v) else str(v) for v in op.inputs
    )
    flags = op.active_inputs, op.active_outputs, op.is_guarded, op.has_mask
    return op.rule.name, names, atoms, flags


def _repeats_among(
    program: Program, stretches: Sequence[Sequence[int]]
) -> Iterator[Repeat]:
    """The longest sequences of parts that are equal functions."""
    readers = _readers(program)
    keys = [_key(program, numbers) for numbers in stretches]
    n = 0
    while n < len(stretches):
        m = n + 1
        while keys[n] is not None and m < len(stretches) and keys[m] == keys[n]:
            m += 1
        if m - n >= LEAST_PARTS:
            yield Repeat(tuple(_parts(program, stretches[n:m], readers)))
        n = m


def _key(program: Program, numbers: Sequence[int]) -> Hashable | None:
    """The key of the function that operations compute; None if there is none."""
    ops = [program.ops[n] for n in numbers]
    inside = {v: (k, i) for k, op in enumerate(ops) for i, v in enumerate(op.outputs)}
    slots: dict[Variable, int] = {}
    key = []
    for op in ops:
        variables = [v for v in op.inputs if is_variable(v)]
        wiring = tuple(
            inside[v] if v in inside else slots.setdefault(v, len(slots))
            for v in variables
        )
        jaxpr = compat.jaxpr_of(op.equations, variables, op.outputs)
        try:
            key.append((op.rule, wiring, key_of_program(jaxpr)))
        except NoKeyError:
            return None
    return tuple(key)


def _readers(program: Program) -> dict[Variable, set[int]]:
    """The operations that read each variable; -1 stands for an output."""
    readers: dict[Variable, set[int]] = {}
    for n, op in enumerate(program.ops):
        for v in op.read:
            readers.setdefault(v, set()).add(n)
    behind = [*program.outputs, *(program.final.inputs if program.final else ())]
    for v in filter(is_variable, behind):
        readers.setdefault(v, set()).add(-1)
    return readers


def _parts(
    program: Program,
    stretches: Sequence[Sequence[int]],
    readers: dict[Variable, set[int]],
) -> Iterator[Part]:
    """The parts of a repeat, with their results in the same order."""
    read = [_places_read(program, numbers, numbers, readers) for numbers in stretches]
    later = [
        _places_read(program, numbers, [*numbers, *following], readers)
        for numbers, following in itertools.pairwise(stretches)
    ]
    written = sorted(set().union(*read))
    kept = set().union(*later)
    for numbers in stretches:
        ops = tuple(program.ops[n] for n in numbers)
        own = {v for op in ops for v in op.outputs}
        inputs = dict.fromkeys(v for op in ops for v in filter(is_variable, op.inputs))
        outside = dict.fromkeys(v for op in ops for v in op.read if v not in own)
        yield Part(
            tuple(numbers),
            ops,
            tuple(inputs),
            tuple(outside),
            tuple(ops[k].outputs[i] for k, i in written),
            tuple(n for n, place in enumerate(written) if place in kept),
        )


def _places_read(
    program: Program,
    numbers: Sequence[int],
    known: Sequence[int],
    readers: dict[Variable, set[int]],
) -> set[tuple[int, int]]:
    """The places, operation and output, of what is read by others than the known."""
    return {
        (k, i)
        for k, n in enumerate(numbers)
        for i, v in enumerate(program.ops[n].outputs)
        if readers.get(v, set()) - set(known)
    }
