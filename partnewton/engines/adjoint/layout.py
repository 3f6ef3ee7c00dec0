"""Which repeated parts become one scan, and the rows of their tangents.

See :mod:`partnewton.engines.adjoint.rolled` for an example. From one part to the next,
the subsets of a parameter are the same, or shifted by a number that is the same for all
parameters. With one subset for each tensor, it is the number of tensors in a layer.
What a part reads besides its parameters must have been written or read by the part
before.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from partnewton.engines.adjoint.repeats import LEAST_PARTS, Part
from partnewton.engines.adjoint.spans import Span
from partnewton.engines.adjoint.support import Spans
from partnewton.engines.compat import Variable

__all__ = ["Layout", "groups_of"]

# Consecutive parts form groups, each with the rows of its last part. Larger groups
# compile faster, and compute more with zeros.
_MOST_GROUPS = 4


def groups_of(
    parts: Sequence[Part], leaves: Collection[Variable], spans: Spans
) -> Iterator[tuple[Sequence[Part], "Layout | None"]]:
    """Divides parts into groups, and yields the layout of each.

    Args:
      parts: the parts of a repeat.
      leaves: the variables of the parameters.
      spans: the subsets that each variable depends on.

    Yields:
      Consecutive parts, and their layout, or None if a scan of these is not possible or
      not worthwhile.
    """
    for run, shifts in _with_equal_shifts(parts, leaves, spans):
        for group in _groups(run):
            yield group, _layout(group, shifts, leaves, spans)


def _with_equal_shifts(
    parts: Sequence[Part], leaves: Collection[Variable], spans: Spans
) -> Iterator[tuple[list[Part], dict[int, int]]]:
    """Consecutive parts with the same shifts from one to the next."""
    run, shifts = [parts[0]], None
    for before, part in itertools.pairwise(parts):
        new = _shifts(before, part, leaves, spans)
        if new is not None and shifts in (None, new):
            run.append(part)
            shifts = new
        else:
            yield run, shifts or {}
            run, shifts = [part], None
    yield run, shifts or {}


def _shifts(
    part: Part, following: Part, leaves: Collection[Variable], spans: Spans
) -> dict[int, int] | None:
    """By how much the subsets of each parameter differ; None if not by a shift."""
    shifts = {}
    for n, (v, w) in enumerate(zip(part.read, following.read, strict=True)):
        if (v in leaves) != (w in leaves):
            return None
        if v in leaves and (v in spans or w in spans):
            if v not in spans or w not in spans or spans[v].count != spans[w].count:
                return None
            shifts[n] = spans[w].start - spans[v].start
    return shifts


def _groups(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Divides parts into groups, which get the same number of rows."""
    count = max(1, min(_MOST_GROUPS, len(parts) // LEAST_PARTS))
    edges = np.linspace(0, len(parts), count + 1).round().astype(int)
    for a, b in itertools.pairwise(edges):
        yield parts[a:b]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What parts read, by its position, and what they hand on.

    Attributes:
      everyone: the rows of all variables.
      num_fixed: how many rows, the first ones, are the same in all parts.
      shift: by how many rows the others are shifted from one part to the next.
      own: the rows of the parameters, for all those that have a tangent.
      sources: for other variables, where the part before has them: ("written", n) or
        ("read", n).
      collected: the positions of results that are read by others than the next part.
    """

    everyone: Span
    num_fixed: int
    shift: int
    own: dict[int, Span]
    sources: dict[int, tuple[str, int]]
    collected: list[int]


def _layout(
    parts: Sequence[Part],
    shifts: dict[int, int],
    leaves: Collection[Variable],
    spans: Spans,
) -> Layout | None:
    """The layout of parts; None if a scan is not possible or not worthwhile."""
    first, last = parts[0], parts[-1]
    steps = sorted({step for step in shifts.values() if step})
    if len(parts) < LEAST_PARTS or len(steps) > 1 or (steps and steps[0] < 0):
        return None
    inputs = [n for n, v in enumerate(first.read) if v not in leaves]
    sources = [_sources(*pair, inputs) for pair in itertools.pairwise(parts)]
    if sources[0] is None or any(x != sources[0] for x in sources):
        return None

    def stops(part: Part, places: Iterable[int]) -> list[int]:
        return [spans[part.read[n]].stop for n in places if part.read[n] in spans]

    shift = steps[0] if steps else 0
    num_rows = max(stops(last, range(len(last.read))), default=0)
    shifted = [spans[first.read[n]].start for n, step in shifts.items() if step]
    num_fixed = min(shifted, default=num_rows)
    fixed = stops(first, [*inputs, *(n for n, step in shifts.items() if not step)])
    has_room = all(
        stop <= num_fixed or stop + shift * (len(parts) - 1 - k) <= num_rows
        for k, part in enumerate(parts)
        for stop in stops(part, range(len(part.read)))
    )
    if not num_rows or not has_room or max(fixed, default=0) > num_fixed:
        return None
    linked = {n for how, n in sources[0].values() if how == "written"}
    count = len(first.written)
    return Layout(
        Span(0, num_rows),
        num_fixed,
        shift,
        {n: spans[last.read[n]] for n in shifts},
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
