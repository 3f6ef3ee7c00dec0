"""The choice of the damping by the loss at the end of the step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.subspace.model import Model, damped_step

__all__ = ["Trial", "is_lost_in_rounding", "search"]

_FACTORS = (0.1, 1.0, 10.0)  # of the damping, tried at each update
_RETRIES = 6  # with a damping 100 times as large each, if none has the share
_SHARE = 0.1  # of the predicted decrease; with less, the model is not valid so far away
_AGREEMENT = 0.1  # of a slope after a step with that of the model
_MAX_DAMPING = 1e3  # the step is then one along the scaled gradient, 1e-3 long


class Trial(NamedTuple):
    """The best step so far.

    Attributes:
      damping: its damping, ().
      eta: its coefficients, (K S,); zeros if no step decreased the loss.
      decrease: of the loss, (); 0 if no step decreased it.
      predicted_decrease: by the model, ().
      noise: the rounding errors of the loss, ().
    """

    damping: jax.Array
    eta: jax.Array
    decrease: jax.Array
    predicted_decrease: jax.Array
    noise: jax.Array


def search(
    model: Model,
    damping: jax.Array,
    value: jax.Array,
    value_at: Callable[[jax.Array], jax.Array],
    slope_at: Callable[[jax.Array], jax.Array],
    noise: jax.Array,
) -> Trial:
    """The step with the largest decrease of the loss among several dampings.

    There are three trials, and more with larger dampings while the largest decrease is
    less than a tenth of what the model predicts for its step.

    A decrease that may be mostly rounding errors of the loss is replaced by the
    integral of the slope along the step, from the cubic polynomial with the exact first
    and second derivative at its start and the exact first derivative at its end. The
    same holds for an increase after a short step along which the slopes agree with the
    model: then the rounding errors were underestimated.

    Args:
      model: the model of the loss.
      damping: the damping of the last step, ().
      value: the loss, ().
      value_at: the loss after a step.
      slope_at: -d/dt of the loss after the step ``t * eta`` at t = 1.
      noise: the rounding errors of the loss as far as they are known, ().

    Returns:
      A :class:`Trial`. If no step decreases the loss, it has the damping with which to
      start at the next update.
    """
    min_damping = jnp.finfo(model.slopes.dtype).eps

    def trial(damping: jax.Array, is_retry: jax.Array) -> Trial:
        damping = jnp.clip(damping, min_damping, _MAX_DAMPING)
        eta, predicted = damped_step(model, damping)
        difference = (value - value_at(eta)).astype(eta.dtype)
        is_lost = is_lost_in_rounding(difference, value, noise)

        def from_slopes() -> tuple[jax.Array, jax.Array]:
            start, end = model.gradient @ eta, slope_at(eta)
            curvature = eta @ (model.hessian @ eta)
            integral = (2 / 3 * start - curvature / 6 + end / 3).astype(eta.dtype)
            is_as_predicted = jnp.abs(start - curvature - end) <= _AGREEMENT * start
            error = jnp.where(is_lost, 0, jnp.abs(difference - integral))
            return jax.tree.map(
                lambda x, y: jnp.where(is_lost | is_as_predicted, x, y),
                (integral, jnp.maximum(noise, error).astype(noise.dtype)),
                (difference, noise),
            )

        decrease, errors = jax.lax.cond(
            is_lost | (is_retry & (difference <= 0)),
            from_slopes,
            lambda: (difference, noise),
        )
        decrease = jnp.where(jnp.isfinite(decrease), decrease, -jnp.inf)
        return Trial(damping, eta, decrease, predicted, errors)

    def is_unfinished(state: tuple[jax.Array, Trial]) -> jax.Array:
        i, best = state
        is_poor = best.decrease <= _SHARE * best.predicted_decrease
        may_retry = is_poor & (i < len(_FACTORS) + _RETRIES)
        return (i < len(_FACTORS)) | may_retry

    def step(state: tuple[jax.Array, Trial]) -> tuple[jax.Array, Trial]:
        i, best = state
        new = trial(damping * factors[i], i >= len(_FACTORS))
        is_better = new.decrease > best.decrease
        return i + 1, jax.tree.map(lambda x, y: jnp.where(is_better, x, y), new, best)

    retries = [_FACTORS[-1] * 100.0 ** (i + 1) for i in range(_RETRIES)]
    factors = jnp.array([*_FACTORS, *retries], damping.dtype)
    zero = jnp.zeros_like(value, damping.dtype)
    refused = jnp.clip(damping * _FACTORS[-1], min_damping, _MAX_DAMPING)
    start = Trial(refused, jnp.zeros_like(model.slopes), zero, zero, noise)
    return jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), start))[1]


def is_lost_in_rounding(
    difference: jax.Array, value: jax.Array, noise: jax.Array
) -> jax.Array:
    """Whether a difference of two values of the loss may be mostly rounding errors.

    It has lost half of its digits or more, or is below ten times the measured rounding
    errors of the loss.
    """
    half = jnp.sqrt(jnp.finfo(value.dtype).eps) * jnp.abs(value)
    return jnp.abs(difference) <= jnp.maximum(half, 10 * noise)
