"""Derivatives of values along subsets, with rows for those that a value depends on.

The derivative of a value along the direction of subset s is one row of its tangent. The
subsets on which a value depends are known when the loss is traced, and subsets are
numbered in the order in which the loss uses them. So the rows of a tangent belong to a
contiguous range of subsets, its span: that of a weight has one row; those of layers
near the input have few.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint import lowerings

__all__ = [
    "Jet",
    "Place",
    "Span",
    "Tangent",
    "add",
    "apply",
    "densify",
    "group_by_support",
    "hull",
    "overlap",
    "push",
    "restrict",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """The number of a subset, where it is known only when a program runs.

    Attributes:
      index: the number.
      size: how many subsets there are.
    """

    index: jax.Array
    size: int


class Span(NamedTuple):
    """A contiguous range of subsets.

    Spans that start at the same `Place` contain the same subsets, and spans that start
    at different places have no subset in common.

    Attributes:
      start: the number of the first subset.
      count: the number of subsets.
    """

    start: int | Place
    count: int

    @property
    def is_static(self) -> bool:
        """Whether the numbers of the subsets are known when a function is traced."""
        return not isinstance(self.start, Place)

    @property
    def stop(self) -> int:
        """The number after the last one."""
        return self.start + self.count


@dataclasses.dataclass(frozen=True)
class Tangent:
    """The derivatives of one value along some subsets.

    Attributes:
      values: a row for each subset, (rows, *shape of the value).
      start: the number of the subset of the first row.
    """

    values: jax.Array
    start: int | Place = 0

    @property
    def span(self) -> Span:
        """The subsets of the rows."""
        return Span(self.start, len(self.values))


jax.tree_util.register_dataclass(Tangent, data_fields=["values"], meta_fields=["start"])


class Jet(NamedTuple):
    """First and second derivatives of one value.

    Attributes:
      first: its derivatives along each subset; None if they are zero.
      second: its second derivatives, twice along each subset; None if they are zero, or
        if the third order is not requested.
    """

    first: Tangent | None = None
    second: Tangent | None = None


# --- Which rows there are ------------------------------------------------------------


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


def group_by_support(
    tangents: Sequence[Tangent | None],
) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """Spans on each of which the same tangents have rows, and the places of these."""
    spans = [x.span for x in tangents if x is not None]
    if not all(span.is_static for span in spans):
        yield hull(spans), tuple(n for n, x in enumerate(tangents) if x is not None)
        return
    edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
    for start, stop in itertools.pairwise(edges):
        members = tuple(
            n
            for n, x in enumerate(tangents)
            if x is not None and x.span.start <= start and stop <= x.span.stop
        )
        if members:
            yield Span(start, stop - start), members


# --- Rows taken out and put together -------------------------------------------------


def restrict(tangent: Tangent, span: Span) -> jax.Array:
    """The rows of some of the subsets.

    Args:
      tangent: the tangent.
      span: the subsets, some of which the tangent has rows for.

    Returns:
      An array (span.count, *shape), zero where the tangent has no row.

    Example:
      >>> restrict(Tangent(jnp.array([5.0, 6.0, 7.0]), start=1), Span(2, 2)).tolist()
      [6.0, 7.0]
    """
    if tangent.span == span:
        return tangent.values
    if not span.is_static and tangent.span.is_static:
        start = span.start.index
        return jax.lax.dynamic_slice_in_dim(tangent.values, start, span.count)
    common = overlap(tangent.span, span)
    if common != span:
        return densify(tangent, span)
    start = span.start - tangent.start
    return jax.lax.slice_in_dim(tangent.values, start, start + span.count)


def densify(tangent: Tangent | None, span: Span, like: jax.Array | None = None):
    """The rows of all subsets of a span that includes the tangent's own.

    Args:
      tangent: the tangent, or None for zeros.
      span: the subsets.
      like: the value that the tangent is of; needed for None only.

    Returns:
      An array (span.count, *shape), zero where the tangent has no row.

    Example:
      >>> densify(Tangent(jnp.array([5.0, 6.0]), start=1), Span(0, 4)).tolist()
      [0.0, 5.0, 6.0, 0.0]

    Raises:
      ValueError: a row would be lost.
    """
    if tangent is None:
        return _zeros(like[None], span.count)
    if tangent.span == span:
        return tangent.values
    if not tangent.span.is_static:
        empty = _zeros(tangent.values[:1], span.count)
        return _put(empty, tangent, span)
    before, after = tangent.start - span.start, span.stop - tangent.span.stop
    if min(before, after) < 0:
        raise ValueError(f"the rows of {tangent.span} do not fit into {span}")
    parts = [tangent.values]
    if before:
        parts.insert(0, _zeros(tangent.values[:1], before))
    if after:
        parts.append(_zeros(tangent.values[:1], after))
    return jnp.concatenate(parts)


def add(*terms: Tangent | None) -> Tangent | None:
    """The sum of tangents of the same value, which may have different spans.

    Args:
      terms: the tangents; None stands for zero.

    Returns:
      A tangent, or None if all are None.

    Example:
      >>> total = add(Tangent(jnp.ones(2), start=0), Tangent(jnp.ones(2), start=1))
      >>> total.values.tolist()
      [1.0, 2.0, 1.0]
    """
    tangents = [x for x in terms if x is not None]
    by_span: dict[Span, list[Tangent]] = {}
    for x in tangents:
        by_span.setdefault(x.span, []).append(x)
    sums = [
        Tangent(sum((x.values for x in some[1:]), start=some[0].values), span.start)
        for span, some in by_span.items()
    ]
    return _assembled(sums) if sums else None


def _assembled(tangents: list[Tangent]) -> Tangent:
    """The sum of tangents with different spans."""
    if len(tangents) == 1:
        return tangents[0]
    span = hull([x.span for x in tangents])
    if span.is_static and all(x.span.is_static for x in tangents):
        ordered = sorted(tangents, key=lambda x: x.start)
        if sum(x.span.count for x in ordered) == span.count and all(
            a.span.stop == b.start for a, b in itertools.pairwise(ordered)
        ):
            return Tangent(
                lowerings.concatenate([x.values for x in ordered]), span.start
            )
    largest = max(tangents, key=lambda x: x.span.count)
    total = densify(largest, span)
    for x in tangents:
        if x is not largest:
            total = _put(total, x, span)
    return Tangent(total, span.start)


def _put(total: jax.Array, tangent: Tangent, span: Span) -> jax.Array:
    """Adds rows to those of the same subsets."""
    if tangent.span.is_static:
        start = tangent.start - span.start
    else:
        start = tangent.start.index
    some = jax.lax.dynamic_slice_in_dim(total, start, tangent.span.count)
    return jax.lax.dynamic_update_slice_in_dim(total, some + tangent.values, start, 0)


def _zeros(row: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(jnp.zeros_like(row), (count, *row.shape[1:]))


# --- Functions of rows ---------------------------------------------------------------


def push(
    function_of: Callable[[tuple[int, ...]], Callable],
    tangents: Sequence[Tangent | None],
    *,
    takes_rows: bool = False,
) -> list[Tangent] | None:
    """Applies a linear function of several operands to the rows of their tangents.

    Args:
      function_of: maps the positions of some operands to the linear function of these,
        the others being zero: from one row of each to a list of arrays.
      tangents: the tangent of each operand, or None.
      takes_rows: whether the function is given all rows at once instead of one.

    Returns:
      The tangents of each result, or None if no operand has any.

    Example:
      >>> (twice,) = push(lambda _: lambda row: [2 * row], [Tangent(jnp.ones((1, 3)))])
      >>> twice.values.tolist()
      [[2.0, 2.0, 2.0]]
    """
    members: dict[Span, list[int]] = {}
    for n, x in enumerate(tangents):
        if x is not None:
            members.setdefault(x.span, []).append(n)
    parts = []
    for span, places in members.items():
        columns = [tangents[n].values for n in places]
        results = apply(function_of(tuple(places)), *columns, takes_rows=takes_rows)
        parts.append([Tangent(y, span.start) for y in results])
    if not parts:
        return None
    return [_assembled(list(column)) for column in zip(*parts, strict=True)]


def apply(
    function: Callable,
    *columns: jax.Array,
    takes_rows: bool = False,
    batch_size: int | None = None,
) -> list[jax.Array]:
    """Applies a function to each row of some arrays.

    Args:
      function: from one row of each array, or from all rows, to a list of arrays.
      columns: the arrays, with the rows along the first axis.
      takes_rows: whether the function is given all rows at once instead of one.
      batch_size: the number of rows that are computed at once; by default all.
    """
    if takes_rows:
        return list(function(*columns))
    count = len(columns[0])
    if count == 1:  # no need of a batching rule
        return [y[None] for y in function(*(x[0] for x in columns))]

    def of_row(row: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(function(*row))

    try:
        if batch_size is not None and batch_size < count:
            return list(jax.lax.map(of_row, columns, batch_size=batch_size))
        return list(jax.vmap(of_row)(columns))
    except Exception:  # an operation without a batching rule, or with a broken one
        return list(jax.lax.map(of_row, columns))
