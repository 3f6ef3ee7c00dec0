"""The cubic model made convex, with a lower bound on its third-order scale."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partnewton._checks import check_number
from partnewton.cubic import CubicStatus
from partnewton.cubic._reductions import reduce_together
from partnewton.cubic._spectral import minimise_absolute
from partnewton.rules._helpers import clip, positive_root, sqrt, third_order_scale
from partnewton.rules.rule import Proposal, Rule
from partnewton.summary import Summary

__all__ = ["robust"]


def robust(
    damping: jax.typing.ArrayLike = 1.0,
    *,
    floor: jax.typing.ArrayLike = 1.0,
    shrinkage: jax.typing.ArrayLike = 0.0,
    max_ratio: jax.typing.ArrayLike = 5.0,
    nonnegative: bool = True,
) -> Rule:
    """A convex cubic model with a lower bound on D; shrinkage towards a common rate.

    It minimises over eta

        - gradient . eta + 1/2 eta' |hessian| eta + damping/6 ||D eta||^3,

    where |hessian| = D |D^-1 hessian D^-1| D is the Hessian with its eigenvalues, in
    the units of D, replaced by their absolute values. Along negative curvature the step
    is then as long as along positive curvature of the same size, and not as long as the
    third order permits.

    D has a lower bound. Let N = sum_s gradient_s^2 / |hessian_ss| be the decrease
    predicted when the subsets are optimised separately. Then

        D_s = max(|third_s|^(1/3), floor * N^(1/3) max(sqrt(|hessian_ss| / N),
                                                       |gradient_s| / N)).

    The lower bound is active where the third order is small or, as in piecewise linear
    networks, zero; then no step predicts a decrease of more than a few times N. The
    rule is equivariant under rescaling of a subset or of the loss, and does not change
    when a constant is added to the loss. If the whole diagonal of the Hessian is zero,
    as for a piecewise linear network with a piecewise linear loss, the sum of the
    absolute values in row s replaces hessian_ss; equivariance under rescaling of a
    subset is then lost.

    A model measured on one or ten batches is often wrong about single subsets, and a
    negative rate, set to zero, can leave a tensor untrained for hundreds of steps. So
    rates can be shrunk towards a common one: let t be the best common rate, which
    minimises the same model over eta = t (1, ..., 1). Then

        eta_s <- min((1 - shrinkage) eta_s + shrinkage t, max_ratio t).

    A common rate is meaningful only if the direction is normalised, see `normalize` of
    :func:`partnewton.scale_by_partition_newton`. The model is convex, so its value at
    the shrunk rates (without the upper bound) is at most the average of the two minima
    with the same weights. Where it has no curvature along (1, ..., 1), t = 1, to be
    shortened by `backtracking` of :func:`partnewton.scale_by_partition_newton`.

    Args:
      damping: the coefficient of the third-order term, nonnegative.
      floor: the coefficient of the lower bound on D, nonnegative; 0 for the third order
        alone.
      shrinkage: the weight of the common rate t, from 0 to 1.
      max_ratio: upper bound on each rate, as a multiple of the common rate; ignored if
        `shrinkage` is 0.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A :class:`Rule`. A subset with neither gradient nor curvature gets the rate zero.
      If the whole Hessian is zero, all rates are zero, or equal with `shrinkage`.

    Raises:
      ValueError: a negative damping, floor, `shrinkage` or `max_ratio`.

    Example:
      >>> hessian = jnp.diag(jnp.array([2.0, -2.0]))
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, jnp.zeros(2))
      >>> print(*(f"{x:.3f}" for x in robust()(summary).learning_rates))
      0.366 0.366
    """
    check_number("damping", damping)
    check_number("floor", floor)
    check_number("shrinkage", shrinkage)
    check_number("max_ratio", max_ratio)
    shrinks = not (isinstance(shrinkage, int | float) and shrinkage == 0)
    is_damped = isinstance(damping, int | float) and damping > 0

    def propose(summary: Summary) -> Proposal:
        g, hessian = summary.gradient, summary.hessian
        rows = jnp.sum(jnp.abs(hessian), 1)
        D = _floored_scale(g, hessian, rows, summary.third, floor)
        model = _in_units_of(D, g, hessian, damping)
        z, magnitude, rank = minimise_absolute(model.b, model.B, model.damping)
        eta = clip(model.inverse * (model.unit * z), nonnegative)

        # The model has a minimum if D, or |B| without damping, bounds the step.
        is_live = (g != 0) | ((rows > 0) & (D > 0))
        is_bounded = ~jnp.any((g != 0) & (D == 0))
        if not is_damped:
            full_rank = rank == jnp.sum(is_live, dtype=rank.dtype)
            is_convex = (model.damping > 0) | full_rank
            eta = jnp.where(is_convex, eta, 0)
            is_bounded &= is_convex

        if shrinks:
            t = _common_rate(model, g, D, magnitude)
            shrunk = (1 - shrinkage) * eta + jnp.where(is_live, shrinkage * t, 0)
            shrunk = jnp.where(t > 0, jnp.minimum(shrunk, max_ratio * t), shrunk)
            eta = jnp.where(shrinkage > 0, shrunk, eta)
        eta = jnp.where(model.is_valid, eta, 0)
        status = jnp.where(is_bounded, CubicStatus.INTERIOR, CubicStatus.KERNEL_FROZEN)
        status = jnp.where(model.is_valid, status, CubicStatus.INVALID)
        return Proposal(eta, _decrease(model, g, D, magnitude, eta), status)

    return Rule(propose)


class _ScaledModel(NamedTuple):
    """z = D eta minimises - b . z + 1/2 z' |B| z + damping/6 ||z||^3, after scaling.

    b and B are divided by their largest entries. All of it is zero where the model is
    not valid.
    """

    b: jax.Array  # D^-1 gradient / largest_b, (S,)
    B: jax.Array  # D^-1 hessian D^-1 / largest_B, (S, S)
    damping: jax.Array  # of the scaled model, ()
    inverse: jax.Array  # D^-1, zero where D is, (S,)
    largest_b: jax.Array  # ()
    largest_scale: jax.Array  # ()
    unit: jax.Array  # largest_b / largest_B: D eta / unit is the scaled z, ()
    is_valid: jax.Array  # ()


def _in_units_of(
    D: jax.Array,
    gradient: jax.Array,
    hessian: jax.Array,
    damping: jax.typing.ArrayLike,
) -> _ScaledModel:
    damping = jnp.asarray(damping, gradient.dtype)
    inverse = jnp.where(D > 0, 1 / jnp.where(D > 0, D, 1), 0)
    b = inverse * gradient
    B = inverse[:, None] * (hessian / 2 + hessian.T / 2) * inverse[None, :]
    largest_b, largest_B, largest_scale = _largest_entries(b, B, D)
    is_valid = jnp.isfinite(largest_b + largest_B + damping) & (damping >= 0)
    b, B = (jnp.where(is_valid, x, 0) for x in (b / largest_b, B / largest_B))
    unit = largest_b / largest_B
    damping = jnp.where(is_valid, damping * (unit / largest_B), 0)
    return _ScaledModel(
        b, B, damping, inverse, largest_b, largest_scale, unit, is_valid
    )


def _common_rate(
    model: _ScaledModel, g: jax.Array, D: jax.Array, magnitude: jax.Array
) -> jax.Array:
    """The t >= 0 at which the model is minimal on the line eta = t (1, ..., 1)."""
    slopes = g / model.largest_b / model.largest_scale
    terms = _terms(model, magnitude, slopes, D / model.largest_scale)
    slope, curvature, cubic = terms
    t, is_bounded = positive_root(jnp.maximum(slope, 0), curvature, cubic)
    # If the model is unbounded along this line, t = 1.
    t = jnp.where(is_bounded, (model.unit / model.largest_scale) * t, 1)
    return jnp.where(slope > 0, t, 0)


def _decrease(
    model: _ScaledModel,
    g: jax.Array,
    D: jax.Array,
    magnitude: jax.Array,
    eta: jax.Array,
) -> jax.Array:
    """The decrease of the model at eta."""
    slopes, z = (
        jnp.where(model.is_valid, x, 0) * eta / model.unit
        for x in (g / model.largest_b, D)
    )
    slope, curvature, cubic = _terms(model, magnitude, slopes, z)
    decrease = (slope - curvature / 2 - cubic / 6) * model.unit * model.largest_b
    return jnp.where(model.is_valid, decrease, 0)


def _terms(
    model: _ScaledModel, magnitude: jax.Array, slopes: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of `slopes`, z' |B| z, and damping ||z||^3."""
    image = jnp.sum(magnitude * z[None, :], 1)
    slope, curvature, square = reduce_together(sums=(slopes, z * image, z * z))
    return slope, curvature, model.damping * square * sqrt(square)


