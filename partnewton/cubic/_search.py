"""The search for the shift y of the cubic model, see :mod:`partnewton.cubic._solver`.

An iteration consists of one Cholesky factorisation, three triangular solves and
functions with arithmetic on small arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partnewton.cubic._factors import (
    factor,
    is_factor,
    scaled_to_ones,
    solve_triangular,
)
from partnewton.cubic._reductions import reduce_together
from partnewton.cubic._steps import ROUNDING_UNITS
from partnewton.cubic._units import NormalizedModel

__all__ = ["Best", "best_steps", "converged"]

_MAX_ITERATIONS = 200  # 5 to 30 are usual; bisection alone needs about 120


class Best(NamedTuple):
    """The steps with the smallest relative gap so far, without and with tau z."""

    steps: jax.Array  # (2, S): M^-1 g and M^-1 g + tau z
    plain_gap: jax.Array  # ()
    completed_gap: jax.Array  # ()


class _Search(NamedTuple):
    y: jax.Array  # (), the next shift to try
    low: jax.Array  # (), lower bound of the solution y*
    high: jax.Array  # (), upper bound
    v: jax.Array  # (S,), D z of the inverse iteration for the null vector, ||v|| = 1
    best: Best
    settled: jax.Array  # (), whether `best` had converged before the last iteration
    iteration: jax.Array


def best_steps(model: NormalizedModel) -> Best:
    """The best steps, after iterating over shifts until convergence."""

    def iterate(state: _Search) -> _Search:
        system = _system(model, state.y, state.v)
        L = factor(system.A)
        half = solve_triangular(L, system.rhs)
        full = solve_triangular(L, half, transpose=True)
        image = _image(system.ds, full)
        w = solve_triangular(L, (system.ds * image.of_one)[:, None])
        return _advance(state, _evaluate(model, state, system, L, half, full, image, w))

    start = _start(model)
    return lax.while_loop(_unfinished, iterate, start).best


def converged(gap: jax.Array) -> jax.Array:
    """Whether a relative gap is of the order of rounding errors."""
    return gap <= 64 * jnp.finfo(gap.dtype).eps


# The parts of an iteration.


def _start(model: NormalizedModel) -> _Search:
    S, dtype = model.g.size, model.H.dtype
    lowest, highest = _shift_range(dtype)
    damped = model.d > 0
    any_damped = jnp.any(damped)
    # Irregular, so that it is not orthogonal to the null vector.
    v = jnp.where(damped, 1 + 0.4 * jnp.cos(1.7 * jnp.arange(S, dtype=dtype) ** 2), 0)
    infinite = jnp.full((), jnp.inf, dtype)
    return _Search(
        # Without a cubic term M does not depend on y, and the smallest y is used.
        y=jnp.where(any_damped, jnp.ones((), dtype), lowest),
        low=jnp.full((), lowest, dtype),
        high=jnp.full((), highest, dtype),
        v=v / jnp.where(any_damped, jnp.sqrt(jnp.sum(v * v)), 1),
        best=Best(jnp.zeros((2, S), dtype), infinite, infinite),
        settled=jnp.zeros((), bool),
        iteration=jnp.zeros((), jnp.int32),
    )


def _unfinished(state: _Search) -> jax.Array:
    dtype = state.y.dtype
    lowest, _ = _shift_range(dtype)
    is_wide = state.high - state.low > 2 * jnp.finfo(dtype).eps * state.high
    is_above = state.high > 2 * lowest
    return ~state.settled & is_wide & is_above & (state.iteration < _MAX_ITERATIONS)


class _System(NamedTuple):
    A: jax.Array  # (S, S), diag(s) M diag(s): M^-1 = diag(s) A^-1 diag(s)
    s: jax.Array  # (S,)
    ds: jax.Array  # (S,), D s
    rhs: jax.Array  # (S, 2), s g and s D v


def _system(model: NormalizedModel, y: jax.Array, v: jax.Array) -> _System:
    g, H, d, _, live = model
    A, s = scaled_to_ones(H + jnp.diag(y * d * d), live)
    ds = d * s
    return _System(A, s, ds, jnp.stack([s * g, ds * v], axis=1))


class _Image(NamedTuple):
    of_one: jax.Array  # (S,), D M^-1 g divided by its largest entry
    largest: jax.Array  # (), that entry; the division avoids overflow of squares


def _image(ds: jax.Array, full: jax.Array) -> _Image:
    image = ds * full[:, 0]
    (largest,) = reduce_together(maxima=(jnp.abs(image),))
    return _Image(image / jnp.where(largest > 0, largest, 1), largest)


class _Evaluation(NamedTuple):
    """The properties of M(y) and the steps for this y."""

    positive_definite: jax.Array
    ratio: jax.Array  # ||D M^-1 g|| / x
    slope: jax.Array  # - d log ||D M^-1 g|| / d log y, not negative
    v: jax.Array  # (S,), D z after one more inverse iteration
    curvature: jax.Array  # R = z' M z
    best: Best


def _evaluate(
    model: NormalizedModel,
    state: _Search,
    system: _System,
    L: jax.Array,
    half: jax.Array,
    full: jax.Array,
    image: _Image,
    w: jax.Array,
) -> _Evaluation:
    (y, v), beta = (state.y, state.v), model.beta
    x = beta * y
    positive_definite = is_factor(L)
    eta, z = full[:, 0], full[:, 1]  # divided by s
    z_image = system.ds * z
    (of_z,) = reduce_together(maxima=(jnp.abs(z_image),))
    z_image = z_image / jnp.where(of_z > 0, of_z, 1)
    square, z_square, product, with_v, q, along_w = reduce_together(
        sums=(
            image.of_one * image.of_one,
            z_image * z_image,
            image.of_one * z_image,
            z_image * v,
            half[:, 0] ** 2,  # g' M^-1 g
            w[:, 0] ** 2,
        )
    )
    n = image.largest * jnp.sqrt(square)
    ratio = n / x
    slope = y * (along_w / jnp.where(square > 0, square, 1))

    # One inverse iteration for the smallest eigenvalue of M z = R D^2 z, ||D z|| = 1.
    z_found = positive_definite & (of_z > 0)
    root = jnp.where(z_found, jnp.sqrt(z_square), 1)
    z_norm = jnp.where(z_found, of_z * root, 1)
    curvature = jnp.maximum(with_v / root / z_norm, 0)

    # The smaller root tau of ||D M^-1 g / x + tau D z|| = 1 (Moré and Sorensen).
    cosine = image.largest * (product / root) / x
    rest = (1 - ratio) * (1 + ratio)
    radical = jnp.sqrt(cosine * cosine + rest)  # NaN where there is no tau
    tau = rest / (cosine + jnp.where(cosine < 0, -radical, radical))

    # The gaps: m(step) minus the bound of weak duality, divided by that bound.
    bound = q / 2 + x * x * y / 6
    bound = jnp.where(bound > 0, bound, 1)
    plain_gap = (x - n) ** 2 * ((x + 2 * n) / (6 * beta))
    completed_gap = (tau * x) ** 2 * curvature / 2
    completed = eta + (tau * x / z_norm) * z
    return _Evaluation(
        positive_definite,
        ratio,
        slope,
        jnp.where(z_found, z_image / root, v),
        curvature,
        Best(
            steps=system.s[None, :] * jnp.stack([eta, completed]),
            plain_gap=_gap_or_inf(plain_gap / bound, positive_definite),
            completed_gap=_gap_or_inf(completed_gap / bound, z_found),
        ),
    )


def _advance(state: _Search, at: _Evaluation) -> _Search:
    y, eps = state.y, jnp.finfo(state.y.dtype).eps
    # M(y) is positive definite and ||D M(y)^-1 g|| <= x: the infimum is below y.
    above = at.positive_definite & (at.ratio <= 1)
    low = jnp.where(above, state.low, jnp.maximum(state.low, y))
    high = jnp.where(above, jnp.minimum(state.high, y), state.high)
    # z' M(y) z = R, ||D z|| = 1: M(y - R) is not positive definite.
    pole = y - at.curvature - ROUNDING_UNITS * eps * y
    pole = jnp.where(at.positive_definite, pole, 0)
    low = jnp.minimum(jnp.maximum(low, pole), high)
    secular = _secular_step(y, at)
    inside = at.positive_definite & (low < secular) & (secular < high)
    bisected = _bisect(low, high, state.iteration)
    return _Search(
        y=jnp.where(inside, secular, bisected),
        low=low,
        high=high,
        v=at.v,
        best=_better(state.best, at.best),
        # The gap is of second order in the error of y, so one more iteration makes eta
        # accurate to rounding.
        settled=converged(_smaller_gap(state.best)),
        iteration=state.iteration + 1,
    )


def _gap_or_inf(gap: jax.Array, known: jax.Array) -> jax.Array:
    return jnp.where(known & jnp.isfinite(gap), gap, jnp.inf)


def _better(a: Best, b: Best) -> Best:
    improved = _smaller_gap(b) < _smaller_gap(a)
    return jax.tree.map(lambda u, v: jnp.where(improved, v, u), a, b)


def _smaller_gap(best: Best) -> jax.Array:
    return jnp.minimum(best.plain_gap, best.completed_gap)


def _secular_step(y: jax.Array, at: _Evaluation) -> jax.Array:
    """The shift with ||D M^-1 g|| = x, for 1 / ||D M^-1 g|| linearised in y.

    With the shift f y, the equation is (1 + slope (f - 1)) f = ratio.
    """
    half = (1 - at.slope) / 2
    root = jnp.sqrt(half**2 + at.slope * at.ratio)
    # The positive root, in the form that avoids cancellation.
    f = jnp.where(half > 0, at.ratio / (half + root), (root - half) / at.slope)
    return y * f


def _bisect(low: jax.Array, high: jax.Array, iteration: jax.Array) -> jax.Array:
    """A point inside the bracket: geometric bisection in y, later in y - low."""
    dtype = low.dtype
    _, highest = _shift_range(dtype)
    geometric = jnp.sqrt(low) * jnp.sqrt(high)
    # y - low can have any order of magnitude from eps * high to high. Every other time
    # the midpoint is used, which bounds the number of iterations.
    width = high - low
    close_to_low = low + jnp.sqrt(jnp.finfo(dtype).eps * high) * jnp.sqrt(width)
    middle = low + 0.5 * width
    near = jnp.where(iteration % 2 == 0, middle, jnp.minimum(close_to_low, middle))
    inner = jnp.where(high > 2 * low, geometric, near)
    # In the scaled model the solution is of order 1, so low grows by factors of 16.
    return jnp.where(high >= highest, jnp.minimum(16 * low, geometric), inner)


def _shift_range(dtype: jnp.dtype) -> tuple[float, float]:
    """The smallest and largest shift, well inside the range of normal numbers."""
    exponent = (4 * jnp.finfo(dtype).maxexp) // 5
    return 2.0**-exponent, 2.0**exponent
