"""Ranges of subsets, by their numbers in the order in which the loss uses them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Span", "hull", "overlap", "segments"]


class Span(NamedTuple):
    """A contiguous range of subsets.

    Attributes:
      start: the number of the first subset.
      count: the number of subsets.
    """

    start: int
    count: int

    @property
    def stop(self) -> int:
        """The number after the last one."""
        return self.start + self.count


def hull(spans: Sequence[Span]) -> Span:
    """The smallest span that contains some others."""
    start = min(span.start for span in spans)
    return Span(start, max(span.stop for span in spans) - start)


def overlap(*spans: Span) -> Span | None:
    """The subsets that spans have in common.

    Args:
      spans: the spans, at least one.

    Returns:
      A span, or None if they have no subset in common.

    Example:
      >>> overlap(Span(0, 4), Span(2, 5))
      Span(start=2, count=2)
    """
    start, stop = max(x.start for x in spans), min(x.stop for x in spans)
    return Span(start, stop - start) if start < stop else None


def segments(spans: Sequence[Span]) -> list[Span]:
    """The hull of some spans, cut at each start and stop of one of them.

    So each of `spans` contains a segment completely, or no subset of it.
    """
    edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
    return [Span(start, stop - start) for start, stop in itertools.pairwise(edges)]
