"""Sums over the last axes of arrays, for CPUs.

XLA's CPU backend sums a large array over its last axis with the rows in the innermost
loop. If the length of a row is a power of two, all rows compete for the same cache
lines, which costs a factor of 10. A matrix product with ones reads memory in order.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint.lowerings import switch
from partnewton.engines.compat import Equation

__all__ = ["sum_of_rows", "sum_over"]


def sum_of_rows(equation: Equation) -> Callable[[jax.Array], jax.Array] | None:
    """The sum of an equation, for many rows; None unless it is over the last axes."""
    if equation.primitive.name != "reduce_sum":
        return None
    axes = equation.params["axes"]
    ndim = equation.invars[0].aval.ndim
    return (lambda x: sum_over(x, axes)) if _are_last(axes, ndim) else None


def sum_over(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sum over some axes."""

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axes)

    def by_product(x: jax.Array) -> jax.Array:
        kept = x.shape[: x.ndim - len(axes)]
        x = x.reshape(*kept, math.prod(x.shape[len(kept) :]))
        return x @ jnp.ones(x.shape[-1:], x.dtype)

    if not _are_last(axes, x.ndim) or x.dtype.itemsize < 4:
        return plain(x)
    return switch.on_cpu(by_product, plain, x)


def _are_last(axes: Sequence[int], ndim: int) -> bool:
    """Whether the axes are the last ones, and there are others."""
    return 0 < len(axes) < ndim and sorted(axes) == list(range(ndim - len(axes), ndim))
