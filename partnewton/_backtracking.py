"""Backtracking along a step whose model of the loss may be wrong."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["descending_fraction"]

_SUFFICIENT = 0.1  # accepted decrease, relative to the first-order prediction
_EXPLOSIVE = 10.0  # an increase above this, in the same units, is not of first order
_MEASURABLE = 2.0 / _SUFFICIENT  # the smallest measurable change, in eps * |loss|
_SHORT = 0.5**20  # for so small a t the change of the loss is of first order


def descending_fraction(
    loss_at: Callable[[jax.Array], jax.Array],
    value: jax.Array,
    slope: jax.Array,
    max_halvings: jax.typing.ArrayLike,
) -> jax.Array:
    """The largest t of 1, 1/2, 1/4, ... at which a step decreases the loss enough.

    With slope = -d/dt loss_at(t) at 0, t is accepted if

        loss_at(t) - value <= -t slope / 10          for slope > 0,
        loss_at(t) - value <=  t |slope| 3/2         for slope <= 0.

    The gradient of some losses is not the derivative of their value: stop-gradient
    targets, straight-through estimators, surrogates of a constant value. The measured
    change then contradicts the slope down to the smallest t at which it can be
    measured, and t = 1 is returned, since no better information is available. If the
    loss increases by far more than the slope could explain, or `max_halvings` ends the
    search before that, the smallest t is returned.

    Args:
      loss_at: the loss after the step times t.
      value: the loss at t = 0.
      slope: the first-order prediction of the decrease at t = 1.
      max_halvings: the smallest t is ``0.5**max_halvings``.

    Returns:
      t, shape ().
    """
    allowed = jnp.where(slope > 0, -_SUFFICIENT * slope, -1.5 * slope)
    rounding = _MEASURABLE * jnp.finfo(value.dtype).eps * jnp.abs(value)

    def is_visible(t: jax.Array) -> jax.Array:
        return t * jnp.abs(slope) > rounding

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        t, failed, _ = state
        return (t > 1) | (failed & (t > 0.5**max_halvings) & is_visible(t))

    def halve(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        t, _, explosive = state
        t = t / 2
        rise = loss_at(t) - value
        bound = _EXPLOSIVE * t * jnp.abs(slope) + rounding
        return t, ~(rise <= t * allowed), explosive | ~(rise <= bound)

    start = jnp.full((), 2, slope.dtype), jnp.array(True), jnp.array(False)
    t, failed, explosive = jax.lax.while_loop(unfinished, halve, start)
    is_contradicted = failed & ~explosive & ((t <= _SHORT) | ~is_visible(t))
    return jnp.where(is_contradicted, 1, t)
