"""The cubic model scaled by powers of two.

So no absolute tolerance is needed, and subsets rescaled by powers of two give the same
bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.cubic._powers import ZERO_EXPONENT, exponent_of, ldexp
from partnewton.cubic._reductions import reduce_together

__all__ = ["NormalizedModel", "to_own_units"]


class NormalizedModel(NamedTuple):
    """The scaled model: with x = beta y, M(y) = H + y D^2,

    m(eta) = - g . eta + 1/2 eta' H eta + 1 / (3 beta) ||D eta||^3.
    """

    g: jax.Array  # (S,), at most about 1
    H: jax.Array  # (S, S)
    d: jax.Array  # (S,), 0 or in [1/2, 1)
    beta: jax.Array  # ()
    live: jax.Array  # (S,), the subsets to solve for


def to_own_units(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array, live: jax.Array
) -> tuple[NormalizedModel, jax.Array]:
    """Scale the model by powers of two such that D and the shift are of order 1.

    Subset s gets a unit 2^a_s, the shift y a unit 2^b, the gradient another unit 2^c:
    H_st = 2^(a_s + a_t + b) H'_st, D_s = 2^a_s D'_s and g_s = 2^(a_s + c) g'_s, where
    primes denote the normalized model. Hence eta_s = 2^-(a_s + b - c) eta'_s; the
    exponent a + b - c is returned with the model. All of this is exact. If subsets or
    the objective are rescaled by powers of two, a, b and c change, and the normalized
    model does not, except for powers of two in subsets with D_s = 0, which
    `scaled_to_ones` removes.
    """
    limit = jnp.finfo(H.dtype).maxexp // 3  # so that beta^2 is far from overflow
    g = jnp.where(live, g, 0)
    H = jnp.where(live[:, None] & live[None, :], H, 0)
    H_exponent, g_exponent = exponent_of(H), exponent_of(g)
    diagonal_exponent = jnp.diagonal(H_exponent)
    damped = d > 0
    kernel = live & ~damped
    a = jnp.where(damped, exponent_of(d), jnp.where(kernel, diagonal_exponent >> 1, 0))
    (number_damped,) = reduce_together(sums=(damped.astype(jnp.int32),))
    any_damped = number_damped > 0
    damping = jnp.where(any_damped, damping, 1)
    damping_exponent = exponent_of(damping)

    # y is about as large as the largest of: H_st / D_s D_t; what elimination of a
    # kernel subset k adds to that, (H_sk / D_s)^2 / H_kk; and the y of g and D alone,
    # y^2 = damping/2 g_s / D_s.
    row = H_exponent - a[:, None]
    of_kernel = jnp.where(
        kernel[None, :] & (H_exponent > ZERO_EXPONENT),
        2 * row - diagonal_exponent[None, :],
        ZERO_EXPONENT,
    )
    of_H = jnp.where(damped[None, :], row - a[None, :], of_kernel)
    has_slope = g != 0
    of_g = jnp.where(
        has_slope, (damping_exponent + g_exponent - a + 1) >> 1, ZERO_EXPONENT
    )
    of_all = jnp.maximum(of_H, of_g[:, None])
    b, c, of_undamped = reduce_together(
        maxima=(
            jnp.where(damped[:, None], of_all, ZERO_EXPONENT),
            jnp.where(has_slope, g_exponent - a, ZERO_EXPONENT),
            jnp.where(kernel, diagonal_exponent, 0),
        )
    )
    # If there is none, y will be 0, and the units are those of H.
    b = jnp.where(b < ZERO_EXPONENT // 2, of_undamped, b)

    # beta = 2 / damping in these units. c is the exponent of the largest g, increased
    # if beta would exceed 2^limit.
    beta_exponent = 2 * b - damping_exponent
    no_slope = c < ZERO_EXPONENT // 2
    c = jnp.where(any_damped, jnp.maximum(c, beta_exponent - limit), c)
    c = jnp.where(no_slope, beta_exponent, c)
    mantissa = ldexp(damping, -damping_exponent)
    beta = ldexp(2 / mantissa, jnp.clip(beta_exponent - c, -limit, limit))

    model = NormalizedModel(
        g=ldexp(g, -a - c),
        H=ldexp(H, -a[:, None] - a[None, :] - b),
        d=ldexp(d, -a),
        beta=beta,
        live=live,
    )
    return model, a + b - c
