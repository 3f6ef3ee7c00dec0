"""Tangents of repeated parts, by a scan that is traced and compiled once.

Parts that repeat, such as the layers of a network, are the same function of their
inputs, but the tangents have more rows from part to part. For example, let

    h_k = tanh(h_(k-1) @ W_k),   k = 1, 2, 3,

with one subset for each weight. All tangents get as many rows as in the last part, with
zeros in front:

    k   rows of the tangent of h_k
    1   0     0     W_1
    2   0     W_1   W_2
    3   W_1   W_2   W_3

The subset of a weight then has the same row in each part, so that the parts become one
function, the body of a `scan`. From one part to the next, rows are shifted by the
number of subsets of a part, here 1: the first row, which is zero, is dropped, and a row
of zeros is appended. The sums of terms are shifted in the same way.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import values_of
from partnewton.engines.adjoint.op import Request
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.repeats import LEAST_PARTS, Part, Repeat
from partnewton.engines.adjoint.spans import Span
from partnewton.engines.adjoint.support import Spans
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import Jet, Tangent, densify
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["sweep_repeat"]

# Consecutive parts form groups, each with the rows of its last part. Larger groups
# compile faster, and compute more with zeros.
_MOST_GROUPS = 4

Rows = list[jax.Array]  # of one variable, for each order


def sweep_repeat(
    repeat: Repeat,
    leaves: Collection[Variable],
    spans: Spans,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Propagates jets through all parts, as a sweep does.

    Args:
      repeat: the parts.
      leaves: the variables of the parameters.
      spans: the subsets that each variable depends on.
      residuals, cotangents, jets, request: as for a sweep.
    """
    terms = Terms()
    common = residuals, cotangents, jets, request
    for parts, shift in _with_one_shift(repeat.parts, leaves, spans):
        for group in _groups(parts):
            layout = _layout(group, shift, leaves, spans)
            if layout:
                terms += _scan(group, layout, *common)
            else:
                for part in group:
                    terms += sweep(zip(part.numbers, part.ops, strict=True), *common)
    return terms


# --- Which parts are one function ----------------------------------------------------


def _with_one_shift(
    parts: Sequence[Part], leaves: Collection[Variable], spans: Spans
) -> Iterator[tuple[list[Part], int]]:
    """Consecutive parts with the same shift from one to the next."""
    run, shift = [parts[0]], None
    for before, part in itertools.pairwise(parts):
        new = _shift_between(before, part, leaves, spans)
        if new is not None and shift in (None, new):
            run.append(part)
            shift = new
        else:
            yield run, shift or 0
            run, shift = [part], None
    yield run, shift or 0


def _shift_between(
    part: Part, following: Part, leaves: Collection[Variable], spans: Spans
) -> int | None:
    """The difference of the subsets of all parameters; None if there is not one."""
    shifts = set()
    for v, w in zip(part.read, following.read, strict=True):
        if (v in leaves) != (w in leaves):
            return None
        if v in leaves and (v in spans or w in spans):
            if v not in spans or w not in spans or spans[v].count != spans[w].count:
                return None
            shifts.add(spans[w].start - spans[v].start)
    if not shifts:
        return 0
    return shifts.pop() if len(shifts) == 1 and min(shifts) >= 0 else None


