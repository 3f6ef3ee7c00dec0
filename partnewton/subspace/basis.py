"""Orthonormal bases, one per subset, of the span of several directions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from partnewton.cubic._powers import exponent_of, ldexp, power_of_two
from partnewton.partitions import Partition
from partnewton.partitions.partition import sharded_like

__all__ = ["combine", "orthonormal"]

Leaves = list[jax.Array]


def orthonormal(directions: Sequence[Leaves], partition: Partition) -> Leaves:
    """Vectors that are orthonormal, or zero, on each subset, with the same span.

    Classical Gram-Schmidt with two reorthogonalisations of the vectors themselves. A
    Gram matrix of the vectors would lose half of the digits. A vector of which the
    first pass leaves only rounding error, a fraction of 4 K eps, is zero on that
    subset. The result does not depend on the scale of a vector on a subset. Vectors
    that are not finite count as zero.

    Args:
      directions: K lists of arrays, the leaves of the K directions.
      partition: of these leaves, none of which is frozen.

    Returns:
      The leaves of all vectors in `partition.dtype`, with a leading axis of length K.
    """
    rounding = 4 * len(directions) * jnp.finfo(partition.dtype).eps
    stacked = [
        jnp.stack([x.astype(partition.dtype) for x in leaf])
        for leaf in zip(*directions, strict=True)
    ]

    def add(i: jax.Array, basis: Leaves) -> Leaves:
        def without_basis(v: Leaves, _: None) -> tuple[Leaves, jax.Array]:
            v, norms = _normalized(v, partition)
            coefficients = jax.vmap(lambda q: partition.inner(q, v))(basis)
            projection = combine(basis, coefficients, partition)
            return [x - y for x, y in zip(v, projection, strict=True)], norms

        v, norms = jax.lax.scan(without_basis, [x[i] for x in stacked], length=3)
        is_kept = (norms[0] > 0) & (norms[1] > rounding)
        v = partition.scaled(v, is_kept.astype(partition.dtype))
        return [q.at[i].set(x) for q, x in zip(basis, v, strict=True)]

    # A loop, of which the body is compiled once.
    zeros = [jnp.zeros_like(x) for x in stacked]
    return jax.lax.fori_loop(0, len(directions), add, zeros)


def combine(basis: Leaves, coefficients: jax.Array, partition: Partition) -> Leaves:
    """sum_k coefficients[k, s] * basis[k] on each subset s."""
    terms = jax.vmap(partition.scaled)(basis, coefficients)
    return [jnp.sum(x, axis=0) for x in terms]


def _normalized(v: Leaves, partition: Partition) -> tuple[Leaves, jax.Array]:
    """v / ||v|| on each subset, and the norms; without overflow or underflow."""
    largest = partition.largest(v)
    is_usable = jnp.isfinite(largest) & (largest > 0)
    # By a power of two, which is exact; in two steps, as it alone may be out of range.
    exponent = exponent_of(jnp.where(is_usable, largest, 1))
    half = exponent >> 1
    v = [
        jnp.where(sharded_like(x, ok), x, 0)
        for x, ok in zip(v, partition.broadcast_to_leaves(is_usable), strict=True)
    ]
    for e in (half, exponent - half):
        v = partition.scaled(v, power_of_two(-e, partition.dtype))
    norms = jnp.sqrt(partition.inner(v, v))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    v = partition.scaled(v, inverse)
    return v, jnp.where(is_usable, ldexp(norms, exponent), 0)
