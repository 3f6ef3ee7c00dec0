"""Derivatives of values along subsets, with rows for those that a value depends on.

The derivative of a value along the direction of subset s is one row of its tangent. The
subsets on which a value depends are known when the loss is traced, and subsets are
numbered in the order in which the loss uses them. So the rows of a tangent belong to a
contiguous range of subsets, its span: that of a weight has one row; those of layers
near the input have few.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.spans import Span, hull, overlap, segments

__all__ = [
    "Jet",
    "Tangent",
    "add",
    "common_rows",
    "densify",
    "densify_jet",
    "restrict",
    "sums_by_span",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tangent:
    """The derivatives of one value along some subsets.

    Attributes:
      values: a row for each subset, (rows, *shape of the value).
      start: the number of the subset of the first row.
    """

    values: jax.Array
    start: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def span(self) -> Span:
        """The subsets of the rows."""
        return Span(self.start, len(self.values))


class Jet(NamedTuple):
    """First and second derivatives of one value.

    Attributes:
      first: its derivatives along each subset; None if they are zero.
      second: its second derivatives, twice along each subset; None if they are zero, or
        if the third order is not requested.
    """

    first: Tangent | None = None
    second: Tangent | None = None


def restrict(tangent: Tangent, span: Span) -> jax.Array:
    """The rows of the subsets of a span.

    Args:
      tangent: the tangent.
      span: the subsets.

    Returns:
      An array (span.count, *shape), zero where the tangent has no row.

    Example:
      >>> restrict(Tangent(jnp.array([5.0, 6.0, 7.0]), start=1), Span(2, 2)).tolist()
      [6.0, 7.0]
    """
    if tangent.span == span:
        return tangent.values
    values, common = tangent.values, overlap(tangent.span, span)
    if common is None:
        return _zero_rows(values, span.count)
    start = common.start - tangent.start
    parts = [values[start : start + common.count]]
    if common.start > span.start:
        parts.insert(0, _zero_rows(values, common.start - span.start))
    if common.stop < span.stop:
        parts.append(_zero_rows(values, span.stop - common.stop))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def densify(
    tangent: Tangent | None, span: Span, like: jax.Array | None = None
) -> jax.Array:
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
      ValueError: the tangent has a row outside of the span.
    """
    if tangent is None:
        return _zero_rows(like[None], span.count)
    if overlap(tangent.span, span) != tangent.span:
        raise ValueError(f"the rows of {tangent.span} are not all inside of {span}.")
    return restrict(tangent, span)


def densify_jet(jet: Jet, span: Span, num_orders: int, like: jax.Array) -> Jet:
    """The jet with all rows of a span, of the first one or two orders, none of None."""
    return Jet(*(Tangent(densify(x, span, like), span.start) for x in jet[:num_orders]))


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
    sums = sums_by_span(terms)
    if len(sums) < 2:
        return sums[0] if sums else None
    spans = [x.span for x in sums]
    parts = []
    for span in segments(spans):  # each tangent has all of its rows or none
        rows = [restrict(x, span) for x in sums if overlap(x.span, span)]
        rows = rows or [restrict(sums[0], span)]
        parts.append(sum(rows[1:], start=rows[0]))
    return Tangent(lowerings.concatenate(parts), hull(spans).start)


def sums_by_span(terms: Iterable[Tangent | None]) -> list[Tangent]:
    """The sums of those tangents that have the same span."""
    sums: dict[Span, jax.Array] = {}
    for x in terms:
        if x is not None:
            sums[x.span] = sums[x.span] + x.values if x.span in sums else x.values
    return [Tangent(values, span.start) for span, values in sums.items()]


def common_rows(*tangents: Tangent | None) -> tuple[Span | None, list[jax.Array]]:
    """The subsets for which all tangents have rows, and these rows."""
    if any(x is None for x in tangents):
        return None, []
    span = overlap(*(x.span for x in tangents))
    return span, [restrict(x, span) for x in tangents] if span else []


def _zero_rows(rows: jax.Array, count: int) -> jax.Array:
    """Zeros of the type of some rows."""
    return jnp.broadcast_to(jnp.zeros_like(rows[:1]), (count, *rows.shape[1:]))
