"""Formulas that several rules share."""

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.summary import Summary


def third_order_scale(third: jax.Array) -> jax.Array:
    """|third|^(1/3); 0 where the third order is not finite."""
    known = jnp.isfinite(third) & (third != 0)
    return jnp.where(known, jnp.cbrt(jnp.abs(jnp.where(known, third, 1))), 0)


def quadratic_decrease(summary: Summary, eta: jax.Array) -> jax.Array:
    """gradient . eta - 1/2 eta' hessian eta."""
    quadratic = jnp.sum(eta[:, None] * summary.hessian * eta[None, :])
    return jnp.sum(summary.gradient * eta) - quadratic / 2


def clip(eta: jax.Array, nonnegative: bool) -> jax.Array:
    """eta, with negative rates set to zero if `nonnegative`."""
    return jnp.maximum(eta, 0) if nonnegative else eta


def sqrt(x: jax.Array) -> jax.Array:
    """The square root of x >= 0, with the derivative zero at zero."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


@jax.custom_jvp
def positive_root(
    g: jax.Array, h: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The positive root of c/2 x^2 + h x - g = 0, or zero, and whether it exists.

    The formula is free of cancellation for either sign of h. g and c are nonnegative.
    """
    root = jnp.hypot(h, jnp.sqrt(2 * c) * jnp.sqrt(g))
    numerator = jnp.where(h > 0, 2 * g, root - h)
    denominator = jnp.where(h > 0, h + root, c)
    exists = denominator > 0
    return jnp.where(exists, numerator / jnp.where(exists, denominator, 1), 0), exists


@positive_root.defjvp
def _positive_root_jvp(primals: tuple, tangents: tuple) -> tuple:
    """By the implicit function theorem; zero at a double root."""
    g, h, c = primals
    dg, dh, dc = tangents
    x, exists = positive_root(g, h, c)
    slope = jnp.hypot(h, jnp.sqrt(2 * c) * jnp.sqrt(g))  # h + c x
    is_simple = exists & (slope > 0)
    dx = (dg - x * dh - x * x / 2 * dc) / jnp.where(is_simple, slope, 1)
    no_tangent = np.zeros(exists.shape, jax.dtypes.float0)
    return (x, exists), (jnp.where(is_simple, dx, 0), no_tangent)
