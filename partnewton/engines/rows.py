"""Tangents that are sparse over subsets: a row for each subset that moves a value.

When subset s moves along its part of the direction, the derivative of an intermediate
value is one row. Which subsets a value depends on is known at trace time, so a value
carries the rows of these and no others: a weight has one row, its own, and a layer near
the input has few.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import versions

__all__ = ["Rows", "add", "apply", "expanded", "map_rows", "runs", "taken", "union"]

_LARGE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tangents of one value.

    Attributes:
      subsets: the numbers of the subsets that move the value, ascending.
      values: a row for each of them, (len(subsets), *shape of the value).
    """

    subsets: tuple[int, ...]
    values: jax.Array


jax.tree_util.register_dataclass(Rows, data_fields=["values"], meta_fields=["subsets"])


def union(*subsets: Sequence[int]) -> tuple[int, ...]:
    """All of the subsets, ascending."""
    return tuple(sorted(set().union(*subsets)))


def taken(rows: Rows, subsets: Sequence[int]) -> jax.Array:
    """The values of some of the rows."""
    if tuple(subsets) == rows.subsets:
        return rows.values
    places = [rows.subsets.index(s) for s in subsets]
    first, count = places[0], len(places)
    if places == list(range(first, first + count)):
        return jax.lax.slice_in_dim(rows.values, first, first + count)
    return rows.values[np.array(places)]


def expanded(rows: Rows | None, subsets: Sequence[int], like: jax.Array) -> jax.Array:
    """The values of all `subsets`: zeros, of the type of `like`, where there is no row.

    Raises:
      ValueError: a row would be lost.
    """
    if rows is None:
        return _zero_rows(like, len(subsets))
    if not set(rows.subsets) <= set(subsets):
        raise ValueError(f"rows of {rows.subsets} do not fit into {subsets}")
    parts = []
    for run, members in runs([rows], subsets):
        parts.append(taken(rows, run) if members else _zero_rows(like, len(run)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _zero_rows(like: jax.Array, count: int) -> jax.Array:
    return jnp.stack([jnp.zeros_like(like)] * count)


def runs(
    operands: Sequence[Rows | None], subsets: Sequence[int] | None = None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The subsets in runs that the same operands have, with the places of these.

    A row needs no more work than its operands ask for, and a run of rows is worked on
    at once.
    """
    of = [set(x.subsets) if x is not None else set() for x in operands]
    subsets = union(*of) if subsets is None else subsets
    run: list[int] = []
    members: tuple[int, ...] = ()
    for s in subsets:
        having = tuple(i for i, x in enumerate(of) if s in x)
        if run and having != members:
            yield tuple(run), members
            run = []
        run.append(s)
        members = having
    if run:
        yield tuple(run), members


def map_rows(
    function_of: Callable[[tuple[int, ...]], Callable],
    operands: Sequence[Rows | None],
    *,
    takes_rows: bool = False,
) -> list[Rows] | None:
    """A linear function of several tangents on all of their rows.

    Args:
      function_of: from the places of some operands to the function of these alone, as
        if all others were zero; it returns a list of arrays.
      operands: the rows of each operand, or None.
      takes_rows: whether the function is of all rows at once.

    Returns:
      The rows of each result, or None if no operand has any.
    """
    subsets: list[int] = []
    parts: list[list[jax.Array]] = []
    for run, members in runs(operands):
        columns = [taken(operands[i], run) for i in members]
        parts.append(apply(function_of(members), *columns, takes_rows=takes_rows))
        subsets.extend(run)
    if not parts:
        return None
    results = zip(*parts, strict=True)
    return [Rows(tuple(subsets), _joined(x)) for x in results]


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    """The rows of all parts, large ones written but once."""
    if len(parts) == 1:
        return parts[0]

    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts)

    is_large = sum(x.nbytes for x in parts) > _LARGE
    return versions.apart(join)(*parts) if is_large else join(*parts)


def apply(
    function: Callable,
    *columns: jax.Array,
    takes_rows: bool = False,
    most: int | None = None,
) -> list[jax.Array]:
    """The function on each row of some columns, or on all rows if it takes them.

    Args:
      function: of one row of each column, or of all rows; it returns a list of arrays.
      columns: arrays with the rows along the first axis.
      takes_rows: whether the function is of all rows.
      most: how many rows may be worked on at once; by default all.
    """
    if takes_rows:
        return list(function(*columns))
    count = len(columns[0])
    if count == 1:  # no need of a batching rule
        return [y[None] for y in function(*(x[0] for x in columns))]

    def of_row(row: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(function(*row))

    try:
        if most is not None and most < count:
            return list(jax.lax.map(of_row, columns, batch_size=most))
        return list(jax.vmap(of_row)(columns))
    except Exception:  # an operation without a batching rule, or with a broken one
        return list(jax.lax.map(of_row, columns))


def add(*terms: Rows | None) -> Rows | None:
    """The sum of some tangents of one and the same value."""

    def sum_of(members: tuple[int, ...]) -> Callable:
        return lambda *x: [sum(x[1:], start=x[0])]

    terms = tuple(x for x in terms if x is not None)
    if len(terms) < 2:
        return terms[0] if terms else None
    result = map_rows(sum_of, terms)
    return result[0] if result else None
