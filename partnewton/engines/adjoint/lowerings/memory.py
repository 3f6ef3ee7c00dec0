"""Large arrays that are written to memory once, and read once."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from partnewton.engines import compat
from partnewton.engines.adjoint.lowerings import switch

__all__ = ["concatenate", "in_blocks", "in_slices", "outlined"]

_LARGE = 2**20  # bytes
_BEYOND_CACHE = 2**23  # numbers
_BLOCK = 2**10  # numbers of each row
_SHORTEST, _LONGEST = 2**6, 2**10  # numbers of each row, of a block on GPUs
_MANY_ROWS = 8  # with fewer rows, each is read only a few times


def concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    """Concatenates along the first axis.

    The concatenation of large arrays is not inlined. Otherwise, XLA fuses it into each
    consumer, and recomputes it there.
    """

    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts)

    is_large = sum(x.nbytes for x in parts) > _LARGE
    return outlined(join)(*parts) if is_large else join(*parts)


def outlined(function: Callable) -> Callable:
    """The function as a call that XLA does not inline."""
    return compat.as_call(function) if switch.are_enabled() else function


def in_blocks(
    product: Callable[..., jax.Array], operands: Sequence[jax.Array]
) -> jax.Array:
    """A sum of products along the last axis of matrices, block by block.

    Matrix products on CPUs read long rows from memory several times. On GPUs, one of
    the many processors computes all of a product with so small a result: with 16 rows
    of 12 million numbers, 124 ms on an H200, and 1 ms in blocks that are independent.

    Args:
      product: from matrices to a matrix, linear in the entries along the last axis.
      operands: the matrices, with equal last axes; the first two are the large ones.
    """
    a, b, *_ = operands
    length = a.shape[1]

    def one_by_one(*operands: jax.Array) -> jax.Array:
        if min(len(a), len(b)) < _MANY_ROWS or a.size + b.size < _BEYOND_CACHE:
            return product(*operands)
        count, rest = divmod(length, _BLOCK)

        def block(n: jax.typing.ArrayLike, size: int) -> jax.Array:
            start = n * _BLOCK
            return product(
                *(
                    jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
                    for x in operands
                )
            )

        total = block(0, _BLOCK)
        total = jax.lax.fori_loop(1, count, lambda n, x: x + block(n, _BLOCK), total)
        return total + block(count, rest) if rest else total

    def at_once(*operands: jax.Array) -> jax.Array:
        count = _divisor(length)
        if count == 1:
            return product(*operands)
        blocks = [x.reshape(len(x), count, length // count) for x in operands]
        return jnp.sum(jax.vmap(product, in_axes=1)(*blocks), axis=0)

    return switch.on_cpu(one_by_one, product, *operands, elsewhere=at_once)


def in_slices(
    product: Callable[..., jax.Array],
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
) -> jax.Array:
    """As :func:`in_blocks`, for arrays that may not be reshaped: slices along axes.

    Args:
      product: a sum over all entries of `rows` and `weights`, to a matrix.
      rows: arrays (r, *shape).
      weights: at most one array (*shape).
    """
    shape = rows[0].shape[1:]
    is_short = math.prod(shape) <= _LONGEST or len(shape) == 1
    if is_short or jax.default_backend() == "cpu" or not switch.are_enabled():
        return product(*rows, *weights)

    def sliced(*operands: jax.Array) -> jax.Array:
        return in_slices(product, operands[: len(rows)], operands[len(rows) :])

    in_axes = (1,) * len(rows) + (0,) * len(weights)
    return jnp.sum(jax.vmap(sliced, in_axes)(*rows, *weights), axis=0)


def _divisor(length: int) -> int:
    """The smallest number of equal blocks that are short enough, or 1."""
    counts = range(max(1, -(-length // _LONGEST)), length // _SHORTEST + 1)
    return next((count for count in counts if length % count == 0), 1)
