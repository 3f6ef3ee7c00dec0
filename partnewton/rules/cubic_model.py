"""The cubic model of the loss: minimised jointly, or for each subset alone."""

import jax
import jax.numpy as jnp

from partnewton._checks import check_number
from partnewton.cubic import CubicStatus, solve_cubic
from partnewton.rules._helpers import (
    clip,
    positive_root,
    quadratic_decrease,
    sqrt,
    third_order_scale,
)
from partnewton.rules.rule import Proposal, Rule
from partnewton.summary import Summary

__all__ = ["cubic", "diagonal"]


def cubic(damping: jax.typing.ArrayLike = 1.0, *, nonnegative: bool = True) -> Rule:
    """The rule of the paper: the minimiser of the cubic model.

    With D = diag(|third_s|^(1/3)), it minimises over eta

        - gradient . eta + 1/2 eta' hessian eta + damping/6 ||D eta||^3.

    Args:
      damping: the coefficient of the third-order term, nonnegative; lambda_int in the
        paper.
      nonnegative: whether negative learning rates are set to zero, as in the paper. The
        predicted decrease is that of the resulting rates.

    Returns:
      A :class:`Rule`.

    Raises:
      ValueError: a negative damping.

    Example:
      >>> summary = Summary(jnp.array(1.0), jnp.array([2.0]), jnp.eye(1), jnp.zeros(1))
      >>> print(cubic()(summary).learning_rates)
      [2.]

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    check_number("damping", damping)

    def propose(summary: Summary) -> Proposal:
        scale = third_order_scale(summary.third)
        solution = solve_cubic(summary.gradient, summary.hessian, scale, damping)
        eta = clip(solution.learning_rates, nonnegative)
        square = jnp.sum((scale * eta) ** 2)
        third_order_term = damping / 6 * square * sqrt(square)
        decrease = quadratic_decrease(summary, eta) - third_order_term
        return Proposal(eta, decrease, solution.status)

    return Rule(propose)


def diagonal(damping: jax.typing.ArrayLike = 1.0, *, nonnegative: bool = True) -> Rule:
    """The cubic model without interactions between subsets.

    For each subset s separately, it minimises

        - gradient_s eta_s + 1/2 hessian_ss eta_s^2 + damping/6 |third_s| |eta_s|^3,

    as if the learning rate of each subset were tuned while all other subsets are held
    fixed.

    Args:
      damping: the coefficient of the third-order term, nonnegative.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A :class:`Rule`. If the model of a subset is unbounded below, its rate is zero and
      the status is :attr:`~partnewton.CubicStatus.KERNEL_FROZEN`.

    Raises:
      ValueError: a negative damping.

    Example:
      >>> hessian = jnp.array([[2.0, 9.0], [9.0, 4.0]])
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, jnp.zeros(2))
      >>> print(diagonal()(summary).learning_rates)
      [0.5  0.25]
    """
    check_number("damping", damping)

    def propose(summary: Summary) -> Proposal:
        g, h = summary.gradient, jnp.diagonal(summary.hessian)
        third = jnp.where(jnp.isfinite(summary.third), summary.third, 0)
        c = damping * jnp.abs(third)
        x, exists = positive_root(jnp.abs(g), h, c)  # x = |eta|
        is_bounded = exists | (g == 0)
        eta = clip(jnp.sign(g) * x, nonnegative)
        decrease = jnp.sum(eta * g - h / 2 * eta**2 - c / 6 * jnp.abs(eta) ** 3)
        status = jnp.where(
            jnp.all(is_bounded), CubicStatus.INTERIOR, CubicStatus.KERNEL_FROZEN
        )
        return Proposal(eta, decrease, status)

    return Rule(propose)
