"""Ranges of subsets, by their numbers in the order in which the loss uses them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax

__all__ = ["DynamicIndex", "Span", "hull", "overlap", "segments"]


@dataclasses.dataclass(frozen=True, eq=False)
class DynamicIndex:
    """The number of a subset that is known only when a program runs.

    This is so in the `lax.scan` over layers that repeat, see `rolled.py`: the subsets
    of the weights differ from one iteration to the next.

    Attributes:
      index: the number.
      size: how many subsets there are.
    """

    index: jax.Array
    size: int


class Span(NamedTuple):
    """A contiguous range of subsets.

    Spans that start at the same `DynamicIndex` contain the same subsets, and spans that
    start at different ones have no subset in common.

    Attributes:
      start: the number of the first subset.
      count: the number of subsets.
    """

    start: int | DynamicIndex
    count: int

    @property
    def is_static(self) -> bool:
        """Whether the numbers of the subsets are known when a function is traced."""
        return not isinstance(self.start, DynamicIndex)

    @property
    def stop(self) -> int:
        """The number after the last one."""
        return self.start + self.count


def hull(spans: Sequence[Span]) -> Span:
    """The smallest span that contains some others."""
    first, *others = dict.fromkeys(spans)
    if not others:
        return first
    for span in spans:
        if not span.is_static:
            return Span(0, span.start.size)
    start = min(span.start for span in spans)
    return Span(start, max(span.stop for span in spans) - start)


def overlap(a: Span, b: Span) -> Span | None:
    """The subsets that two spans have in common.

    Args:
      a, b: the spans.

    Returns:
      A span, or None if they have no subset in common.

    Example:
      >>> overlap(Span(0, 4), Span(2, 5))
      Span(start=2, count=2)
    """
    if a == b:
        return a
    if not a.is_static:
        return a if b.is_static else None
    if not b.is_static:
        return b
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return Span(start, stop - start) if start < stop else None


def segments(spans: Sequence[Span]) -> list[Span]:
    """The hull of static spans, cut at each start and stop of one of them.

    So each of `spans` contains a segment completely, or no subset of it.
    """
    edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
    return [Span(start, stop - start) for start, stop in itertools.pairwise(edges)]
