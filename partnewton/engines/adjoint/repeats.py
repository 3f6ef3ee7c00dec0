"""Parts of a program that repeat, such as layers: traced and compiled once.

Two layers of a network have the same operations, on other values. What keeps a compiler
from seeing that is the number of rows, which grows from layer to layer. So the rows of
a few layers are padded by zeros to the same number, and the layers become calls of one
function.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable, values_of
from partnewton.engines.adjoint.op import Op, Request
from partnewton.engines.adjoint.program import Perturbations, Program, Residuals
from partnewton.engines.adjoint.support import Spans
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import (
    Jet,
    Place,
    Span,
    Tangent,
    densify,
    overlap,
)
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable
from partnewton.engines.keys import NoKeyError, key_of_program

__all__ = ["Part", "Repeat", "repeats_in", "sweep_repeat"]

_LEAST_SAVED = 6  # operations: a function of fewer is not worth its name
_LEAST_PARTS = 6
_MOST_SIZES = 4  # numbers of rows that the parts of a repeat are padded to


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive operations of a program.

    Attributes:
      numbers: of the operations in the program.
      ops: the operations.
      read: the variables that they read from outside and that may move.
      written: those that they write and that are read outside.
    """

    numbers: tuple[int, ...]
    ops: tuple[Op, ...]
    read: tuple[Variable, ...]
    written: tuple[Variable, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Consecutive parts that are one and the same function of what they read."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        """The number of the first operation."""
        return self.parts[0].numbers[0]

    @property
    def stop(self) -> int:
        """The number after that of the last operation."""
        return self.parts[-1].numbers[-1] + 1


# --- Which parts repeat --------------------------------------------------------------


def repeats_in(program: Program) -> list[Repeat]:
    """The repeated parts of a program, in order."""
    numbers = [n for n, op in enumerate(program.ops) if op.rule]
    ids: dict[Hashable, int] = {}
    words = [ids.setdefault(_outline(program.ops[n]), len(ids)) for n in numbers]
    found = []
    for start, period, count in _periodic(np.array(words), 0):
        stretches = [
            numbers[start + k * period : start + (k + 1) * period] for k in range(count)
        ]
        found.extend(_repeats_among(program, stretches))
    return found


def _outline(op: Op) -> Hashable:
    """What two operations have in common at least, if they are the same."""
    if op.loop:
        return op
    names = tuple(equation.primitive.name for equation in op.equations)
    atoms = tuple(
        (v.aval.shape, v.aval.dtype) if is_variable(v) else str(v) for v in op.inputs
    )
    flags = op.active_inputs, op.active_outputs, op.is_guarded, op.has_mask
    return op.rule.name, names, atoms, flags


def _periodic(words: np.ndarray, offset: int) -> Iterator[tuple[int, int, int]]:
    """The start, period and count of the largest repetitions, in order."""
    best, start, period, count = 0, 0, 0, 0
    for p in range(1, len(words) // 2 + 1):
        same = np.concatenate([[False], words[:-p] == words[p:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        for a, b in edges.reshape(-1, 2):
            saved = (b - a) // p * p
            if saved > best:
                best, start, period, count = saved, int(a), p, int(b - a) // p + 1
    if best < _LEAST_SAVED:
        return
    stop = start + period * count
    yield from _periodic(words[:start], offset)
    yield offset + start, period, count
    yield from _periodic(words[stop:], offset + stop)


def _repeats_among(
    program: Program, stretches: Sequence[Sequence[int]]
) -> Iterator[Repeat]:
    """The longest runs of stretches that are really the same."""
    kept = _kept(program)
    keys = [_key(program, numbers) for numbers in stretches]
    written = [_places_written(program, numbers, kept) for numbers in stretches]
    n = 0
    while n < len(stretches):
        m = n + 1
        while keys[n] is not None and m < len(stretches) and keys[m] == keys[n]:
            m += 1
        if m - n > 1:
            places = sorted(set().union(*written[n:m]))
            yield Repeat(
                tuple(_part(program, numbers, places) for numbers in stretches[n:m])
            )
        n = m


def _key(program: Program, numbers: Sequence[int]) -> Hashable | None:
    """What some operations compute from what they read; None if it cannot be told."""
    ops = [program.ops[n] for n in numbers]
    inside = {v: (k, i) for k, op in enumerate(ops) for i, v in enumerate(op.outputs)}
    slots: dict[Variable, int] = {}
    key = []
    for op in ops:
        wiring = tuple(
            inside[v] if v in inside else slots.setdefault(v, len(slots))
            for v in op.read
        )
        variables = [v for v in op.inputs if is_variable(v)]
        jaxpr = compat.jaxpr_of(op.equations, variables, op.outputs)
        try:
            key.append((op.rule, wiring, key_of_program(jaxpr)))
        except NoKeyError:
            return None
    return tuple(key)


def _kept(program: Program) -> dict[Variable, set[int]]:
    """The operations that read each variable; -1 for what is behind all of them."""
    readers: dict[Variable, set[int]] = {}
    for n, op in enumerate(program.ops):
        for v in op.read:
            readers.setdefault(v, set()).add(n)
    behind = [*program.outputs, *(program.final.inputs if program.final else ())]
    for v in filter(is_variable, behind):
        readers.setdefault(v, set()).add(-1)
    return readers


def _places_written(
    program: Program, numbers: Sequence[int], readers: dict[Variable, set[int]]
) -> set[tuple[int, int]]:
    """The places, operation and output, of what is read outside of a stretch."""
    return {
        (k, i)
        for k, n in enumerate(numbers)
        for i, v in enumerate(program.ops[n].outputs)
        if readers.get(v, set()) - set(numbers)
    }


def _part(
    program: Program, numbers: Sequence[int], written: Sequence[tuple[int, int]]
) -> Part:
    ops = tuple(program.ops[n] for n in numbers)
    own = {v for op in ops for v in op.outputs}
    read = dict.fromkeys(v for op in ops for v in op.read if v not in own)
    outputs = tuple(ops[k].outputs[i] for k, i in written)
    return Part(tuple(numbers), ops, tuple(read), outputs)


# --- Tangents through parts that repeat ----------------------------------------------


def sweep_repeat(
    repeat: Repeat,
    leaves: frozenset[Variable],
    spans: Spans,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Passes jets through all parts, as a sweep does.

    Args:
      repeat: the parts.
      leaves: the variables of the parameters.
      spans: the subsets that move each variable.
      residuals, cotangents, jets, request: as for a sweep.
    """
    terms = Terms()
    for parts, layout in _alike(repeat.parts, leaves, spans):
        for some in _in_sizes(parts):
            links = _links(some, layout) if layout else None
            if links is None:
                for part in some:
                    ops = zip(part.numbers, part.ops, strict=True)
                    terms += sweep(ops, residuals, cotangents, jets, request)
            else:
                stop = max(spans[v].stop for part in some for v in _moving(part, spans))
                scan = _Scan(some, layout, links, Span(0, stop), request)
                terms += scan.run(residuals, cotangents, jets)
    return terms


def _moving(part: Part, spans: Spans) -> list[Variable]:
    return [v for v in (*part.read, *part.written) if v in spans]


# For each variable that is read: None if it does not move, -1 for a row for every
# subset, else the number of the rows and which variables before have the same subsets.
_Layout = tuple[Any, ...]


def _alike(
    parts: Sequence[Part], leaves: frozenset[Variable], spans: Spans
) -> Iterator[tuple[list[Part], _Layout | None]]:
    """Consecutive parts with the same layout of what they read."""
    run: list[Part] = []
    layout: _Layout | None = None
    for part in parts:
        new = _layout(part, leaves, spans)
        if run and (new is None or new != layout):
            yield run, layout
            run = []
        run.append(part)
        layout = new
    yield run, layout


def _layout(part: Part, leaves: frozenset[Variable], spans: Spans) -> _Layout | None:
    """How what a part reads moves; None if subsets overlap."""
    narrow: list[Span] = []
    layout: list[Any] = []
    for v in part.read:
        span = spans.get(v)
        if v not in leaves:
            # Whether it moves or not: zeros do not change anything.
            layout.append(-1)
        elif span is None:
            layout.append(None)
        else:
            if any(other != span and overlap(other, span) for other in narrow):
                return None
            if span not in narrow:
                narrow.append(span)
            layout.append((span.count, narrow.index(span)))
    return tuple(layout)


def _in_sizes(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Parts that are padded to the same number of rows."""
    sizes = max(1, min(_MOST_SIZES, len(parts) // _LEAST_PARTS))
    edges = np.linspace(0, len(parts), sizes + 1).round().astype(int)
    for a, b in itertools.pairwise(edges):
        yield parts[a:b]


def _links(parts: Sequence[Part], layout: _Layout) -> dict[int, tuple[str, int]] | None:
    """Where each part but the first has from what has a row for every subset.

    Returns:
      For each such place among the variables read: ("written", place) of the part
      before or ("read", place); None if the parts are not linked in the same way.
    """
    links: dict[int, tuple[str, int]] | None = None
    for before, part in itertools.pairwise(parts):
        new = {}
        for n, v in enumerate(part.read):
            if layout[n] != -1:
                continue
            if v in before.written:
                new[n] = "written", before.written.index(v)
            elif v in before.read and layout[before.read.index(v)] == -1:
                new[n] = "read", before.read.index(v)
            else:
                return None
        if links is not None and new != links:
            return None
        links = new
    return links


class _Scan:
    """A scan of tangents over parts of a program.

    What the parts read from each other is the carry, with a row for every subset; the
    rows of parameters, primals and cotangents are what is scanned over.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        layout: _Layout,
        links: dict[int, tuple[str, int]],
        everyone: Span,
        request: Request,
    ):
        self.parts, self.part, self.layout = parts, parts[0], layout
        self.links, self.everyone, self.request = links, everyone, request
        linked = {n for how, n in links.values() if how == "written"}
        self.collected = [n for n in range(len(self.part.written)) if n not in linked]

    def run(self, residuals: Residuals, cotangents: Perturbations, jets: Jets) -> Terms:
        """Passes jets through all parts."""
        primals = [
            [x for op in part.ops for x in values_of(op.inputs, residuals.values)]
            for part in self.parts
        ]
        some = [[cotangents.get(n) for n in part.numbers] for part in self.parts]
        rows = [
            [
                jets[v].first.values if how not in (None, -1) else None
                for v, how in zip(part.read, self.layout, strict=True)
            ]
            for part in self.parts
        ]
        starts = np.array([self._starts(part, jets) for part in self.parts], np.int32)
        fixed, xs = _stacked((primals, some, rows))

        def iterate(carry: tuple, scanned: tuple) -> tuple:
            carried, *totals = carry
            x, places = scanned
            primals, cotangents, rows = fixed(x)
            found, more = self._pass(primals, cotangents, rows, places, carried)
            totals = [a + b for a, b in zip(totals, more, strict=True)]
            after = {
                n: found[m] if how == "written" else carried[m]
                for n, (how, m) in self.links.items()
            }
            return (after, *totals), [found[n] for n in self.collected]

        before = {
            n: self._dense(jets.get(v, Jet()), residuals.values[v])
            for n, v in enumerate(self.part.read)
            if self.layout[n] == -1
        }
        zeros = Terms().total(self.everyone, self.request.dtype)
        (after, *totals), ys = jax.lax.scan(iterate, (before, *zeros), (xs, starts))
        self._enter(jets, after, ys)
        return Terms.of_totals(self.everyone, *totals)

    def _starts(self, part: Part, jets: Jets) -> list[int]:
        """The first subset of each group of parameters."""
        pairs = zip(part.read, self.layout, strict=True)
        starts = {
            how[1]: jets[v].first.start for v, how in pairs if how not in (None, -1)
        }
        return [starts[n] for n in sorted(starts)]

    def _dense(self, jet: Jet, like: jax.Array) -> list[jax.Array]:
        """A row for every subset, of each order that is asked for."""
        orders = 2 if self.request.third_order else 1
        return [densify(x, self.everyone, like) for x in jet[:orders]]

    def _pass(
        self,
        primals: Sequence[Any],
        cotangents: Sequence[Any],
        rows: Sequence[jax.Array | None],
        places: jax.Array,
        carried: dict[int, list[jax.Array]],
    ) -> tuple[list[list[jax.Array]], tuple[jax.Array, jax.Array]]:
        """The rows of what one part writes, and the sums of its terms."""
        starts = [Place(x, self.everyone.count) for x in places]
        jets: Jets = {}
        for n, (v, how) in enumerate(zip(self.part.read, self.layout, strict=True)):
            if how == -1:
                jets[v] = Jet(*(Tangent(x) for x in carried[n]))
            elif how is not None:
                jets[v] = Jet(Tangent(rows[n], starts[how[1]]))
        inputs = [v for op in self.part.ops for v in op.inputs]
        pairs = zip(inputs, primals, strict=True)
        values = {v: x for v, x in pairs if is_variable(v)}
        numbers = self.part.numbers
        terms = sweep(
            zip(numbers, self.part.ops, strict=True),
            Residuals(values, {}),
            dict(zip(numbers, cotangents, strict=True)),
            jets,
            self.request,
        )
        found = [
            self._dense(jets.get(v, Jet()), compat.zeros(v, ()))
            for v in self.part.written
        ]
        return found, terms.total(self.everyone, self.request.dtype)

    def _enter(
        self,
        jets: Jets,
        after: dict[int, list[jax.Array]],
        ys: list[list[jax.Array]],
    ) -> None:
        """Enters the jets of what the parts have written."""
        for n, stacks in zip(self.collected, ys, strict=True):
            for k, part in enumerate(self.parts):
                jets[part.written[n]] = Jet(*(Tangent(x[k]) for x in stacks))
        for n, (how, m) in self.links.items():
            if how == "written":
                jets[self.parts[-1].written[m]] = Jet(*map(Tangent, after[n]))


def _stacked(columns: Any) -> tuple[Callable[[list], Any], list[jax.Array]]:
    """Values of all parts, as something to be scanned over.

    Args:
      columns: a pytree in which each subtree is a list with an entry for each part.

    Returns:
      From the values of one iteration to those of one part, and the stacks.
    """
    parts = list(zip(*columns, strict=True))
    flat = [jax.tree.flatten(part, is_leaf=lambda x: x is None) for part in parts]
    treedef = flat[0][1]
    rows = list(zip(*(leaves for leaves, _ in flat), strict=True))
    is_fixed = [all(x is row[0] for x in row) for row in rows]
    stacks = [
        jnp.stack(row) for row, flag in zip(rows, is_fixed, strict=True) if not flag
    ]

    def of_part(some: list[jax.Array]) -> Any:
        rest = iter(some)
        leaves = [
            row[0] if flag else next(rest)
            for row, flag in zip(rows, is_fixed, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)

    return of_part, stacks