def _groups(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Divides parts into groups, which get the same number of rows."""
    count = max(1, min(_MOST_GROUPS, len(parts) // LEAST_PARTS))
    edges = np.linspace(0, len(parts), count + 1).round().astype(int)
    for a, b in itertools.pairwise(edges):
        yield parts[a:b]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What parts read, by its position, and what they hand on.

    Attributes:
      everyone: the rows of all variables.
      shift: by how many rows they are shifted from one part to the next.
      own: the rows of the parameters, for all those that have a tangent.
      sources: for other variables, where the part before has them: ("written", n) or
        ("read", n).
      collected: the positions of results that are read by others than the next part.
    """

    everyone: Span
    shift: int
    own: dict[int, Span]
    sources: dict[int, tuple[str, int]]
    collected: list[int]


def _layout(
    parts: Sequence[Part], shift: int, leaves: Collection[Variable], spans: Spans
) -> _Layout | None:
    """The layout of parts; None if a scan is not possible or not worthwhile."""
    if len(parts) < LEAST_PARTS:
        return None
    first, last = parts[0], parts[-1]
    inputs = [n for n, v in enumerate(first.read) if v not in leaves]
    sources = [_sources(*pair, inputs) for pair in itertools.pairwise(parts)]
    if sources[0] is None or any(x != sources[0] for x in sources):
        return None
    stops = [
        spans[v].stop + shift * (len(parts) - 1 - k)
        for k, part in enumerate(parts)
        for v in part.read
        if v in spans
    ]
    stops += [
        spans[v].stop + shift * len(parts)
        for n, v in enumerate(first.read)
        if n in inputs and v in spans
    ]
    rows = max((spans[v].stop for v in last.read if v in spans), default=0)
    if not rows or max(stops) > rows:  # rows would be shifted out at the end
        return None
    linked = {n for how, n in sources[0].values() if how == "written"}
    count = len(first.written)
    return _Layout(
        Span(0, rows),
        shift,
        {n: spans[v] for n, v in enumerate(last.read) if v in leaves and v in spans},
        sources[0],
        [n for n in range(count) if n not in linked or n in first.kept],
    )


def _sources(
    before: Part, part: Part, inputs: Sequence[int]
) -> dict[int, tuple[str, int]] | None:
    """Where the part before has the inputs of a part; None if it does not have one."""
    sources = {}
    for n in inputs:
        v = part.read[n]
        if v in before.written:
            sources[n] = "written", before.written.index(v)
        elif v in before.read and before.read.index(v) in inputs:
            sources[n] = "read", before.read.index(v)
        else:
            return None
    return sources


# --- The scan ------------------------------------------------------------------------


def _scan(
    parts: Sequence[Part],
    layout: _Layout,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Propagates jets through parts, in one scan.

    What the parts read from each other is carried. Primals, cotangents and the rows of
    the parameters are stacked, and scanned over.
    """
    first, last, everyone = parts[0], parts[-1], layout.everyone
    orders = 2 if request.third_order else 1

    def all_rows(jet: Jet, like: jax.Array) -> Rows:
        return [densify(x, everyone, like) for x in jet[:orders]]

    def iterate(carry: tuple, scanned: list) -> tuple:
        carried, hessian, third = carry
        carried = {n: [shifted(x) for x in rows] for n, rows in carried.items()}
        read = {n: Jet(*map(Tangent, rows)) for n, rows in carried.items()}
        primals, cotangents, own = of_part(scanned)
        for n, rows in own.items():
            read[n] = Jet(Tangent(rows, layout.own[n].start))
        found = {first.read[n]: jet for n, jet in read.items()}
        ops = zip(first.numbers, first.ops, strict=True)
        inside = Residuals(dict(zip(first.inputs, primals, strict=True)), {})
        terms = sweep(ops, inside, cotangents, found, request)
        written = [
            all_rows(found.get(v, Jet()), compat.zeros(v, ())) for v in first.written
        ]
        after = {
            n: written[m] if how == "written" else carried[m]
            for n, (how, m) in layout.sources.items()
        }
        more = terms.total(everyone, request.dtype)
        totals = shifted(shifted(hessian).T).T + more[0], shifted(third) + more[1]
        return (after, *totals), [written[n] for n in layout.collected]

    def shifted(rows: jax.Array) -> jax.Array:
        return densify(Tangent(rows[layout.shift :]), everyone)

    of_part, xs = _stacked(
        [_inputs_of(part, first, layout, residuals, cotangents, jets) for part in parts]
    )
    before = {}
    for n in layout.sources:
        v = first.read[n]
        moved = [
            x and Tangent(x.values, x.start + layout.shift * len(parts))
            for x in jets.get(v, Jet())
        ]
        before[n] = all_rows(Jet(*moved), residuals.values[v])
    zeros = Terms().total(everyone, request.dtype)
    (after, *totals), ys = jax.lax.scan(iterate, (before, *zeros), xs)
    for n, rows in zip(layout.collected, ys, strict=True):
        for k, part in enumerate(parts):
            start = layout.shift * (len(parts) - 1 - k)
            jets[part.written[n]] = Jet(*(Tangent(x[k, start:]) for x in rows))
    for n, (how, m) in layout.sources.items():
        if how == "written":
            jets[last.written[m]] = Jet(*map(Tangent, after[n]))
    return Terms.of_totals(everyone, *totals)


def _inputs_of(
    part: Part,
    first: Part,
    layout: _Layout,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
) -> tuple[list[jax.Array], Perturbations, dict[int, jax.Array]]:
    """Primals, cotangents and rows of parameters, in the order of the first part."""
    primals = values_of(part.inputs, residuals.values)
    pairs = zip(first.numbers, part.numbers, strict=True)
    some = {n: cotangents[m] for n, m in pairs if m in cotangents}
    own = {n: jets[part.read[n]].first.values for n in layout.own}
    return primals, some, own


def _stacked(inputs: Sequence[Any]) -> tuple[Callable[[list], Any], list[jax.Array]]:
    """Stacks pytrees of one structure.

    Returns:
      From the stacked arrays at one iteration to the pytree of this iteration, and the
      stacked arrays; those that are the same in all pytrees are not stacked.
    """
    columns = list(zip(*map(jax.tree.leaves, inputs), strict=True))
    treedef = jax.tree.structure(inputs[0])
    is_same = [all(x is column[0] for x in column) for column in columns]
    pairs = list(zip(columns, is_same, strict=True))

    def of_part(some: list[jax.Array]) -> Any:
        rest = iter(some)
        leaves = [column[0] if same else next(rest) for column, same in pairs]
        return jax.tree.unflatten(treedef, leaves)

    return of_part, [jnp.stack(column) for column, same in pairs if not same]
