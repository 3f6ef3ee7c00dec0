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
def minimise_absolute(
    b: jax.Array, B: jax.Array, damping: jax.Array
) -> AbsoluteModel:
    """Minimise ``- b . z + 1/2 z' |B| z + damping/6 ||z||^3`` over z.

    Where ``|w| + y`` is zero, that is without damping or without any gradient, the step
    has no component along the eigenvector.

    It is differentiable in all three arguments. The derivative of the step is that of
    the stationarity condition, zero along eigenvectors with ``|w| + y = 0``; the
    derivative of |B| is the Daleckii-Krein formula, which eigenvalues that coincide do
    not disturb. At an eigenvalue zero, |B| is not differentiable; there the average of
    the one-sided derivatives is taken.

    Args:
      b: finite, shape (S,).
      B: finite and symmetric, shape (S, S).
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
    shifted = size + _shift(size, c, damping)
    is_positive = shifted > 0
    coordinates = jnp.where(is_positive, c / jnp.where(is_positive, shifted, 1), 0)
    rounding = 4 * len(b) * jnp.finfo(B.dtype).eps
    model = AbsoluteModel(
        step=jnp.sum(vectors * coordinates, 1),
        magnitude=_product(vectors * size, vectors.T),
        rank=jnp.sum(size > rounding * jnp.max(size), dtype=jnp.int32),
    )
    return model, _Spectrum(vectors, values, coordinates, shifted)


def _shift(size: jax.Array, c: jax.Array, damping: jax.Array) -> jax.Array:
    """y = damping/2 ||c / (size + y)||."""
    # In units of u, where u^2 = damping/2 ||c||, the solution is at most 1.
    largest = jnp.max(jnp.abs(c))
    c = c / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(c * c))
    c = c / jnp.where(norm > 0, norm, 1)
    u = jnp.sqrt(damping / 2) * jnp.sqrt(largest) * jnp.sqrt(norm)
    size = size / jnp.where(u > 0, u, 1)

    info = jnp.finfo(size.dtype)
    enough = 2.0 ** (3 * info.maxexp // 4)  # y is negligible beside such a curvature

    def increases(state: tuple) -> jax.Array:
        _, factor, iteration = state
        # The first iteration, from above, decreases y; all others increase it.
        unfinished = (factor > 1 + 4 * info.eps) | (iteration < 2)
        return unfinished & (iteration < _MAX_ITERATIONS)

    def iterate(state: tuple) -> tuple:
        y, _, iteration = state
        # ||c / (size + y)|| as ||c / (1 + size / y)|| / y, without overflow.
        one_plus = 1 + jnp.minimum(size / y, enough)
        v = c / one_plus
        top = jnp.max(jnp.abs(v))
        v = v / jnp.where(top > 0, top, 1)
        squares = jnp.sum(v * v)
        weighted = jnp.sum(v * v / one_plus)
        # ratio = n(y) / y; slope = - d log n / d log y, in (0, 1].
        ratio = top * jnp.sqrt(squares) / y / y
        slope = weighted / jnp.where(squares > 0, squares, 1)
        # With the tangent of 1 / n: (1 + slope (f - 1)) f = ratio.
        half = (1 - slope) / 2
        factor = ratio / (half + jnp.sqrt(half * half + slope * ratio))
        return jnp.where(factor > 0, y * factor, y), factor, iteration + 1

    one = jnp.ones((), size.dtype)
    y, _, _ = lax.while_loop(increases, iterate, (one, one, jnp.int32(0)))
    return u * y


@minimise_absolute.defjvp
def _minimise_jvp(primals: tuple, tangents: tuple) -> tuple:
    _, _, damping = primals
    db, dB, ddamping = tangents
    model, (V, values, z, shifted) = _minimise(*primals)
    size = jnp.abs(values)
    total = size[:, None] + size
    loewner = (values[:, None] + values) / jnp.where(total > 0, total, 1)
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
    dz = jnp.sum(V * db[:, None], 0) - jnp.sum(dmagnitude * z, 1)
    dz = inverse * (dz - ddamping / 2 * n * z)
    dz = dz - factor * jnp.sum(direction * dz) * image
    return model, AbsoluteModel(
        step=jnp.sum(V * dz, 1),
        magnitude=_product(V, _product(dmagnitude, V.T)),
        rank=np.zeros((), jax.dtypes.float0),
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