def _floored_scale(
    gradient: jax.Array,
    hessian: jax.Array,
    rows: jax.Array,
    third: jax.Array,
    floor: jax.typing.ArrayLike,
) -> jax.Array:
    """D, as in the docstring of :func:`robust`."""
    g, h = jnp.abs(gradient), jnp.abs(jnp.diagonal(hessian))
    # The row sums replace a diagonal of zeros.
    separate = [g * jnp.where(x > 0, g / jnp.where(x > 0, x, 1), 0) for x in (h, rows)]
    *sums, largest = reduce_together(sums=tuple(separate), maxima=(h,))
    N = jnp.where(largest > 0, *sums)
    sqrt_h = sqrt(jnp.where(largest > 0, h, rows))
    # N^(1/3) max(sqrt(h / N), g / N), with p = N^(-1/6)
    p = jnp.where(N > 0, 1 / jnp.cbrt(jnp.sqrt(jnp.where(N > 0, N, 1))), 0)
    lower_bound = floor * jnp.maximum(sqrt_h * p, g * p * p * p * p)
    return jnp.maximum(third_order_scale(third), lower_bound)


def _largest_entries(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The largest absolute value in each array, not differentiated; 1 for zeros."""
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    sizes = tuple(jnp.broadcast_to(jnp.abs(x), shape) for x in arrays)
    largest = reduce_together(maxima=lax.stop_gradient(sizes))
    return tuple(jnp.where(x == 0, 1, x) for x in largest)
