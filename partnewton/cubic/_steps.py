"""The decrease of the cubic model for a step, in the units of the caller."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.cubic._powers import exponent_of, ldexp
from partnewton.cubic._reductions import reduce_together

__all__ = ["ROUNDING_UNITS", "AppraisedStep", "appraise"]

ROUNDING_UNITS = 4  # bound of rounding errors, in units of eps times the terms


class AppraisedStep(NamedTuple):
    """A step and its decrease of the model, in the caller's units."""

    eta: jax.Array  # (S,)
    radius: jax.Array  # ()
    decrease: jax.Array  # ()
    descends: jax.Array  # (), whether the decrease exceeds rounding errors


def appraise(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array, eta: jax.Array
) -> AppraisedStep:
    """The model at eta, all terms in units of the largest of them, 2^unit."""
    moves = eta != 0
    g, d = jnp.where(moves, g, 0), jnp.where(moves, d, 0)
    H = jnp.where(moves[:, None] & moves[None, :], H, 0)
    of_eta = jnp.where(moves, exponent_of(eta), 0)
    # ||D eta|| in units of 2^of_d, and so on.
    of_d, of_g, of_H = reduce_together(
        maxima=(
            exponent_of(d) + of_eta,
            exponent_of(g) + of_eta,
            exponent_of(H) + of_eta[:, None] + of_eta[None, :],
        )
    )
    of_cubic = exponent_of(damping) + 3 * of_d
    unit = jnp.maximum(jnp.maximum(of_g, of_H), of_cubic)

    mantissa = ldexp(eta, -of_eta)
    image = ldexp(d, of_eta - of_d) * mantissa
    slopes = mantissa * ldexp(g, of_eta - unit)
    curvatures = ldexp(H, of_eta[:, None] + of_eta[None, :] - unit)
    curvatures = mantissa[:, None] * curvatures * mantissa[None, :]
    of_row = reduce_together(sums=(curvatures, jnp.abs(curvatures)), axis=1)
    slope, slope_size, curvature, curvature_size, square = reduce_together(
        sums=(slopes, jnp.abs(slopes), *of_row, image * image)
    )
    radius = jnp.sqrt(square)
    cubic = ldexp(damping / 6, 3 * of_d - unit) * radius**3
    decrease = slope - curvature / 2 - cubic
    size = slope_size + curvature_size / 2 + cubic
    return AppraisedStep(
        eta=eta,
        radius=ldexp(radius, of_d),
        decrease=ldexp(decrease, unit),
        descends=decrease >= ROUNDING_UNITS * jnp.finfo(H.dtype).eps * size,
    )
