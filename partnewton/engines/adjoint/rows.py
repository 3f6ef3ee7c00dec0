"""Functions applied to the rows of tangents."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint.spans import Span, overlap, segments
from partnewton.engines.adjoint.tangent import Tangent, add, common_rows

__all__ = ["apply", "group_by_support", "on_common_rows", "push", "with_zeros"]


def group_by_support(
    tangents: Sequence[Tangent | None],
) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """Spans on which the same tangents have rows, and the positions of these."""
    for span in segments([x.span for x in tangents if x is not None]):
        members = tuple(
            n for n, x in enumerate(tangents) if x is not None and overlap(x.span, span)
        )
        if members:
            yield span, members


def push(
    function_of: Callable[[tuple[int, ...]], Callable],
    tangents: Sequence[Tangent | None],
    *,
    takes_rows: bool = False,
) -> list[Tangent] | None:
    """Applies a linear function of several operands to the rows of their tangents.

    The operands may have tangents of different spans. Those of the same span are
    processed together, and the results are added.

    Args:
      function_of: maps a tuple of positions of operands to a function, which computes
        the results if all other operands are zero: from one row of each of these
        operands to a list of arrays.
      tangents: the tangent of each operand, or None.
      takes_rows: whether the function is given all rows at once instead of one.

    Returns:
      The tangents of each result, or None if no operand has any.

    Example:
      >>> import jax.numpy as jnp
      >>> (twice,) = push(lambda _: lambda row: [2 * row], [Tangent(jnp.ones((1, 3)))])
      >>> twice.values.tolist()
      [[2.0, 2.0, 2.0]]
    """
    found = [(n, x) for n, x in enumerate(tangents) if x is not None]
    parts = []
    for span in dict.fromkeys(x.span for _, x in found):
        some = {n: x.values for n, x in found if x.span == span}
        function = function_of(tuple(some))
        results = apply(function, *some.values(), takes_rows=takes_rows)
        parts.append([Tangent(y, span.start) for y in results])
    return [add(*column) for column in zip(*parts, strict=True)] or None


def with_zeros(
    function: Callable, operands: Sequence[jax.Array], members: Sequence[int]
) -> Callable:
    """A function of all operands as one of some, in which the others are zero."""

    def of_members(*some: jax.Array) -> Any:
        everything = list(map(jnp.zeros_like, operands))
        for n, x in zip(members, some, strict=True):
            everything[n] = x
        return function(*everything)

    return of_members


def on_common_rows(
    function: Callable, *tangents: Tangent | None, takes_rows: bool = False
) -> Tangent | None:
    """A function of rows, for the subsets for which all tangents have rows."""
    span, columns = common_rows(*tangents)
    if span is None:
        return None
    (values,) = apply(function, *columns, takes_rows=takes_rows)
    return Tangent(values, span.start)


def apply(
    function: Callable,
    *columns: jax.Array,
    takes_rows: bool = False,
    batch_size: int | None = None,
) -> list[jax.Array]:
    """Applies a function, whose results are a list, to each row of some arrays.

    The function is given one row of each array; all at once if it `takes_rows`. At most
    `batch_size` rows are computed at once.
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
