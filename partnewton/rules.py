"""From a summary to learning rates, and to what they promise.

A rule is a plain function ``rule(summary) -> Proposal``. One of your own:

    def cauchy(summary):  # steepest descent on the sum of all subsets
        eta = jnp.sum(summary.gradient) / jnp.sum(summary.hessian)
        rates = jnp.full_like(summary.gradient, eta)
        return Proposal(rates, 0.5 * eta * jnp.sum(summary.gradient))

    cauchy.third_order = False  # it does not read summary.third: leave that out

Rules never see parameters. Whatever is not finite in a proposal is refused by the
transformation that asked for it, so a rule need not guard against that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partnewton.cubic import CubicStatus, solve_cubic
from partnewton.cubic._reductions import reduce_together
from partnewton.cubic._spectral import minimise_absolute
from partnewton.summary import Summary

__all__ = [
    "Proposal",
    "Rule",
    "cubic",
    "diagonal",
    "newton",
    "robust",
    "with_noise_floor",
]


class Proposal(NamedTuple):
    """What a rule proposes.

    Attributes:
      learning_rates: eta, shape (S,).
      predicted_decrease: by how much the rule's model of the loss falls when the step
        is ``sum_s eta_s * u_s``, shape ().
      status: a :class:`~partnewton.CubicStatus`, shape (), 0 where all is well.
    """

    learning_rates: jax.Array
    predicted_decrease: jax.Array
    status: jax.typing.ArrayLike = 0


Rule = Callable[[Summary], Proposal]


def cubic(damping: jax.typing.ArrayLike = 1.0, *, nonnegative: bool = True) -> Rule:
    """The rule of the paper: the minimiser of the cubic model.

    With D = diag(|third_s|^(1/3)), it minimises over eta

        - gradient . eta + 1/2 eta' hessian eta + damping/6 ||D eta||^3.

    Args:
      damping: the factor of the third-order term, positive; the paper's lambda_int.
      nonnegative: whether negative learning rates are set to zero, as they are in the
        paper. The predicted decrease is that of the rates that result.

    Returns:
      A rule.

    Raises:
      ValueError: a negative damping.

    Example:
      >>> summary = Summary(jnp.array(1.0), jnp.array([2.0]), jnp.eye(1), jnp.zeros(1))
      >>> print(cubic()(summary).learning_rates)
      [2.]

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    _check_not_negative("damping", damping)

    def rule(summary: Summary) -> Proposal:
        scale = _third_order_scale(summary.third)
        solution = solve_cubic(summary.gradient, summary.hessian, scale, damping)
        eta = _clip(solution.learning_rates, nonnegative)
        square = jnp.sum((scale * eta) ** 2)
        third_order_term = damping / 6 * square * _sqrt(square)
        decrease = _quadratic_decrease(summary, eta) - third_order_term
        return Proposal(eta, decrease, solution.status)

    return rule


def newton(ridge: jax.typing.ArrayLike = 0.0, *, nonnegative: bool = True) -> Rule:
    """Newton's method on the partition: it needs no third order and computes none.

        (hessian + ridge * I) eta = gradient

    On one subset this is Cauchy's steepest descent, on one subset an entry Newton's
    step. Like Newton's step it goes to a saddle point or a maximum where the Hessian is
    not positive definite, and a singular Hessian gives rates that are not finite. A
    subset that has neither gradient nor curvature gets the rate zero.

    Args:
      ridge: what is added to the diagonal of the Hessian, not negative; it has the
        units of the Hessian.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A rule.

    Raises:
      ValueError: a negative ridge.

    Example:
      >>> hessian = jnp.diag(jnp.array([2.0, 4.0]))
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, None)
      >>> print(newton()(summary).learning_rates)
      [0.5  0.25]
    """
    _check_not_negative("ridge", ridge)

    def rule(summary: Summary) -> Proposal:
        gradient, hessian, _ = summary[1:]
        matrix = hessian + ridge * jnp.eye(len(gradient), dtype=hessian.dtype)
        inert = (gradient == 0) & jnp.all(matrix == 0, axis=1)
        matrix = matrix + jnp.diag(inert.astype(matrix.dtype))
        # Scaled to a diagonal of ones: subsets may differ by many orders of magnitude.
        diagonal = jnp.abs(jnp.diagonal(matrix))
        scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
        scaled = scale[:, None] * matrix * scale[None, :]
        eta = scale * jnp.linalg.solve(scaled, scale * gradient)
        eta = _clip(eta, nonnegative)
        return Proposal(eta, _quadratic_decrease(summary, eta))

    rule.third_order = False  # type: ignore[attr-defined]
    return rule


