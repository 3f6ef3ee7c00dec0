"""Several reductions in one operation.

XLA compiles a variadic reduction to one loop, and separate reductions to one kernel
each, or three on CPU for more than 32 elements. The number of kernels determines the
compile time of a small problem.
"""

import jax
import jax.numpy as jnp
from jax import lax


def reduce_together(
    *,
    sums: tuple[jax.Array, ...] = (),
    maxima: tuple[jax.Array, ...] = (),
    axis: int | None = None,
) -> tuple[jax.Array, ...]:
    """The sums and the maxima of arrays, over one axis or over all axes.

    Args:
      sums: the arrays to sum, all of the same shape and dtype.
      maxima: the arrays whose maximum is computed, of the same dtype; of the same shape
        if there are sums, otherwise of shapes that broadcast.
      axis: the axis; by default all.

    Returns:
      The sums, followed by the maxima. The maximum of an array with NaN is NaN.
    """

    def combine(a: tuple, b: tuple) -> tuple:
        pairs = list(zip(a, b, strict=True))
        added = [lax.add(x, y) for x, y in pairs[: len(sums)]]
        return (*added, *(lax.max(x, y) for x, y in pairs[len(sums) :]))

    dtype = (*sums, *maxima)[0].dtype
    zero = jnp.zeros((), dtype)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    lowest = jnp.full((), -jnp.inf if is_float else jnp.iinfo(dtype).min, dtype)
    initial = (zero,) * len(sums) + (lowest,) * len(maxima)
    rank = max(x.ndim for x in (*sums, *maxima))
    operands = [x.reshape(x.shape + (1,) * (rank - x.ndim)) for x in (*sums, *maxima)]
    operands = jnp.broadcast_arrays(*operands)
    axes = range(operands[0].ndim) if axis is None else (axis,)
    return tuple(lax.reduce(tuple(operands), initial, combine, axes))
