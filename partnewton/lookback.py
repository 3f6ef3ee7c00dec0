"""A step-size multiplier, adapted to the loss along the recent trajectory.

Even if each step is optimal for its model, a sequence of steps can be too long, because
noise or a narrow valley makes them oscillate, or too short, because they all point in
the same direction. Derivatives at a single point detect neither. The change of the loss
along the displacement of the last ten steps, and later of many more, detects both, and
costs two evaluations of the loss and no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton._checks import check_number
from partnewton._eager import compiled_when_eager
from partnewton._error_hints import with_error_hints
from partnewton._extra_args import check_arguments, extract_fn_kwargs
from partnewton._strictness import permissive
from partnewton._tree import select
from partnewton.engines.compat import as_call

__all__ = ["ScaleByLookbackState", "scale_by_lookback"]


class ScaleByLookbackState(NamedTuple):
    """State of :func:`scale_by_lookback`.

    Attributes:
      count: the number of updates, shape (), int32.
      factor: the step-size multiplier, shape ().
      slope: the derivative of the loss along the displacement of the last complete
        window, whose sign determined the last change of the factor, shape ().
      anchor: the parameters at the start of the current window, None for leaves that
        are frozen; None if the rate is 0.
      window_start: the count at the start of the current window, shape (), int32.
      slope_sum: the sum of the slopes measured in the current window, shape ().
      streak: the number of windows in a row, up to the last one, in which the loss
        decreased, shape (), int32.
    """

    count: jax.Array
    factor: jax.Array
    slope: jax.Array
    anchor: optax.Params
    window_start: jax.Array
    slope_sum: jax.Array
    streak: jax.Array


def scale_by_lookback(
    rate: jax.typing.ArrayLike = 0.2,
    *,
    slope_position: jax.typing.ArrayLike = 0.6,
    update_interval: jax.typing.ArrayLike = 10,
    window_growth: jax.typing.ArrayLike = 3.0,
    averaging_fraction: jax.typing.ArrayLike = 0.1,
    min_scale: jax.typing.ArrayLike = 0.005,
    max_scale: jax.typing.ArrayLike = 20.0,
    adapt_steps: jax.typing.ArrayLike | None = None,
    param_labels: partitions.ParamLabels | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by a factor that grows while the recent trajectory descends.

    Let theta be the current parameters and theta' those at the start of the window. The
    loss of the newest batch is a function of the position t along the displacement,

        phi(t) = L(theta' + t (theta - theta')).

    Its derivative at p = slope_position is computed by a central difference between the
    current parameters and the position 2 p - 1, and the factor follows its sign,

        slope = (phi(1) - phi(2 p - 1)) / (2 - 2 p),
        factor <- factor * exp(-rate * sign(slope)).

    The difference is exact if phi is quadratic. It counts as zero if it is within the
    rounding error of the loss.

    The newest batch was not used to compute these steps, so its noise is independent of
    the displacement. Along a direction computed from the same batch, fitting the noise
    of that batch would be measured as progress. If steps of constant length no longer
    make progress, the loss at both ends of the displacement is the same, the slope is
    zero in the middle and positive beyond it, and the factor decays. If all steps
    descend, the factor grows until the displacement is 1 / p times as long as the one
    that minimises the loss in its direction. Only the sign is used: the units of the
    loss and of the parameters do not matter, and a single bad batch has little
    influence. From the fifth negative slope in a row on, the rate is doubled: noise
    seldom causes such a sequence; without noise it shows that the factor is too small.

    The window consists of the last n updates and grows during training,

        n = max(update_interval, window_growth * sqrt(count)),

    with the number of updates `count` at its start. Early in training progress is fast
    compared with the noise, later it is slow. Over a longer window progress grows in
    proportion to n, and noise only like sqrt(n), so that even slow progress becomes
    visible. With a window proportional to the number of updates, the factor could
    change only polynomially in time. The slope of one batch is still mostly noise, so
    it is averaged over the last tenth of the window: n / 10 updates, each with its own
    batch and displacement.

    Args:
      rate: the change of the logarithm of the factor per window. If it is the number 0,
        the factor is 1, no slope is computed and no copy of the parameters is stored.
      slope_position: the position p along the displacement at which the slope is
        computed, 0 for its start and 1 for its end. It must be below 1. It should be
        above 0.5, since otherwise the factor does not decay under noise.
      update_interval: the length of the shortest window, in updates.
      window_growth: the coefficient of the square root in n; with 0, all windows have
        `update_interval` updates.
      averaging_fraction: the fraction of the window, at its end, over which slopes are
        averaged, at least one update. Each slope costs two evaluations of the loss.
      min_scale, max_scale: bounds of the factor.
      adapt_steps: the number of updates after which the factor is kept and no slope is
        computed, for a schedule that shortens the steps from then on; by default the
        factor is always adapted.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is used:
        frozen entries do not move along the displacement. By default none is frozen.
      has_aux: whether `value_fn` returns ``(loss, aux)``; aux is ignored.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`ScaleByLookbackState`. It stores one copy of the parameters. Its update
      function needs `params` and `value_fn`, see
      :func:`partnewton.scale_by_partition_newton`.

    Raises:
      ValueError: if a number is out of its range; from `update`, at trace time, if
        `params` or `value_fn` is missing.

    Example:
      >>> loss = lambda params: params["x"] ** 2
      >>> tx = scale_by_lookback(update_interval=1, window_growth=0)
      >>> params, state = {"x": jnp.array(8.0)}, tx.init({"x": jnp.array(8.0)})
      >>> for _ in range(3):
      ...     steps = {"x": jnp.array(-1.0)}
      ...     updates, state = tx.update(steps, state, params, value_fn=loss)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{state.factor:.3f}", end=" ")
      1.000 1.221 1.492
    """
    param_labels = partitions.per_tensor if param_labels is None else param_labels
    numbers = {
        "rate": rate,
        "slope_position": slope_position,
        "window_growth": window_growth,
        "averaging_fraction": averaging_fraction,
        "min_scale": min_scale,
        "max_scale": max_scale,
    }
    for name, number in numbers.items():
        check_number(name, number)
    check_number("update_interval", update_interval, minimum=1)
    check_number("slope_position", slope_position, below=1)
    if adapt_steps is not None:
        check_number("adapt_steps", adapt_steps)

    is_constant = isinstance(rate, int | float) and rate == 0

    def init_fn(params: optax.Params) -> ScaleByLookbackState:
        anchor = None if is_constant else params
        if not is_constant and not partitions.is_placeholder(params):
            partition = partitions.partition_of(params, param_labels)
            # A copy, since state and parameters may both be donated. It is not weakly
            # typed, because the anchor after an update is not.
            anchor = jax.tree.map(
                lambda x: jnp.array(x, x.dtype, copy=True), partition.take(params)
            )
        return ScaleByLookbackState(
            count=jnp.zeros((), jnp.int32),
            factor=jnp.ones((), jnp.float32),
            slope=jnp.zeros((), jnp.float32),
            anchor=anchor,
            window_start=jnp.zeros((), jnp.int32),
            slope_sum=jnp.zeros((), jnp.float32),
            streak=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByLookbackState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByLookbackState]:
        check_arguments("scale_by_lookback", params, value_fn)
        if is_constant:
            return updates, state._replace(count=optax.safe_increment(state.count))
        loss_args = extract_fn_kwargs(value_fn, extra_args)
        partition = partitions.partition_of(params, param_labels)

        def loss_at(x: optax.Params) -> jax.Array:
            value = with_error_hints(value_fn, params)(x, **loss_args)
            return value[0] if has_aux else value

        window = jnp.floor(window_growth * jnp.sqrt(state.window_start))
        window = jnp.maximum(update_interval, window)
        num_slopes = jnp.maximum(jnp.floor(averaging_fraction * window), 1)
        age = (state.count - state.window_start).astype(window.dtype)
        measures, adapts = age > window - num_slopes, age >= window
        if adapt_steps is not None:
            is_adaptive = state.count < jnp.asarray(adapt_steps, jnp.int32)
            measures, adapts = measures & is_adaptive, adapts & is_adaptive

        def measure(anchor: optax.Params) -> tuple[jax.Array, optax.Params]:
            slope = _slope(loss_at, params, anchor, partition, slope_position)
            return slope, select(adapts, partition.take(params), anchor)

        def skip(anchor: optax.Params) -> tuple[jax.Array, optax.Params]:
            return jnp.zeros((), jnp.float32), anchor

        slope, anchor = jax.lax.cond(measures, measure, skip, state.anchor)
        slope_sum = state.slope_sum + jnp.where(jnp.isfinite(slope), slope, 0)
        mean = (slope_sum / num_slopes).astype(jnp.float32)
        mean = jnp.where(jnp.isfinite(mean), mean, 0)
        streak = jnp.where(mean < 0, optax.safe_increment(state.streak), 0)
        pace = jnp.where(streak >= _LONG_STREAK, 2.0, 1.0)
        factor = state.factor * jnp.exp(-rate * pace * jnp.sign(mean))
        factor = jnp.clip(factor, min_scale, max_scale)
        new = ScaleByLookbackState(
            count=optax.safe_increment(state.count),
            factor=jnp.where(adapts, factor, state.factor).astype(jnp.float32),
            slope=jnp.where(adapts, mean, state.slope),
            anchor=anchor,
            window_start=jnp.where(adapts, state.count, state.window_start),
            slope_sum=jnp.where(adapts, 0, slope_sum),
            streak=jnp.where(adapts, streak, state.streak),
        )
        leaves, treedef = jax.tree.flatten(updates)
        for i in partition.active:
            leaves[i] = _times(new.factor, leaves[i])
        return jax.tree.unflatten(treedef, leaves), new

    return optax.GradientTransformationExtraArgs(
        init_fn, compiled_when_eager(update_fn, has_aux)
    )


_LONG_STREAK = 5  # windows; noise alone completes as many in 1 of 32
_ROUNDING_UNITS = 4.0  # rounding error of a loss, in units of eps * |loss|


def _slope(
    loss_at: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    anchor: optax.Params,
    partition: partitions.Partition,
    position: jax.typing.ArrayLike,
) -> jax.Array:
    """The derivative of the loss along the displacement since the anchor."""
    width = 2 - 2 * position
    steps = jax.tree.map(
        lambda now, then: _times(-width, now - then), partition.take(params), anchor
    )
    value = as_call(loss_at)  # compiled once for both points
    here, there = value(params), value(partition.moved(params, steps))
    difference = (here - there).astype(jnp.float32)
    rounding = _ROUNDING_UNITS * float(jnp.finfo(here.dtype).eps) * jnp.abs(here)
    is_visible = ~(jnp.abs(difference) <= rounding)
    return jnp.where(is_visible, difference / width, 0).astype(jnp.float32)


def _times(factor: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """factor * x, in the dtype of x."""
    with permissive():
        return (factor * x).astype(x.dtype)
