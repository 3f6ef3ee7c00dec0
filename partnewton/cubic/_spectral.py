"""The cubic model with an isotropic third-order term and no negative curvature.

With |B| = V |w| V', where B = V w V' is a symmetric matrix, the minimiser over z of

    - b . z + 1/2 z' |B| z + damping/6 ||z||^3

is z = V (c / (|w| + y)) with c = V' b and y = damping/2 ||z||. So y solves one scalar
equation: with n(y) = ||c / (|w| + y)||,

    y / n(y) = damping/2.

1 / n is concave and increasing. Replaced by its tangent at any y > 0, it gives a
quadratic equation whose positive root is at most the solution, and from there the
iteration increases monotonically and converges quadratically: neither a bracket nor a
starting point is needed. Two to six iterations are usual.

References:
  A. R. Conn, N. I. M. Gould and Ph. L. Toint, "Trust-Region Methods" (2000), chapter 7,
    for the secular equation and the concavity of 1 / n.
  Ju. L. Daleckii and S. G. Krein (1965), for the derivative of a function of a matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partnewton.cubic._reductions import reduce_together

_MAX_ITERATIONS = 30


class AbsoluteModel(NamedTuple):
    """What :func:`minimise_absolute` found.

    Attributes:
      step: z, shape (S,).
      magnitude: |B|, shape (S, S).
      rank: the number of eigenvalues of B that are not zero to working precision, shape
        (), int32.
    """

    step: jax.Array
    magnitude: jax.Array
    rank: jax.Array


class _Spectrum(NamedTuple):
    vectors: jax.Array  # V, (S, S)
    values: jax.Array  # w, (S,), of either sign
    coordinates: jax.Array  # c / (|w| + y), (S,): the step in the eigenbasis
    shifted: jax.Array  # |w| + y, (S,)


@jax.custom_jvp
def minimise_absolute(b: jax.Array, B: jax.Array, damping: jax.Array) -> AbsoluteModel:
    """Minimise ``- b . z + 1/2 z' |B| z + damping/6 ||z||^3`` over z.

    Where ``|w| + y`` is zero, that is without damping or without any gradient, the step
    has no component along the eigenvector.

    It is differentiable in all three arguments. The derivative of the step is that of
    the stationarity condition, zero along eigenvectors with ``|w| + y = 0``; the
    derivative of |B| is the Daleckii-Krein formula, which eigenvalues that coincide do
    not disturb. At an eigenvalue zero, |B| is not differentiable; there the average of
    the one-sided derivatives is taken.

    Args:
      b: finite, shape (S,), no entry larger than 1 and one of that size, or zeros.
      B: finite and symmetric, shape (S, S), its largest entry of order 1 too.
      damping: finite, not negative, shape ().

    Returns:
      An :class:`AbsoluteModel`.
    """
    return _minimise(b, B, damping)[0]


def _minimise(
    b: jax.Array, B: jax.Array, damping: jax.Array
) -> tuple[AbsoluteModel, _Spectrum]:
    vectors, values = lax.linalg.eigh(B, symmetrize_input=False)
    size = jnp.abs(values)
    c = jnp.sum(vectors * b[:, None], 0)
    # In units of u the shift solves y = ||c / (size / u + y)||.
    u = jnp.sqrt(damping / 2)
    shifted = size + u * _shift(size / jnp.where(u > 0, u, 1), c)
    is_positive = shifted > 0
    coordinates = jnp.where(is_positive, c / jnp.where(is_positive, shifted, 1), 0)
    step = jnp.sum(vectors * coordinates[None, :], 1)
    magnitude = _product(vectors * size[None, :], vectors.T)
    rounding = 4 * len(b) * jnp.finfo(B.dtype).eps
    rank = jnp.sum(size > rounding * jnp.max(size), dtype=jnp.int32)
    model = AbsoluteModel(step, magnitude, rank)
    return model, _Spectrum(vectors, values, coordinates, shifted)


def _shift(w: jax.Array, c: jax.Array) -> jax.Array:
    """The y with ``y = ||c / (w + y)||``."""
    info = jnp.finfo(w.dtype)
    enough = 2.0 ** (info.maxexp // 3)  # y is lost in rounding beside such a curvature

    def unfinished(state: tuple) -> jax.Array:
        # From above first and then from below. The error after a step is of second
        # order in the step.
        _, factor, iteration = state
        moves = jnp.abs(factor - 1) > info.eps**0.5 / 8
        return moves & (iteration < _MAX_ITERATIONS)

    def iterate(state: tuple) -> tuple:
        y, _, iteration = state
        # ||c / (w + y)|| as ||c / (1 + w / y)|| / y, without overflow. Where the
        # quotient is bounded, w counts as proportional to y.
        quotient = w / y
        v = c / (1 + jnp.minimum(quotient, enough))
        share = jnp.where(quotient < enough, 1 / (1 + quotient), 1)
        square, weighted = reduce_together(sums=(v * v, v * v * share))
        # This has no effect, unless c = 0: then v is taken to be tiny.
        square, weighted = square + info.tiny, weighted + info.tiny
        # ratio = n(y) / y; slope = - d log n / d log y, in (0, 1].
        ratio = jnp.sqrt(square) / y / y
        slope = weighted / square
        # With the tangent of 1 / n: (1 + slope (f - 1)) f = ratio.
        half = (1 - slope) / 2
        factor = ratio / (half + jnp.sqrt(half * half + slope * ratio))
        return y * factor, factor, iteration + 1

    # ||c||^(1/2), the solution where w = 0, is at most S^(1/2) here.
    start = jnp.full((), len(c) ** 0.5, w.dtype)
    initial = (start, jnp.full_like(start, 2), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, iterate, initial)[0]


@minimise_absolute.defjvp
def _minimise_jvp(primals: tuple, tangents: tuple) -> tuple:
    _, _, damping = primals
    db, dB, ddamping = tangents
    model, (V, values, z, shifted) = _minimise(*primals)
    size = jnp.abs(values)
    total = size[:, None] + size[None, :]
    loewner = (values[:, None] + values[None, :]) / jnp.where(total > 0, total, 1)
    dmagnitude = loewner * _product(V.T, _product(dB, V))

    # (|B| + y + damping/2 z z' / ||z||) dz = db - d|B| z - ddamping/2 ||z|| z
    largest = jnp.max(jnp.abs(z))
    scaled = z / jnp.where(largest > 0, largest, 1)
    n = jnp.sqrt(jnp.sum(scaled * scaled))
    direction = scaled / jnp.where(n > 0, n, 1)
    n = largest * n
    inverse = jnp.where(shifted > 0, 1 / jnp.where(shifted > 0, shifted, 1), 0)
    image = inverse * direction
    factor = damping / 2 * n
    factor = factor / (1 + factor * jnp.sum(direction * image))
    dz = jnp.sum(V * db[:, None], 0) - jnp.sum(dmagnitude * z[None, :], 1)
    dz = inverse * (dz - ddamping / 2 * n * z)
    dz = dz - factor * jnp.sum(direction * dz) * image
    return model, AbsoluteModel(
        step=jnp.sum(V * dz[None, :], 1),
        magnitude=_product(V, _product(dmagnitude, V.T)),
        rank=np.zeros((), jax.dtypes.float0),
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
