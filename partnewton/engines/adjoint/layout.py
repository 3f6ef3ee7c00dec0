"""Which repeated parts become one scan, and the rows of their tangents.

See :mod:`partnewton.engines.adjoint.rolled` for an example. The parameters of a part
must depend on the subsets of those of the part before, shifted by one number for all.
With one subset for each tensor, it is the number of tensors in a layer; with one subset
for all weights and another one for all biases, it is 0. What a part reads besides its
parameters must have been written or read by the part before.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

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
    for run, shift in _with_one_shift(parts, leaves, spans):
        for group in _groups(run):
            yield group, _layout(group, shift, leaves, spans)


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
class Layout:
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
) -> Layout | None:
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
    return Layout(
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
