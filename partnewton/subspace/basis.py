"""Orthonormal bases, one per subset, of the span of several directions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from partnewton.cubic._powers import exponent_of, ldexp
from partnewton.partitions import Partition
from partnewton.partitions.partition import sharded_like

__all__ = ["combine", "orthonormal"]

Leaves = list[jax.Array]


def orthonormal(directions: Sequence[Leaves], partition: Partition) -> list[Leaves]:
    """Vectors that are orthonormal, or zero, on each subset, with the same span.

    Classical Gram-Schmidt with one reorthogonalisation of the vectors themselves. A
    Gram matrix of the vectors would lose half of the digits. A vector of which the
    first pass leaves only rounding error, a fraction of 4 K eps, is zero on that
    subset. The result does not depend on the scale of a vector on a subset. Vectors
    that are not finite count as zero.

    Args:
      directions: K lists of arrays, the leaves of the K directions.
      partition: of these leaves, none of which is frozen.

    Returns:
      K lists of arrays in `partition.dtype`.
    """
    rounding = 4 * len(directions) * jnp.finfo(partition.dtype).eps
    basis: list[Leaves] = []
    for direction in directions:
        v, _ = _normalized([x.astype(partition.dtype) for x in direction], partition)
        if basis:
            v, left = _normalized(_without(v, basis, partition), partition)
            v, _ = _normalized(_without(v, basis, partition), partition)
            v = partition.scaled(v, (left > rounding).astype(partition.dtype))
        basis.append(v)
    return basis


def combine(
    basis: Sequence[Leaves], coefficients: jax.Array, partition: Partition
) -> Leaves:
    """sum_k coefficients[k, s] * basis[k] on each subset s."""
    terms = [partition.scaled(q, c) for q, c in zip(basis, coefficients, strict=True)]
    return [sum(leaf[1:], leaf[0]) for leaf in zip(*terms, strict=True)]


def _without(v: Leaves, basis: Sequence[Leaves], partition: Partition) -> Leaves:
    """v minus its projection on the basis."""
    coefficients = jnp.stack([partition.inner(q, v) for q in basis])
    projection = combine(basis, coefficients, partition)
    return [x - y for x, y in zip(v, projection, strict=True)]


def _normalized(v: Leaves, partition: Partition) -> tuple[Leaves, jax.Array]:
    """v / ||v|| on each subset, and the norms; without overflow or underflow."""
    largest = partition.largest(v)
    is_usable = jnp.isfinite(largest) & (largest > 0)
    # By a power of two, which is exact.
    exponent = exponent_of(jnp.where(is_usable, largest, 1))
    v = [
        jnp.where(sharded_like(x, ok), ldexp(x, sharded_like(x, -e)), 0)
        for x, e, ok in zip(
            v,
            partition.broadcast_to_leaves(exponent),
            partition.broadcast_to_leaves(is_usable),
            strict=True,
        )
    ]
    norms = jnp.sqrt(partition.inner(v, v))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    v = partition.scaled(v, inverse)
    return v, jnp.where(is_usable, ldexp(norms, exponent), 0)
