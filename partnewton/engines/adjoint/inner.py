"""Inner products of rows of tangents, and products in which 0 * inf is 0."""

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._strictness import at_least_float32
from partnewton.engines import compat
from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.tangent import Tangent

__all__ = ["dots", "gram", "guarded_product", "where_moved", "wide_dtype", "widened"]


def gram(a: jax.Array, b: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The inner products of rows, (r, *shape) x (c, *shape) -> (r, c), in real numbers.

    Their terms are multiplied by `weight`, an array (*shape). Products are not
    conjugated, as in the transposition of jax.
    """
    dtype = wide_dtype(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    weights = [] if weight is None else [weight.astype(dtype)]
    if compat.is_explicit(a) or compat.is_explicit(b):
        return _weighted(a, b, *weights).real
    if compat.may_be_sharded(a, b):
        # A reshape that joins sharded axes would gather the arrays.
        return lowerings.in_slices(_weighted, [a, b], weights).real
    # One contracted axis: with several, some backends are much slower.
    rows = [x.reshape(len(x), -1) for x in (a, b)]
    rows += [x.reshape(1, -1) for x in weights]
    return lowerings.in_blocks(_weighted, rows).real


def _weighted(a: jax.Array, b: jax.Array, *weight: jax.Array) -> jax.Array:
    for w in weight:
        a = w * a
    axes = tuple(range(1, a.ndim))
    is_explicit = compat.is_explicit(a) or compat.is_explicit(b)
    return jax.lax.dot_general(
        a,
        b,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=a.dtype,
        out_sharding=jax.P(None, None) if is_explicit else None,
    )


def dots(a: jax.Array, b: jax.Array, *, is_guarded: bool = False) -> jax.Array:
    """The inner products of rows, (r, *shape) -> (r,), with those of b or with one b.

    If guarded, a product with a zero factor is zero even if the other one is infinite.
    """
    b, dtype = jnp.broadcast_to(b, a.shape), wide_dtype(a, b)
    product = guarded_product(a.astype(dtype), b.astype(dtype), is_guarded).real
    return lowerings.sum_over(product, tuple(range(1, product.ndim)))


def guarded_product(a: jax.Array, b: jax.Array, is_guarded: bool) -> jax.Array:
    """The product; if guarded, it is zero if a factor is zero, even for 0 * inf."""
    product = a * b
    if not is_guarded:
        return product
    return jnp.where((a == 0) | (b == 0), jnp.zeros_like(product), product)


def where_moved(x: jax.Array, *tangents: Tangent) -> jax.Array:
    """x, with zeros at the entries at which a tangent is zero in all rows."""
    for tangent in tangents:
        moved = jnp.any(tangent.values != 0, axis=0)
        x = jnp.where(moved, x, jnp.zeros_like(x))
    return x


def widened(x: jax.Array) -> jax.Array:
    """The array in float32 or a wider dtype."""
    return x.astype(wide_dtype(x))


def wide_dtype(*arrays: jax.Array) -> np.dtype:
    """The common dtype of arrays, at least float32; float8 dtypes promote with none."""
    wide = [jnp.float32 if x.dtype.itemsize == 1 else x.dtype for x in arrays]
    return at_least_float32(*wide)
