"""The derivative of the minimiser of the cubic model, by the implicit function theorem.

With p = D^2 eta and r = ||D eta||, the minimiser satisfies

    F(eta) = H eta + damping/2 r p - g = 0,

so that, with the Hessian of the model at the minimiser,

    K = H + damping/2 (r D^2 + p p' / r),        K deta = - dF,

where dF is the differential of F with respect to the arguments for fixed eta. The
decrease of the model is stationary in eta, so its differential is that for fixed eta.
"""

import jax
import jax.numpy as jnp
from jax import lax


def solution_tangent(
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array, ...],
    eta: jax.Array,
    radius: jax.Array,
    live: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tangents of eta, of the radius and of the decrease of the model.

    Args:
      primals: g, H, d and damping, the arguments of :func:`solve_cubic`.
      tangents: their tangents.
      eta: the minimiser, shape (S,).
      radius: ``||d * eta||``, shape ().
      live: the subsets that were solved for, shape (S,); the rates of all others are
        zero.

    Returns:
      Three arrays, linear in the tangents. If K is not positive definite, the minimiser
      is not differentiable and its tangent is set to zero.
    """
    _, H, d, damping = primals
    dg, dH, dd, ddamping = tangents
    p = d * d * eta
    per_radius = jnp.where(radius > 0, 1 / jnp.where(radius > 0, radius, 1), 0)
    K = H / 2 + H.T / 2 + jnp.diag(damping / 2 * radius * d * d)
    K += damping / 2 * per_radius * p[:, None] * p[None, :]
    half_dradius = jnp.sum(d * eta * eta * dd) * per_radius  # for fixed eta
    curvature = jnp.sum((dH / 2 + dH.T / 2) * eta[None, :], 1)
    rhs = dg - curvature - ddamping / 2 * radius * p
    rhs -= damping * radius * d * eta * dd + damping / 2 * half_dradius * p

    # Scaled to a unit diagonal, and replaced by the identity outside of `live`.
    diagonal = jnp.where(live, jnp.diagonal(K), 1)
    is_positive = diagonal > 0
    scale = jnp.where(is_positive, lax.rsqrt(jnp.where(is_positive, diagonal, 1)), 1)
    identity = jnp.eye(len(eta), dtype=eta.dtype)
    scaled = scale[:, None] * K * scale[None, :]
    scaled = jnp.where(live[:, None] & live[None, :], scaled, identity)
    L = lax.linalg.cholesky(scaled, symmetrize_input=False)
    known = jnp.all(jnp.isfinite(L))
    L = jnp.where(known, L, identity)
    deta = jnp.where(live & known, scale * rhs, 0)[:, None]
    for transpose in (False, True):
        deta = lax.linalg.triangular_solve(
            L, deta, left_side=True, lower=True, transpose_a=transpose
        )
    deta = jnp.where(live & known, scale * deta[:, 0], 0)
    dradius = half_dradius + per_radius * jnp.sum(p * deta)
    ddecrease = jnp.sum(eta * dg) - jnp.sum(eta * curvature) / 2
    ddecrease -= radius**2 * (ddamping / 6 * radius + damping / 2 * half_dradius)
    return deta, dradius, ddecrease
