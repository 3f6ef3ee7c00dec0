"""The quadratic model of the loss: Newton's method on the partition."""

import jax
import jax.numpy as jnp

from partnewton._checks import check_number
from partnewton.rules._helpers import clip, quadratic_decrease
from partnewton.rules.rule import Proposal, Rule
from partnewton.summary import Summary

__all__ = ["newton"]


def newton(ridge: jax.typing.ArrayLike = 0.0, *, nonnegative: bool = True) -> Rule:
    """Newton's method on the partition, without the third order.

    It solves

        (hessian + ridge * I) eta = gradient.

    With one subset this is Cauchy's steepest descent, with one subset per entry it is
    Newton's method. Like Newton's method, it converges to saddle points and maxima
    where the Hessian is not positive definite, and rates are not finite where the
    Hessian is singular. A subset with neither gradient nor curvature gets the rate
    zero.

    Args:
      ridge: added to the diagonal of the Hessian, nonnegative; it has the units of the
        Hessian.
      nonnegative: whether negative learning rates are set to zero.

    Returns:
      A :class:`Rule`.

    Raises:
      ValueError: a negative ridge.

    Example:
      >>> hessian = jnp.diag(jnp.array([2.0, 4.0]))
      >>> summary = Summary(jnp.array(1.0), jnp.ones(2), hessian, None)
      >>> print(newton()(summary).learning_rates)
      [0.5  0.25]
    """
    check_number("ridge", ridge)

    def propose(summary: Summary) -> Proposal:
        gradient, hessian, _ = summary[1:]
        matrix = hessian + ridge * jnp.eye(len(gradient), dtype=hessian.dtype)
        is_constant = (gradient == 0) & jnp.all(matrix == 0, axis=1)
        matrix = matrix + jnp.diag(is_constant.astype(matrix.dtype))
        # Scaled to a unit diagonal: subsets may differ by many orders of magnitude.
        diagonal = jnp.abs(jnp.diagonal(matrix))
        scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
        scaled = scale[:, None] * matrix * scale[None, :]
        eta = scale * jnp.linalg.solve(scaled, scale * gradient)
        eta = clip(eta, nonnegative)
        return Proposal(eta, quadratic_decrease(summary, eta))

    return Rule(propose, third_order=False)
