"""A step-size multiplier that is adapted by looking back on the recent trajectory.

Each step may be the best of its kind and all of them together be too long, where noise
or a narrow valley makes them oscillate, or too short, where they all point the same
way. The summary of a single step shows neither; how the loss changes along the
displacement of the last ten steps, and later of many more, shows both. It costs two
values of the loss and no gradient.
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
from partnewton.engines.compat import outlined

__all__ = ["ScaleByLookbackState", "scale_by_lookback"]


class ScaleByLookbackState(NamedTuple):
    """State of :func:`scale_by_lookback`.

    Attributes:
      count: how many updates were made, shape (), int32.
      factor: what the updates are multiplied by, shape ().
      slope: the derivative of the loss along the displacement over the last window, by
        which the factor was last adapted, shape ().
      anchor: the parameters at the start of the current window, None for leaves that
        are frozen; None if the rate is 0.
      window_start: the count at that time, shape (), int32.
      slope_sum: the sum of the slopes that were measured since, shape ().
    """

    count: jax.Array
    factor: jax.Array
    slope: jax.Array
    anchor: optax.Params
    window_start: jax.Array
    slope_sum: jax.Array


def scale_by_lookback(
    rate: jax.typing.ArrayLike = 0.2,
    *,
    slope_position: jax.typing.ArrayLike = 0.6,
    update_interval: jax.typing.ArrayLike = 10,
    window_growth: jax.typing.ArrayLike = 3.0,
    averaging_fraction: jax.typing.ArrayLike = 0.1,
    min_scale: jax.typing.ArrayLike = 0.005,
    max_scale: jax.typing.ArrayLike = 20.0,
    param_labels: partitions.ParamLabels | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by a factor that grows while the recent trajectory descends.

    With theta the parameters now and theta' those at the start of the window, the loss
    on the newest batch is a function of the position t along the displacement,

        phi(t) = L(theta' + t (theta - theta')),

    and the factor follows the sign of its derivative at p = slope_position, measured by
    a central difference between the parameters now and the mirrored position,

        slope = (phi(1) - phi(2 p - 1)) / (2 - 2 p),
        factor <- factor * exp(-rate * sign(slope)),

    which is exact where phi is quadratic. A difference within the rounding of the loss
    counts as zero.

    That batch took no part in the steps that it judges, so noise does not look like
    progress, as it does along a direction that was computed from the batch. Where steps
    of a fixed length have got as far as they can, the loss at both ends of the
    displacement is the same, the slope is zero in the middle and positive behind it,
    and the factor decays. Where all steps descend the factor grows, until the
    displacement is 1 / p times as long as is best along it. Only the sign enters:
    neither the units of the loss nor those of the parameters matter, and a single bad
    batch has little influence.

    The window is that of the last n updates, and it grows with training,

        n = max(update_interval, window_growth * sqrt(updates made)).

    Early there is much to gain and little noise; later it is the other way round. Over
    a longer window progress grows in proportion to n and noise only like sqrt(n), so
    that slow progress can be told from none. With a window proportional to the number
    of updates, the factor could change only polynomially in time. The slope of one
    batch is still mostly noise, so it is averaged over the last tenth of the window,
    each update with its own batch and its own displacement: n / 10 batches.

    Args:
      rate: by how much the logarithm of the factor changes. With the number 0 it stays
        1, no slope is measured and no copy of the parameters is kept.
      slope_position: where along the displacement the slope is taken, 0 at its start
        and 1 at its end, below 1; above a half, or the factor would not decay under
        noise.
      update_interval: the shortest window, in updates.
      window_growth: how quickly the window grows; 0 for `update_interval` throughout.
      averaging_fraction: over which fraction of the window, its end, slopes are
        averaged; each costs two values of the loss. It is one update at least.
      min_scale, max_scale: bounds of the factor.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is looked at:
        the displacement of frozen entries does not count; by default none is frozen.
      has_aux: whether `value_fn` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`ScaleByLookbackState`. It keeps one copy of the parameters. Its update
      function needs `params` and `value_fn`, see
      :func:`partnewton.scale_by_partition_newton`.

    Raises:
      ValueError: a number out of its range; from `update`, at trace time: `params` or
        `value_fn` is missing.

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

    is_constant = isinstance(rate, int | float) and rate == 0

    def init_fn(params: optax.Params) -> ScaleByLookbackState:
        anchor = None if is_constant else params
        if not is_constant and not partitions.is_placeholder(params):
            partition = partitions.partition_of(params, param_labels)
            # A buffer of its own, since both may be donated, and no weak type, which
            # would not outlast the first update.
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
        measures, adapts = age > window - num_slopes, age >= window  # or both

        def measure(anchor: optax.Params) -> tuple[jax.Array, optax.Params]:
            slope = _slope(loss_at, params, anchor, partition, slope_position)
            return slope, select(adapts, partition.take(params), anchor)

        def skip(anchor: optax.Params) -> tuple[jax.Array, optax.Params]:
            return jnp.zeros((), jnp.float32), anchor

        slope, anchor = jax.lax.cond(measures, measure, skip, state.anchor)
        slope_sum = state.slope_sum + jnp.where(jnp.isfinite(slope), slope, 0)
        mean = (slope_sum / num_slopes).astype(jnp.float32)
        mean = jnp.where(jnp.isfinite(mean), mean, 0)
        factor = state.factor * jnp.exp(-rate * jnp.sign(mean))
        factor = jnp.clip(factor, min_scale, max_scale)
        new = ScaleByLookbackState(
            count=optax.safe_increment(state.count),
            factor=jnp.where(adapts, factor, state.factor).astype(jnp.float32),
            slope=jnp.where(adapts, mean, state.slope),
            anchor=anchor,
            window_start=jnp.where(adapts, state.count, state.window_start),
            slope_sum=jnp.where(adapts, 0, slope_sum),
        )
        leaves, treedef = jax.tree.flatten(updates)
        for i in partition.active:
            leaves[i] = _scaled(new.factor, leaves[i])
        return jax.tree.unflatten(treedef, leaves), new

    return optax.GradientTransformationExtraArgs(
        init_fn, compiled_when_eager(update_fn, has_aux)
    )


_ROUNDING = 4.0  # units of it that a sum over a batch is taken to have


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
        lambda now, then: _scaled(-width, now - then), partition.take(params), anchor
    )
    value = outlined(loss_at)  # one program for both
    here, there = value(params), value(partition.moved(params, steps))
    difference = (here - there).astype(jnp.float32)
    rounding = _ROUNDING * float(jnp.finfo(here.dtype).eps) * jnp.abs(here)
    is_visible = ~(jnp.abs(difference) <= rounding)
    return jnp.where(is_visible, difference / width, 0).astype(jnp.float32)


def _scaled(factor: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """factor * x, in the dtype of x."""
    with permissive():
        return (factor * x).astype(x.dtype)
