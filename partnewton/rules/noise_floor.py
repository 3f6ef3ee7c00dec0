"""Subsets whose slope is rounding error are treated as constant."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from partnewton._checks import check_number
from partnewton.rules.rule import Proposal, Rule, needs_third_order
from partnewton.summary import Summary

__all__ = ["with_noise_floor"]


def with_noise_floor(
    rule: Callable[[Summary], Proposal], eps_multiple: jax.typing.ArrayLike = 64.0
) -> Rule:
    """Apply a rule to the subsets whose slope is not rounding error.

    The loss does not depend on the bias of a layer that is followed by a batch
    normalisation. Its gradient and its curvature are both rounding errors, and their
    quotient is a learning rate of arbitrary size. So a subset with

        |gradient_s| <= eps_multiple * eps * max_t |gradient_t|,

    where eps is the machine epsilon of the dtype of the summary, is treated as one with
    zero gradient, curvature and third order. The condition compares slopes of different
    subsets: use it with a normalised direction, see `normalize` of
    :func:`partnewton.scale_by_partition_newton`.

    Args:
      rule: the rule.
      eps_multiple: the threshold, as a multiple of eps.

    Returns:
      A :class:`Rule`.

    Raises:
      ValueError: a negative `eps_multiple`.

    Example:
      >>> from partnewton.rules import newton
      >>> gradient, hessian = jnp.array([1.0, 1e-8]), jnp.array([1.0, 1e-20])
      >>> summary = Summary(jnp.array(1.0), gradient, jnp.diag(hessian), None)
      >>> print(bool(newton()(summary).learning_rates[1] > 1e11))
      True
      >>> print(with_noise_floor(newton())(summary).learning_rates)
      [1. 0.]
    """
    check_number("eps_multiple", eps_multiple)

    def propose(summary: Summary) -> Proposal:
        slope = jnp.abs(summary.gradient)
        threshold = eps_multiple * jnp.finfo(slope.dtype).eps * jnp.max(slope)
        is_above = ~(slope <= threshold) | (jnp.max(slope) == 0)
        third = summary.third
        return rule(
            Summary(
                summary.value,
                jnp.where(is_above, summary.gradient, 0),
                jnp.where(is_above[:, None] & is_above[None, :], summary.hessian, 0),
                None if third is None else jnp.where(is_above, third, 0),
            )
        )

    return Rule(propose, needs_third_order(rule))