def diagonal(damping: jax.typing.ArrayLike = 1.0, *, nonnegative: bool = True) -> Rule:
    """Each subset alone: the cubic model without any interaction.

    It minimises, for each subset by itself,

        - gradient_s eta_s + 1/2 hessian_ss eta_s^2 + damping/6 |third_s| |eta_s|^3,

    which is what one gets from tuning each subset while all others stand still.

    Args:
      damping: the factor of the third-order term, not negative.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A rule. A subset whose model has no minimum gets the rate zero, and the status
      says so.

    Raises:
      ValueError: a negative damping.

    Example:
      >>> hessian = jnp.array([[2.0, 9.0], [9.0, 4.0]])
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, jnp.zeros(2))
      >>> print(diagonal()(summary).learning_rates)
      [0.5  0.25]
    """
    _check_not_negative("damping", damping)

    def rule(summary: Summary) -> Proposal:
        g, h = summary.gradient, jnp.diagonal(summary.hessian)
        third = jnp.where(jnp.isfinite(summary.third), summary.third, 0)
        c = damping * jnp.abs(third)
        x, exists = _positive_root(jnp.abs(g), h, c)  # x = |eta|
        bounded = exists | (g == 0)
        eta = _clip(jnp.sign(g) * x, nonnegative)
        decrease = jnp.sum(eta * g - h / 2 * eta**2 - c / 6 * jnp.abs(eta) ** 3)
        status = jnp.where(
            jnp.all(bounded), CubicStatus.INTERIOR, CubicStatus.KERNEL_FROZEN
        )
        return Proposal(eta, decrease, status)

    return rule


