"""Repetitions in a sequence: a pattern that occurs several times in a row.

A stretch x_a, ..., x_b has period p if x_i = x_(i + p) wherever both are in it. So for
each p, the sequence is compared with itself shifted by p: a run of m equal entries is a
stretch of length m + p, in which the pattern occurs m // p + 1 times.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

__all__ = ["repetitions"]


def repetitions(
    sequence: Sequence[Hashable], least: int
) -> Iterator[tuple[int, int, int]]:
    """The largest repetitions, in order.

    The largest one is that whose repeated occurrences, all but one, have most entries.
    Then, repetitions are searched before and after it.

    Args:
      sequence: the entries.
      least: the least number of entries in all occurrences but one.

    Yields:
      The start, the period and the number of occurrences of a pattern.

    Example:
      >>> list(repetitions("xabababyzzz", least=2))
      [(1, 2, 3), (8, 1, 3)]
    """
    ids: dict[Hashable, int] = {}
    numbers = [ids.setdefault(x, len(ids)) for x in sequence]
    yield from _repetitions(np.array(numbers), least, 0)


def _repetitions(
    numbers: np.ndarray, least: int, offset: int
) -> Iterator[tuple[int, int, int]]:
    nothing = 0, 0, 1
    saved, start, period = max(_stretches(numbers), key=lambda x: x[0], default=nothing)
    if saved < least:
        return
    count = saved // period + 1
    stop = start + period * count
    yield from _repetitions(numbers[:start], least, offset)
    yield offset + start, period, count
    yield from _repetitions(numbers[stop:], least, offset + stop)


def _stretches(numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """The number of repeated entries, the start and the period of each stretch."""
    for p in range(1, len(numbers) // 2 + 1):
        equal = np.concatenate([[False], numbers[:-p] == numbers[p:], [False]])
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        for a, b in edges.reshape(-1, 2).tolist():
            yield (b - a) // p * p, a, p
