"""`scale_by_partition_newton`: one learning rate for each subset of the updates.

The incoming updates are the direction. A summary contains the derivatives of the loss
along it; a running average and a rule compute learning rates from the summary; each
subset of the updates is multiplied by its learning rate. The method is that of
P. Wolinski (arXiv 2312.03885). Differences from the paper: rates that are not finite
are rejected and counted, and a subset whose direction is zero keeps its last rate.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import averaging, engines, partitions, rules
from partnewton._checks import check_average, check_number, check_rule
from partnewton._decay import Mask, WeightDecay
from partnewton._eager import compiled_when_eager
from partnewton._extra_args import check_arguments, extract_fn_kwargs
from partnewton._measured_direction import MeasuredDirection
from partnewton._refresh import (
    Refresh,
    Refreshed,
    is_cut,
    next_refresh,
    size_for_intervals,
)
from partnewton._tree import all_finite, select
from partnewton.summary import Summary

__all__ = ["ScaleByPartitionNewtonState", "scale_by_partition_newton"]


class ScaleByPartitionNewtonState(NamedTuple):
    """State of :func:`scale_by_partition_newton`. S is the number of subsets.

    `state.summary` contains the loss and its last derivatives as one
    :class:`~partnewton.Summary`.

    Attributes:
      count: the number of updates, shape (), int32.
      loss: the loss at the last refresh, shape ().
      gradient: <dL/dparams, u_s> at the last refresh, shape (S,).
      hessian: <u_s, H u_t> at the last refresh, shape (S, S).
      third: D^3 L[u_s, u_s, u_s] at the last refresh, shape (S,), zero where it is not
        finite or the loss cannot be differentiated three times; None if the rule does
        not read it.
      direction_scale: the norm or RMS by which each subset of the direction was divided
        at the last refresh, shape (S,); ones if directions are not normalised.
      learning_rates: eta, shape (S,), before the factors of later transformations.
      predicted_decrease: the decrease of the loss that the rule predicts for the rates
        that it proposes, shape ().
      status: a :class:`~partnewton.CubicStatus`, shape (), int32.
      notfinite_count: the number of updates at which something was not finite: the
        result of a refresh, which is then rejected, or the incoming updates, which are
        then replaced by zeros; shape (), int32.
      next_refresh: the count at which the rates are refreshed next; a rejected refresh
        does not change it, shape (), int32.
      average: the state of the running average of summaries, or an empty tuple.
      smoothing: the state of the running average of rates, or an empty tuple.
      subsets: ``{"0 first name": None, "1 second name": None, ...}``, the subsets in
        the order of the axes of length S. The names are part of the tree structure.
    """

    count: jax.Array
    loss: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    third: jax.Array | None
    direction_scale: jax.Array
    learning_rates: jax.Array
    predicted_decrease: jax.Array
    status: jax.Array
    notfinite_count: jax.Array
    next_refresh: jax.Array
    average: Any
    smoothing: Any
    subsets: dict[str, None]

    @property
    def summary(self) -> Summary:
        """The last summary that was accepted."""
        return Summary(self.loss, self.gradient, self.hessian, self.third)


def scale_by_partition_newton(
    rule: Callable[[Summary], rules.Proposal] | None = None,
    *,
    param_labels: partitions.ParamLabels | None = None,
    normalize: Literal["norm", "rms"] | None = None,
    update_interval: jax.typing.ArrayLike | None = 1,
    average: averaging.Average | None = None,
    smoothing: averaging.Average | None = None,
    backtracking: jax.typing.ArrayLike = 0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scale each subset of the updates by a rate computed from second derivatives.

    The incoming updates are a direction u with the sign of a gradient, and the outgoing
    updates are ``eta_s * u_s``, with the same sign. The rule computes the rates eta
    from the exact derivatives of the loss along u, see :func:`partnewton.summarize`.

    The update function needs `params` and the extra argument `value_fn`, the loss as a
    function of the parameters. Other arguments of `value_fn`, such as the batch, are
    passed to `update` by keyword, as for the line searches of optax: extra arguments
    named in the signature of `value_fn` are passed on, and all others are ignored.

    Inside :func:`optax.masked` and :func:`optax.partition`, `value_fn` receives
    parameters in which leaves are replaced by :class:`optax.MaskedNode`, and fails
    unless it handles them. To leave parameters as they are, label them
    :data:`partitions.FROZEN` instead. Inside :class:`optax.MultiSteps` only the last
    micro-step counts: `value_fn` is evaluated on its micro-batch alone,
    `update_interval` counts accumulated updates, and a refresh is computed at each
    micro-step of its update.

    Args:
      rule: computes learning rates from a summary, see :mod:`partnewton.rules`; by
        default ``rules.cubic()``.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default each
        leaf is a subset.
      normalize: "norm" or "rms" to scale each subset of the direction to the norm 1 or
        the root mean square (RMS) 1 first. The rates are then lengths of steps: they
        remain valid while the norm of a gradient changes, and summaries can be averaged
        over time. With "rms" a rate is the RMS change of the entries per step,
        comparable between tensors of different sizes and with Adam's learning rate. By
        default the direction is not scaled.
      update_interval: the number of updates between two refreshes of the rates; None
        for a quarter of the updates so far, at least 20 and at most 5 S, where tensors
        count instead of subsets if there are more of them.
        A summary costs up to about S/2 gradients, so that in the long run refreshes
        cost at most a tenth of the gradients in between, without those after a cut:
        with None, the next refresh follows after three updates if the largest rate is
        less than a quarter of the one before, because one unusual batch can be the
        reason. While all rates are zero, they are refreshed at each update, because the
        parameters do not change until then; a direction of zeros never causes a
        refresh.
      average: a running average of the summaries, see :mod:`partnewton.averaging`; by
        default the newest summary is used.
      smoothing: a running average of the rates that the rule proposes, as a tuple of
        one array; by default the newest rates are used.
      backtracking: maximal number of times that new rates are halved, until a step with
        the factor 1 decreases the loss by at least a tenth of the first-order
        prediction (if that is an increase: until the loss increases by at most 1.5
        times the prediction). Only refreshes evaluate the loss, once and once more for
        each halving, on the data of `value_fn`. By default rates are not halved. This
        protects against models that are far from the loss, for example at a saturated
        softmax, where the curvature vanishes. If the gradient is not the derivative of
        the loss, as with stop-gradient targets, and shorter steps do not help, rates
        are not halved.
      weight_decay: decoupled weight decay, as in :func:`optax.adamw`, except that the
        length of the step, ``|eta_s| * rms(u_s)``, takes the place of the learning
        rate: ``weight_decay * length * theta_s`` is added to the outgoing updates.
        AdamW's usual values, 0.01 to 0.1, can be used. The loss is measured along the
        direction without decay, and `backtracking` ignores it.
      mask: which leaves are decayed, as in :func:`optax.adamw`: a tree of booleans with
        the structure of the parameters or of a prefix of it, or a function from the
        parameters to one. By default all leaves that are not frozen.
      engine: how summaries are computed, see :func:`partnewton.summarize`.
      has_aux: whether `value_fn` returns ``(loss, aux)``; aux is ignored.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, whose state is a
      :class:`ScaleByPartitionNewtonState`.

    Raises:
      ValueError, TypeError: from `init` and `update`, at trace time, if an argument
        is invalid; the message names the argument and the leaf.

    Example:
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     scale_by_partition_newton(),
      ...     optax.scale_by_learning_rate(0.3),
      ... )
      >>> loss = lambda params, x: jnp.mean((params["w"] * x - 1.0) ** 2)
      >>> params, x = {"w": jnp.array(3.0)}, jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> grads = jax.grad(loss)(params, x)
      >>> updates, state = tx.update(grads, state, params, value_fn=loss, x=x)
      >>> print(optax.apply_updates(params, updates)["w"])
      2.28

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    rule = rules.cubic() if rule is None else rule
    param_labels = partitions.per_tensor if param_labels is None else param_labels
    average = averaging.none() if average is None else average
    smoothing = averaging.none() if smoothing is None else smoothing
    check_rule(rule)
    check_average("average", average)
    check_average("smoothing", smoothing)
    check_number("backtracking", backtracking)
    if update_interval is not None:
        check_number("update_interval", update_interval, minimum=1)
    if normalize not in (None, "norm", "rms"):
        raise ValueError(f"normalize must be 'norm', 'rms' or None, got {normalize!r}.")
    decay = WeightDecay(weight_decay, mask)
    refresh = Refresh(rule, average, smoothing, backtracking, engine, has_aux)

    def init_fn(params: optax.Params) -> ScaleByPartitionNewtonState:
        if partitions.is_placeholder(params):  # no state leaf is like a parameter
            return _initial_state(refresh, 1, np.dtype(np.float32), jnp.zeros(()))
        partition = partitions.partition_of(params, param_labels)
        subsets = {f"{s} {name}": None for s, name in enumerate(partition.names)}
        return _initial_state(refresh, partition.size, partition.dtype, subsets)

    def update_fn(
        updates: optax.Updates,
        state: ScaleByPartitionNewtonState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByPartitionNewtonState]:
        check_arguments("scale_by_partition_newton", params, value_fn)
        loss_args = extract_fn_kwargs(value_fn, extra_args)
        direction = MeasuredDirection(updates, params, param_labels, normalize)

        def refreshed(
            old: ScaleByPartitionNewtonState,
        ) -> ScaleByPartitionNewtonState:
            found = refresh(
                lambda x: value_fn(x, **loss_args),
                direction,
                old.learning_rates,
                old.average,
                old.smoothing,
            )
            size = size_for_intervals(direction.partition)
            after_cut = is_cut(old.learning_rates, found.learning_rates)
            following = next_refresh(old.count, update_interval, size, after_cut)
            return _accepted(found, direction.scale, old, following)

        at_rest = jnp.all(state.learning_rates == 0)
        due = (state.count >= state.next_refresh) | at_rest
        new = jax.lax.cond(
            due & direction.is_measurable, refreshed, lambda old: old, state
        )
        eta = new.learning_rates
        is_usable = direction.is_finite(eta)
        # Count an update once, even if several values are not finite.
        notfinite_count = jnp.where(
            is_usable,
            new.notfinite_count,
            optax.safe_increment(state.notfinite_count),
        )
        scaled = direction.scaled(eta, where=is_usable)
        scaled = decay.added_to(scaled, direction, jnp.where(is_usable, eta, 0))
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(direction.treedef, scaled), new._replace(
            count=count, notfinite_count=notfinite_count
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, compiled_when_eager(update_fn, has_aux)
    )


def _initial_state(
    refresh: Refresh, size: int, dtype: np.dtype, subsets: Any
) -> ScaleByPartitionNewtonState:
    def zero_summary() -> Summary:  # new buffers each time, so that all can be donated
        third = jnp.zeros(size, dtype) if refresh.third_order else None
        shapes = (), (size,), (size, size)
        return Summary(*(jnp.zeros(shape, dtype) for shape in shapes), third)

    return ScaleByPartitionNewtonState(
        jnp.zeros((), jnp.int32),
        *zero_summary(),
        direction_scale=jnp.zeros(size, dtype),
        learning_rates=jnp.zeros(size, dtype),
        predicted_decrease=jnp.zeros((), dtype),
        status=jnp.zeros((), jnp.int32),
        notfinite_count=jnp.zeros((), jnp.int32),
        next_refresh=jnp.zeros((), jnp.int32),
        average=refresh.average.init(zero_summary()),
        smoothing=refresh.smoothing.init((jnp.zeros(size, dtype),)),
        subsets=subsets,
    )


def _accepted(
    found: Refreshed,
    direction_scale: jax.Array,
    old: ScaleByPartitionNewtonState,
    next_refresh: jax.Array,
) -> ScaleByPartitionNewtonState:
    """The state after a refresh; if that is not finite, it is counted and rejected."""
    new = old._replace(
        loss=found.summary.value,
        gradient=found.summary.gradient,
        hessian=found.summary.hessian,
        third=found.summary.third,
        direction_scale=direction_scale.astype(old.direction_scale.dtype),
        learning_rates=found.learning_rates,
        predicted_decrease=found.proposal.predicted_decrease,
        status=found.proposal.status,
        next_refresh=next_refresh,
        average=found.average,
        smoothing=found.smoothing,
    )
    count = optax.safe_increment(old.notfinite_count)
    is_good = all_finite((found.proposal, new))
    return select(is_good, new, old._replace(notfinite_count=count))
