"""A step along one direction that has the length of a Newton step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.subspace.search import is_lost_in_rounding

__all__ = ["LineStep", "line_step"]

_SUFFICIENT = 1e-4  # of the decrease t * slope that the slope predicts
_MOST_TRIALS = 5


class LineStep(NamedTuple):
    """A multiple of a direction.

    Attributes:
      length: the factor t, ().
      decrease: of the loss, (); 0 if no step decreased it sufficiently.
    """

    length: jax.Array
    decrease: jax.Array


def line_step(
    value: jax.Array,
    slope: jax.Array,
    value_at: Callable[[jax.Array], jax.Array],
    slope_at: Callable[[jax.Array], jax.Array],
    noise: jax.Array,
) -> LineStep:
    """A step t * direction with a sufficient decrease of the loss, from t = 1 on.

    After each trial, t is the minimum of the parabola with the values at both ends and
    the slope at the start, but between a tenth and a half of the last t. A decrease
    that is lost in the rounding errors of the loss is computed from the slopes at both
    ends, by the trapezoidal rule.

    Args:
      value: the loss at t = 0, ().
      slope: the decrease of the loss per unit of t at t = 0, (); if it is 0, no step is
        tried.
      value_at: the loss at t.
      slope_at: the decrease of the loss per unit of t, at t.
      noise: the rounding errors of the loss, ().

    Returns:
      A :class:`LineStep`.
    """

    def decrease_at(t: jax.Array) -> jax.Array:
        difference = value - value_at(t).astype(value.dtype)

        def from_slopes() -> jax.Array:
            return (t * (slope + slope_at(t)) / 2).astype(value.dtype)

        decrease = jax.lax.cond(
            is_lost_in_rounding(difference, value, noise),
            from_slopes,
            lambda: difference,
        )
        return jnp.where(jnp.isfinite(decrease), decrease, -jnp.inf)

    def is_unfinished(state: tuple[jax.Array, LineStep]) -> jax.Array:
        i, (t, decrease) = state
        return (slope > 0) & (i < _MOST_TRIALS) & ~_is_sufficient(t, decrease)

    def next_trial(state: tuple[jax.Array, LineStep]) -> tuple[jax.Array, LineStep]:
        i, (t, decrease) = state
        # L(t) = value - slope t + (slope t - decrease) (t / t_last)^2
        best = slope * t * t / (2 * (slope * t - decrease))
        shorter = jnp.clip(jnp.nan_to_num(best), 0.1 * t, 0.5 * t)
        t = jnp.where(i == 0, 1, shorter)
        return i + 1, LineStep(t, decrease_at(t))

    def _is_sufficient(t: jax.Array, decrease: jax.Array) -> jax.Array:
        return decrease > _SUFFICIENT * slope * t

    none = LineStep(jnp.ones_like(value), jnp.full_like(value, -jnp.inf))
    _, (t, decrease) = jax.lax.while_loop(
        is_unfinished, next_trial, (jnp.int32(0), none)
    )
    return LineStep(t, jnp.where(_is_sufficient(t, decrease), decrease, 0))
