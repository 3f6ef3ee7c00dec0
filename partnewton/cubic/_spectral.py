"""The convex cubic model with an isotropic third-order term.

Let B = V w V' be the eigendecomposition of a symmetric matrix, and |B| = V |w| V'. The
minimiser over z of

    - b . z + 1/2 z' |B| z + damping/6 ||z||^3

is z = V (c / (|w| + y)) with c = V' b and y = damping/2 ||z||. With n(y) =
||c / (|w| + y)||, y solves the scalar (secular) equation

    y / n(y) = damping/2.

1 / n is concave and increasing. If it is replaced by its tangent at any y > 0, the
equation is quadratic, and its positive root is at most the solution. From there, the
iterates increase monotonically and converge quadratically, so no bracket and no
particular starting point is needed. Two to six iterations are typical.

References:
  A. R. Conn, N. I. M. Gould and Ph. L. Toint, "Trust-Region Methods" (2000), chapter 7,
    for the secular equation and the concavity of 1 / n.
  Ju. L. Daleckii and S. G. Krein (1965), for the derivative of a matrix function.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partnewton.cubic._reductions import reduce_together

_MAX_ITERATIONS = 30


class AbsoluteModel(NamedTuple):
    """Result of :func:`minimise_absolute`.

    Attributes:
      step: z, shape (S,).
      magnitude: |B|, shape (S, S).
      rank: the numerical rank of B, shape (), int32.
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

    Along eigenvectors with ``|w| + y = 0``, which occur only for zero damping or b = 0,
    the component of the step is zero.

    The function is differentiable in all three arguments. The derivative of the step
    follows from the stationarity condition; along eigenvectors with ``|w| + y = 0`` it
    is set to zero. The derivative of |B| is the Daleckii-Krein formula, which is valid
    for multiple eigenvalues. At an eigenvalue zero, where |B| is not differentiable, it
    gives the mean of the one-sided derivatives.

    Args:
      b: finite, shape (S,), with maximum norm 1, or zero.
      B: finite and symmetric, shape (S, S), with a largest entry of order 1.
      damping: finite and nonnegative, shape ().

    Returns:
      An :class:`AbsoluteModel`.
    """
    return _solve_in_eigenbasis(b, B, damping)[0]


def _solve_in_eigenbasis(
    b: jax.Array, B: jax.Array, damping: jax.Array
) -> tuple[AbsoluteModel, _Spectrum]:
    vectors, values = lax.linalg.eigh(B, symmetrize_input=False)
    size = jnp.abs(values)
    c = jnp.sum(vectors * b[:, None], 0)
    # y / u solves the equation for damping = 2 and the eigenvalues size / u.
    u = jnp.sqrt(damping / 2)
    shifted = size + u * _shift(size / jnp.where(u > 0, u, 1), c)
    is_positive = shifted > 0
    coordinates = jnp.where(is_positive, c / jnp.where(is_positive, shifted, 1), 0)
    step = jnp.sum(vectors * coordinates[None, :], 1)
    magnitude = _matmul(vectors * size[None, :], vectors.T)
    rounding = 4 * len(b) * jnp.finfo(B.dtype).eps
    rank = jnp.sum(size > rounding * jnp.max(size), dtype=jnp.int32)
    model = AbsoluteModel(step, magnitude, rank)
    return model, _Spectrum(vectors, values, coordinates, shifted)


def _shift(w: jax.Array, c: jax.Array) -> jax.Array:
    """The y with ``y = ||c / (w + y)||``."""
    info = jnp.finfo(w.dtype)
    huge = 2.0 ** (info.maxexp // 3)  # w + y rounds to w for w / y this large

    def unfinished(state: tuple) -> jax.Array:
        # The first iterate may be too large, all others increase. The error after a
        # step is of second order in the step.
        _, factor, iteration = state
        is_moving = jnp.abs(factor - 1) > info.eps**0.5 / 8
        return is_moving & (iteration < _MAX_ITERATIONS)

    def iterate(state: tuple) -> tuple:
        y, _, iteration = state
        # ||c / (w + y)|| = ||c / (1 + w / y)|| / y does not overflow. A quotient above
        # the bound is replaced by the bound, as if w were proportional to y.
        quotient = w / y
        v = c / (1 + jnp.minimum(quotient, huge))
        weight = jnp.where(quotient < huge, 1 / (1 + quotient), 1)
        square, weighted = reduce_together(sums=(v * v, v * v * weight))
        # Avoids 0 / 0 for c = 0, and has no effect otherwise.
        square, weighted = square + info.tiny, weighted + info.tiny
        # ratio = n(y) / y; slope = - d log n / d log y, in (0, 1].
        ratio = jnp.sqrt(square) / y / y
        slope = weighted / square
        # With the tangent of 1 / n: (1 + slope (f - 1)) f = ratio.
        half = (1 - slope) / 2
        factor = ratio / (half + jnp.sqrt(half * half + slope * ratio))
        return y * factor, factor, iteration + 1

    # The solution is at most ||c||^(1/2), its value for w = 0, which is at most
    # S^(1/2) here.
    start = jnp.full((), len(c) ** 0.5, w.dtype)
    initial = (start, jnp.full_like(start, 2), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, iterate, initial)[0]


@minimise_absolute.defjvp
def _minimise_absolute_jvp(primals: tuple, tangents: tuple) -> tuple:
    _, _, damping = primals
    db, dB, ddamping = tangents
    model, (V, values, z, shifted) = _solve_in_eigenbasis(*primals)
    size = jnp.abs(values)
    total = size[:, None] + size[None, :]
    loewner = (values[:, None] + values[None, :]) / jnp.where(total > 0, total, 1)
    dmagnitude = loewner * _matmul(V.T, _matmul(dB, V))

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
        magnitude=_matmul(V, _matmul(dmagnitude, V.T)),
        rank=np.zeros((), jax.dtypes.float0),
    )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