def robust(
    damping: jax.typing.ArrayLike = 1.0,
    *,
    floor: jax.typing.ArrayLike = 1.0,
    shrinkage: jax.typing.ArrayLike = 0.0,
    max_ratio: jax.typing.ArrayLike = 5.0,
    nonnegative: bool = True,
) -> Rule:
    """The cubic model with a curvature that is nowhere negative and a D nowhere small.

    It minimises over eta

        - gradient . eta + 1/2 eta' |hessian| eta + damping/6 ||D eta||^3,

    where |hessian| = D |D^-1 hessian D^-1| D has the eigenvalues of the Hessian, seen
    in the units of D, replaced by their magnitudes: along negative curvature the step
    is as long as along positive, instead of as long as the third order allows.
    With the decrease N = sum_s gradient_s^2 / |hessian_ss| that the subsets would
    promise one by one,

        D_s = max(|third_s|^(1/3), floor * N^(1/3) max(sqrt(|hessian_ss| / N),
                                                       |gradient_s| / N)).

    Where the third order is small or, as in piecewise linear networks, zero, the second
    term stands in for it: no step promises more than a few times N. All of this is
    equivariant when a subset or the loss is rescaled, and does not see a constant that
    is added to the loss. But where all of the diagonal is zero, as in a piecewise
    linear network with a piecewise linear loss, hessian_ss stands for the sum of the
    magnitudes in row s, in the units of the direction.

    The minimiser is a point, and what a model of one batch or ten says of single
    subsets is often wrong: a negative rate, set to zero, leaves a tensor untrained for
    hundreds of steps. So it can be drawn to the best step in which all rates are alike,
    the minimum of the same model at eta = t (1, ..., 1), in the units of the direction
    (see `normalize` of :func:`partnewton.scale_by_partition_newton`):

        eta_s <- min((1 - shrinkage) eta_s + shrinkage t, max_ratio t).

    The model is convex: the mean of two points promises no less than the mean of what
    they promise. Where there is no curvature along it at all, t = 1, for backtracking
    to shorten: see :func:`partnewton.scale_by_partition_newton`.

    Args:
      damping: the factor of the third-order term, not negative.
      floor: how large D is at least, not negative; 0 for the third order alone.
      shrinkage: the weight t of the common rate, from 0 to 1.
      max_ratio: upper bound on each rate, as a multiple of the common rate; ignored if
        `shrinkage` is 0.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A rule. A subset that has no gradient and no curvature gets the rate zero, and
      without any curvature there is no unit to measure steps in: all rates are zero,
      or those that are alike.

    Raises:
      ValueError: a negative damping, floor, `shrinkage` or `max_ratio`.

    Example:
      >>> hessian = jnp.diag(jnp.array([2.0, -2.0]))
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, jnp.zeros(2))
      >>> print(*(f"{x:.3f}" for x in robust()(summary).learning_rates))
      0.366 0.366
    """
    _check_not_negative("damping", damping)
    _check_not_negative("floor", floor)
    _check_not_negative("shrinkage", shrinkage)
    _check_not_negative("max_ratio", max_ratio)

    shrinks = not (isinstance(shrinkage, int | float) and shrinkage == 0)
    always_damped = isinstance(damping, int | float) and damping > 0

    def rule(summary: Summary) -> Proposal:
        _, g, hessian, third = summary
        strength = jnp.asarray(damping, g.dtype)
        rows = jnp.sum(jnp.abs(hessian), 1)
        D = _floored_scale(g, hessian, rows, third, floor)
        inverse = jnp.where(D > 0, 1 / jnp.where(D > 0, D, 1), 0)
        # In units of D: z = D eta minimises - b . z + 1/2 z' |B| z + damping/6 ||z||^3.
        # Then b and B are divided by their largest entries.
        b = inverse * g
        B = inverse[:, None] * (hessian / 2 + hessian.T / 2) * inverse[None, :]
        of_b, of_B, of_D = _largest_entries(b, B, D)
        valid = jnp.isfinite(of_b + of_B + strength) & (strength >= 0)
        b, B = (jnp.where(valid, x, 0) for x in (b / of_b, B / of_B))
        unit = of_b / of_B
        strength = jnp.where(valid, strength * (unit / of_B), 0)
        z, magnitude, rank = minimise_absolute(b, B, strength)
        eta = _clip(inverse * (unit * z), nonnegative)

        # The model has a minimum where D, or without damping |B|, bounds the step.
        is_live = (g != 0) | ((rows > 0) & (D > 0))
        bounded = ~jnp.any((g != 0) & (D == 0))
        if not always_damped:
            full_rank = rank == jnp.sum(is_live, dtype=rank.dtype)
            is_convex = (strength > 0) | full_rank
            eta = jnp.where(is_convex, eta, 0)
            bounded &= is_convex

        def model(
            slopes: jax.Array, z: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            """The sum of slopes, z' |B| z, damping ||z||^3."""
            image = jnp.sum(magnitude * z[None, :], 1)
            slope, curvature, square = reduce_together(sums=(slopes, z * image, z * z))
            return slope, curvature, strength * square * _sqrt(square)

        if shrinks:
            slope, curvature, cubic = model(g / of_b / of_D, D / of_D)
            t, is_bounded = _positive_root(jnp.maximum(slope, 0), curvature, cubic)
            # Without anything that bounds the step with all rates alike, it is 1.
            t = jnp.where(is_bounded, (unit / of_D) * t, 1)
            t = jnp.where(slope > 0, t, 0)
            shrunk = (1 - shrinkage) * eta + jnp.where(is_live, shrinkage * t, 0)
            shrunk = jnp.where(t > 0, jnp.minimum(shrunk, max_ratio * t), shrunk)
            eta = jnp.where(shrinkage > 0, shrunk, eta)
        eta = jnp.where(valid, eta, 0)
        slopes, z = (jnp.where(valid, x, 0) * eta / unit for x in (g / of_b, D))
        slope, curvature, cubic = model(slopes, z)
        decrease = (slope - curvature / 2 - cubic / 6) * unit * of_b
        decrease = jnp.where(valid, decrease, 0)
        status = jnp.where(bounded, CubicStatus.INTERIOR, CubicStatus.KERNEL_FROZEN)
        status = jnp.where(valid, status, CubicStatus.INVALID)
        return Proposal(eta, decrease, status)

    return rule


def with_noise_floor(rule: Rule, eps_multiple: jax.typing.ArrayLike = 64.0) -> Rule:
    """A rule that does not see subsets whose slope is lost in rounding.

    The bias of a layer that a batch normalisation follows changes nothing: its
    gradient is rounding, its curvature too, and the quotient of the two is a rate that
    may have any size. Where

        |gradient_s| <= eps_multiple * eps * max_t |gradient_t|,

    with eps that of the dtype of the summary, the subset counts as one without
    gradient, curvature and third order. It compares slopes of different subsets, so
    directions should have unit norms, see
    `normalize` of :func:`partnewton.scale_by_partition_newton`.

    Args:
      rule: what is given the summary.
      eps_multiple: the threshold, as a multiple of eps.

    Returns:
      A rule.

    Raises:
      ValueError: a negative `eps_multiple`.

    Example:
      >>> gradient, hessian = jnp.array([1.0, 1e-8]), jnp.array([1.0, 1e-20])
      >>> summary = Summary(jnp.array(1.0), gradient, jnp.diag(hessian), None)
      >>> print(bool(newton()(summary).learning_rates[1] > 1e11))
      True
      >>> print(with_noise_floor(newton())(summary).learning_rates)
      [1. 0.]
    """
    _check_not_negative("eps_multiple", eps_multiple)

    def seen_by(summary: Summary) -> Proposal:
        slope = jnp.abs(summary.gradient)
        least = eps_multiple * jnp.finfo(slope.dtype).eps * jnp.max(slope)
        seen = ~(slope <= least) | (jnp.max(slope) == 0)
        third = summary.third
        return rule(
            Summary(
                summary.value,
                jnp.where(seen, summary.gradient, 0),
                jnp.where(seen[:, None] & seen[None, :], summary.hessian, 0),
                None if third is None else jnp.where(seen, third, 0),
            )
        )

    seen_by.third_order = needs_third_order(rule)  # type: ignore[attr-defined]
    return seen_by


def _floored_scale(
    gradient: jax.Array,
    hessian: jax.Array,
    rows: jax.Array,
    third: jax.Array,
    floor: jax.typing.ArrayLike,
) -> jax.Array:
    """D of :func:`robust`."""
    g, h = jnp.abs(gradient), jnp.abs(jnp.diagonal(hessian))
    # Without any diagonal, as in piecewise linear networks with a piecewise linear
    # loss, the rows stand in for it: no less curved for all that is off it.
    alone = [g * jnp.where(x > 0, g / jnp.where(x > 0, x, 1), 0) for x in (h, rows)]
    *sums, largest = reduce_together(sums=tuple(alone), maxima=(h,))
    N = jnp.where(largest > 0, *sums)
    sqrt_h = _sqrt(jnp.where(largest > 0, h, rows))
    # N^(1/3) max(sqrt(h / N), g / N), with p = N^(-1/6)
    p = jnp.where(N > 0, 1 / jnp.cbrt(jnp.sqrt(jnp.where(N > 0, N, 1))), 0)
    least = floor * jnp.maximum(sqrt_h * p, g * p * p * p * p)
    return jnp.maximum(_third_order_scale(third), least)


def _largest_entries(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Of each array, constant for differentiation; 1 for zeros."""
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    sizes = tuple(jnp.broadcast_to(jnp.abs(x), shape) for x in arrays)
    largest = reduce_together(maxima=lax.stop_gradient(sizes))
    return tuple(jnp.where(x == 0, 1, x) for x in largest)


def _third_order_scale(third: jax.Array) -> jax.Array:
    """|third|^(1/3); 0 where the third order is not finite."""
    known = jnp.isfinite(third) & (third != 0)
    return jnp.where(known, jnp.cbrt(jnp.abs(jnp.where(known, third, 1))), 0)


@jax.custom_jvp
def _positive_root(
    g: jax.Array, h: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The positive root of c/2 x^2 + h x - g = 0, and whether there is one; else zero.

    In the form without cancellation for either sign of h; g and c are not negative.
    """
    root = jnp.hypot(h, jnp.sqrt(2 * c) * jnp.sqrt(g))
    numerator = jnp.where(h > 0, 2 * g, root - h)
    denominator = jnp.where(h > 0, h + root, c)
    exists = denominator > 0
    return jnp.where(exists, numerator / jnp.where(exists, denominator, 1), 0), exists


@_positive_root.defjvp
def _positive_root_jvp(primals: tuple, tangents: tuple) -> tuple:
    """By the implicit function theorem; zero where the root is double."""
    g, h, c = primals
    dg, dh, dc = tangents
    x, exists = _positive_root(g, h, c)
    slope = jnp.hypot(h, jnp.sqrt(2 * c) * jnp.sqrt(g))  # h + c x
    is_simple = exists & (slope > 0)
    dx = (dg - x * dh - x * x / 2 * dc) / jnp.where(is_simple, slope, 1)
    no_tangent = np.zeros(exists.shape, jax.dtypes.float0)
    return (x, exists), (jnp.where(is_simple, dx, 0), no_tangent)


def needs_third_order(rule: Rule) -> bool:
    """Whether a rule reads `summary.third`: yes, unless it says otherwise."""
    return getattr(rule, "third_order", True)


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root of x >= 0, with the derivative zero at zero."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _clip(eta: jax.Array, nonnegative: bool) -> jax.Array:
    return jnp.maximum(eta, 0) if nonnegative else eta


def _quadratic_decrease(summary: Summary, eta: jax.Array) -> jax.Array:
    """gradient . eta - 1/2 eta' hessian eta."""
    quadratic = jnp.sum(eta[:, None] * summary.hessian * eta[None, :])
    return jnp.sum(summary.gradient * eta) - quadratic / 2


def _check_not_negative(name: str, value: jax.typing.ArrayLike) -> None:
    if isinstance(value, int | float | np.number) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")
