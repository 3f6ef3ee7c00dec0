"""Cholesky factors of matrices with a diagonal scaled by powers of two."""

import jax
import jax.numpy as jnp
from jax import lax

from partnewton.cubic._powers import ZERO_EXPONENT, exponent_of, power_of_two


def scaled_to_ones(M: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """diag(s) M diag(s) on `live`, its diagonal in [1/2, 2), the identity elsewhere.

    Returns:
      The matrix, and s: powers of two.
    """
    exponent = exponent_of(jnp.where(live, jnp.diagonal(M), 0))
    exponent = jnp.where(exponent > ZERO_EXPONENT, exponent, 0)
    s = power_of_two(-(exponent >> 1), M.dtype)
    identity = jnp.eye(len(M), dtype=M.dtype)
    both = live[:, None] & live[None, :]
    return jnp.where(both, M * s[:, None] * s[None, :], identity), s


def factor(A: jax.Array) -> jax.Array:
    """L with L L' = A; if A is not positive definite, its last pivot is NaN."""
    return lax.linalg.cholesky(A, symmetrize_input=False)


def is_factor(L: jax.Array) -> jax.Array:
    """Whether L is the factor of a positive definite matrix.

    If a pivot is not finite, all later ones are not finite, so the last one is tested.
    """
    return jnp.isfinite(L[-1, -1])


def solve_triangular(
    L: jax.Array, b: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """L^-1 b, or L'^-1 b."""
    return lax.linalg.triangular_solve(
        L, b, left_side=True, lower=True, transpose_a=transpose
    )
