"""A factor on all steps that looks back on those that were made.

Each step may be the best of its kind and all of them together be too long, where noise
or a narrow valley makes them jump to and fro, or too short, where they all point the
same way. Neither is seen in the summary of a single step; both are seen in hindsight,
in how the loss changes along the way of the last ten, and later of many more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import partitions
from partnewton._extra_args import check_arguments, picked

__all__ = ["ScaleByHindsightState", "scale_by_hindsight"]


class ScaleByHindsightState(NamedTuple):
    """State of :func:`scale_by_hindsight`.

    Attributes:
      count: how many updates were made, shape (), int32.
      factor: what the updates are multiplied by, shape ().
      slope: the derivative of the loss along the way of the last interval by which the
        factor was last adapted, shape ().
      anchor: the parameters at that time, None for leaves that are frozen.
      begin: how many updates were made by then, shape (), int32.
      seen: the sum of the slopes that were seen since, shape ().
    """

    count: jax.Array
    factor: jax.Array
    slope: jax.Array
    anchor: optax.Params
    begin: jax.Array
    seen: jax.Array


def scale_by_hindsight(
    rate: jax.typing.ArrayLike = 0.2,
    *,
    place: jax.typing.ArrayLike = 0.6,
    update_interval: jax.typing.ArrayLike = 10,
    growth: jax.typing.ArrayLike = 3.0,
    share: jax.typing.ArrayLike = 0.1,
    smallest: jax.typing.ArrayLike = 0.005,
    largest: jax.typing.ArrayLike = 20.0,
    param_labels: partitions.ParamLabels | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by a factor that grows while the way that was made pays.

    With the parameters now, theta, and those of an interval ago, theta', the factor
    follows the sign of a derivative of the loss on the newest batch,

        slope = d/dt L(theta' + t (theta - theta'))  at t = place,
        factor <- factor * exp(-rate * sign(slope)).

    The batch took no part in the steps that it judges, so that noise does not look like
    progress, as it does along a direction that the batch has chosen. Where steps of a
    fixed length have got as far as they can, the loss at both ends of the way is alike,
    its slope is zero in the middle and positive behind, and the factor decays. Where
    all steps descend it grows, until the way is 1 / place times as long as is best for
    it. Nothing but a sign enters: neither the units of the loss nor those of the
    parameters matter, and one bad batch does little.

    The way is that of the last n updates, more and more of them,

        n = max(update_interval, growth * sqrt(updates made)).

    Early there is much to gain and little noise; later it is the other way round. Along
    a longer way progress grows in proportion and noise by its square root only, so that
    slow progress is told from none. Were the way a share of all that was made, the
    factor could change by a power of time at most, and a bad one would last for long.
    The slope of one batch is still mostly noise. So it is the mean over the last tenth
    of these updates, each with its own batch and the way so far: n / 10 batches.

    Args:
      rate: by how much the logarithm of the factor changes; with 0 it stays 1.
      place: where on the way the slope is taken, 0 at its start and 1 at its end; above
        a half, or the factor would not decay under noise.
      update_interval: look back at every so many updates at first.
      growth: how quickly the way gets longer; 0 for `update_interval` throughout.
      share: over which of the updates, the last, slopes are averaged; each costs one
        gradient. It is one update at least.
      smallest, largest: the factor stays between these two.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is looked at:
        how frozen entries moved is not our doing; by default none is frozen.
      has_aux: whether `value_fn` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a
      :class:`ScaleByHindsightState`. It keeps one copy of the parameters. Its update
      function needs `params` and `value_fn`, see
      :func:`partnewton.scale_by_partition_newton`.

    Raises:
      ValueError: from `update`, at trace time: `params` or `value_fn` is missing.

    Example:
      >>> loss = lambda params: params["x"] ** 2
      >>> tx = scale_by_hindsight(update_interval=1, growth=0)
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
        "place": place,
        "growth": growth,
        "share": share,
        "smallest": smallest,
        "largest": largest,
    }
    for name, number in numbers.items():
        if isinstance(number, int | float | np.number) and not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}.")
    if isinstance(update_interval, int | np.integer) and update_interval < 1:
        raise ValueError(f"update_interval must be at least 1, got {update_interval}.")

    def init_fn(params: optax.Params) -> ScaleByHindsightState:
        is_placeholder = partitions.is_placeholder(params)
        anchor = params if is_placeholder else _moving(params, param_labels)
        one, none = jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32)
        zero = jnp.zeros_like(one)
        return ScaleByHindsightState(none, one, zero, anchor, none, zero)

    def update_fn(
        updates: optax.Updates,
        state: ScaleByHindsightState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByHindsightState]:
        check_arguments("scale_by_hindsight", params, value_fn)
        loss_args = picked(value_fn, extra_args)
        moving = _moving(params, param_labels)

        def loss_at(moved: optax.Params) -> jax.Array:
            value = value_fn(_put_back(moved, params), **loss_args)
            return value[0] if has_aux else value

        interval = jnp.floor(growth * jnp.sqrt(state.begin))
        interval = jnp.maximum(update_interval, interval)
        looks = jnp.maximum(jnp.floor(share * interval), 1)
        age = state.count - state.begin

        def look_back(old: ScaleByHindsightState) -> ScaleByHindsightState:
            way = jax.tree.map(jnp.subtract, moving, old.anchor)
            way = _without_frozen(way, params, param_labels)
            middle = jax.tree.map(
                lambda x, d: x - ((1 - place) * d).astype(x.dtype), moving, way
            )
            # Backwards, as every loss can be differentiated: a `custom_vjp` cannot
            # forwards.
            grads = jax.grad(loss_at)(middle)
            active = partitions.partition_of(params, param_labels).of_active()
            products = active.inner(jax.tree.leaves(grads), jax.tree.leaves(way))
            slope = jnp.sum(products).astype(old.slope.dtype)
            seen = old.seen + jnp.where(jnp.isfinite(slope), slope, 0)
            return jax.lax.cond(
                age >= interval, adapt, lambda s: s, old._replace(seen=seen)
            )

        def adapt(old: ScaleByHindsightState) -> ScaleByHindsightState:
            slope = (old.seen / looks).astype(old.slope.dtype)
            slope = jnp.where(jnp.isfinite(slope), slope, 0)
            factor = old.factor * jnp.exp(-rate * jnp.sign(slope))
            factor = jnp.clip(factor, smallest, largest).astype(old.factor.dtype)
            zero = jnp.zeros_like(old.seen)
            return ScaleByHindsightState(
                old.count, factor, slope, moving, old.count, zero
            )

        looks_now = age > interval - looks
        state = jax.lax.cond(looks_now, look_back, lambda old: old, state)
        scaled = jax.tree.map(lambda u: (state.factor * u).astype(u.dtype), updates)
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moving(params: optax.Params, param_labels: partitions.ParamLabels) -> optax.Params:
    """The leaves that are not frozen altogether, None in place of the others."""
    partition = partitions.partition_of(params, param_labels)
    leaves, treedef = jax.tree.flatten(params)
    kept = [
        # A weak type would not outlast the first update.
        jnp.asarray(x, jnp.result_type(x)).astype(jnp.result_type(x))
        if i in partition.active
        else None
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, kept)


def _put_back(moving: optax.Params, params: optax.Params) -> optax.Params:
    """`params` with the leaves of `moving` where it has any."""
    leaves, treedef = jax.tree.flatten(params)
    kept = treedef.flatten_up_to(moving)
    merged = [y if x is None else x for x, y in zip(kept, leaves, strict=True)]
    return jax.tree.unflatten(treedef, merged)


def _without_frozen(
    way: optax.Params, params: optax.Params, param_labels: partitions.ParamLabels
) -> optax.Params:
    """`way`, zero at the entries that are frozen inside a leaf."""
    partition = partitions.partition_of(params, param_labels).of_active()
    leaves, treedef = jax.tree.flatten(way)
    return jax.tree.unflatten(
        treedef,
        [
            jnp.where(
                partitions.sharded_like(x, label == partitions.FROZEN),
                jnp.zeros_like(x),
                x,
            )
            for x, label in zip(leaves, partition.labels, strict=True)
        ],
    )
