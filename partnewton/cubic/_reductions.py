"""Several reductions in one operation.

XLA compiles a variadic reduction to one loop. Separate reductions compile to a kernel
each, on CPU to three each where there are more than 32 numbers, and kernels are what
the compile time of a small problem is made of.
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
    """The sums, then the maxima, of arrays of one dtype, over one axis or over all.

    The arrays have one shape; without sums, shapes that can be broadcast.

    NaN in an array is NaN in its maximum.
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
