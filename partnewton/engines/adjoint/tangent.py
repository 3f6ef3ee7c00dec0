"""Derivatives of values along subsets, with rows for those that a value depends on.

The derivative of a value along the direction of subset s is one row of its tangent. The
subsets on which a value depends are known when the loss is traced, and subsets are
numbered in the order in which the loss uses them. So the rows of a tangent belong to a
contiguous range of subsets, its span: that of a weight has one row; those of layers
near the input have few.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.spans import Span, overlap, segments

__all__ = ["Jet", "Tangent", "add", "densify", "densify_jet", "restrict"]


@dataclasses.dataclass(frozen=True)
class Tangent:
    """The derivatives of one value along some subsets.

    Attributes:
      values: a row for each subset, (rows, *shape of the value).
      start: the number of the subset of the first row.
    """

    values: jax.Array
    start: int = 0

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
    if overlap(tangent.span, span) != span:
        return densify(tangent, span)
    start = span.start - tangent.start
    return jax.lax.slice_in_dim(tangent.values, start, start + span.count)


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
    if tangent.span == span:
        return tangent.values
    before, after = tangent.start - span.start, span.stop - tangent.span.stop
    if min(before, after) < 0:
        raise ValueError(f"the rows of {tangent.span} are not all inside of {span}.")
    parts = [tangent.values]
    if before:
        parts.insert(0, _zero_rows(tangent.values[:1], before))
    if after:
        parts.append(_zero_rows(tangent.values[:1], after))
    return jnp.concatenate(parts)


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
    tangents = [x for x in terms if x is not None]
    by_span: dict[Span, list[Tangent]] = {}
    for x in tangents:
        by_span.setdefault(x.span, []).append(x)
    sums = [
        Tangent(sum((x.values for x in some[1:]), start=some[0].values), span.start)
        for span, some in by_span.items()
    ]
    if len(sums) < 2:
        return sums[0] if sums else None
    spans = list(by_span)
    parts = [_sum_on(some, sums) for some in segments(spans)]
    return Tangent(lowerings.concatenate(parts), min(span.start for span in spans))


def _sum_on(span: Span, tangents: list[Tangent]) -> jax.Array:
    """The sum of the rows of some subsets; each tangent has all of them or none."""
    rows = [restrict(x, span) for x in tangents if overlap(x.span, span)]
    if not rows:
        return _zero_rows(tangents[0].values[:1], span.count)
    return sum(rows[1:], start=rows[0])


def _zero_rows(row: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(jnp.zeros_like(row), (count, *row.shape[1:]))
