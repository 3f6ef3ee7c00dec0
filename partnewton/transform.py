"""The optax transformation: updates in, updates with their learning rates out.

Data flows one way: the updates are the direction; with the parameters and the loss
they make a summary; an average and a rule turn it into learning rates; each subset of
the updates is multiplied by its own. The method is P. Wolinski's (arXiv 2312.03885).
What differs from the paper: rates that cannot be trusted (not finite) are refused and
counted, and a subset whose direction is zero keeps its last rate.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import averaging, engines, partitions, rules
from partnewton._checks import check_average, check_number, check_rule
from partnewton._eager import compiled_when_eager
from partnewton._extra_args import check_arguments, extract_fn_kwargs
from partnewton._measured_direction import MeasuredDirection
from partnewton._refresh import Refresh, Refreshed, refresh_interval
from partnewton._tree import all_finite, select
from partnewton.summary import Summary

__all__ = ["ScaleByPartitionNewtonState", "scale_by_partition_newton"]


class ScaleByPartitionNewtonState(NamedTuple):
    """State of :func:`scale_by_partition_newton`. S is the number of subsets.

    `state.summary` gives the last four measurements as one
    :class:`~partnewton.Summary`.

    Attributes:
      count: how many updates were made, shape (), int32.
      loss: the loss at the last refresh, shape ().
      gradient: <dL/dparams, u_s> at the last refresh, shape (S,).
      hessian: <u_s, H u_t> at the last refresh, shape (S, S).
      third: D^3 L[u_s, u_s, u_s] at the last refresh, shape (S,), zero where it is not
        finite or the loss cannot be differentiated three times; None with a rule that
        does not read it.
      learning_rates: eta, shape (S,), before any factor that stands later in a chain.
      predicted_decrease: by how much the rule expected the loss to fall with these
        rates in full, shape ().
      status: a :class:`~partnewton.CubicStatus`, shape (), int32.
      notfinite_count: at how many updates something was not finite: a refresh, after
        which the last good rates stay in force, or the updates themselves, which are
        then zero; shape (), int32.
      next_refresh: the count at which the rates are refreshed next; it does not advance
        at a refresh that is not finite, shape (), int32.
      average: the state of the running average of summaries, or an empty tuple.
      smoothing: the state of the running average of rates, or an empty tuple.
      subsets: ``{"0 first name": None, "1 second name": None, ...}``, the subsets in
        the order of every axis: part of the structure, not of the arrays.
    """

    count: jax.Array
    loss: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    third: jax.Array | None
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
    rule: rules.Rule | None = None,
    *,
    param_labels: partitions.ParamLabels | None = None,
    normalize: Literal["norm", "rms"] | None = None,
    update_interval: jax.typing.ArrayLike | None = 1,
    average: averaging.Average | None = None,
    smoothing: averaging.Average | None = None,
    backtracking: jax.typing.ArrayLike = 0,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scale each subset of the updates by a learning rate that is solved for.

    The incoming updates are a direction u, gradient-like, and the outgoing updates are
    ``eta_s * u_s``, without a change of sign. The rates eta come from the exact summary
    of the loss along u (see :func:`partnewton.summarize`) by way of the rule.

    The update function needs `params` and the extra argument `value_fn`, the loss as a
    function of the parameters. Its further arguments are given by keyword, as to the
    line searches of optax: the names in its signature are picked, and all other extra
    arguments are ignored.

    Inside :func:`optax.masked` and :func:`optax.partition`, `value_fn` is given
    parameters with holes, :class:`optax.MaskedNode`, and fails unless it fills them in
    itself. To leave parameters as they are, label them :data:`partitions.FROZEN`
    instead. Inside :class:`optax.MultiSteps` only the last micro-step counts:
    `value_fn` sees its micro-batch alone, `update_interval` counts accumulated updates,
    and an update at which the rates are due is paid for at each of its micro-steps.

    Args:
      rule: from a summary to learning rates, see :mod:`partnewton.rules`; by default
        ``rules.cubic()``.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default each
        leaf is a subset.
      normalize: "norm" or "rms" to give each subset of the direction the norm 1 or the
        root mean square 1 first. The rates are then lengths of steps, which can be kept
        while the norm of a gradient changes, and summaries can be averaged over time.
        With "rms" a rate is by how much an entry moves, as Adam's is, alike for large
        and small tensors. By default the direction stays as it is.
      update_interval: refresh the rates at every so many updates, and keep them in
        between; None for a quarter of the updates so far, at least 20 and at most 5 S.
        A summary costs about S/2 gradients, so that in the long run refreshes cost a
        tenth of the gradients in between. While all rates are zero they are refreshed
        at each update, since nothing moves until then, and never along a direction of
        zeros.
      average: a running average of the summaries, see :mod:`partnewton.averaging`; by
        default the newest summary alone.
      smoothing: a running average of the rates that the rule proposes, as a tuple of
        one array; by default the newest rates alone.
      backtracking: how often new rates are halved, at most, while a step with them in
        full does not lower the loss by a tenth of what its slope promises (or, against
        the slope, raises it by more than half as much again). The loss is evaluated
        once, and once more for each halving, at refreshes only and on the data that
        `value_fn` sees; by default not at all. It catches a model that is wrong, such
        as the flat curvature of a saturated softmax. Where the value of a loss is not
        what its gradient descends (stop-gradient targets), rates are not halved.
      engine: how summaries are computed, see :func:`partnewton.summarize`.
      has_aux: whether `value_fn` returns ``(loss, aux)``; the aux is dropped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, whose state is a
      :class:`ScaleByPartitionNewtonState`.

    Raises:
      ValueError, TypeError: from `init` and `update`, at trace time, if an argument
        does not fit; the message names the argument and the leaf.

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
    refresh = Refresh(rule, average, smoothing, backtracking, engine, has_aux)

    def init_fn(params: optax.Params) -> ScaleByPartitionNewtonState:
        if partitions.is_placeholder(params):  # nothing here is like the parameters
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
            following = _next_refresh(old.count, update_interval, len(old.gradient))
            return _accepted(found, old, following)

        at_rest = jnp.all(state.learning_rates == 0)
        due = (state.count >= state.next_refresh) | at_rest
        new = jax.lax.cond(
            due & direction.is_measurable, refreshed, lambda old: old, state
        )
        eta = new.learning_rates
        is_usable = direction.is_finite(eta)
        # One update counts once, whatever was not finite.
        notfinite_count = jnp.where(
            is_usable,
            new.notfinite_count,
            optax.safe_increment(state.notfinite_count),
        )
        scaled = direction.scaled(eta, where=is_usable)
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
    def zero_summary() -> Summary:  # buffers of its own for each, to be donated
        third = jnp.zeros(size, dtype) if refresh.third_order else None
        shapes = (), (size,), (size, size)
        return Summary(*(jnp.zeros(shape, dtype) for shape in shapes), third)

    return ScaleByPartitionNewtonState(
        jnp.zeros((), jnp.int32),
        *zero_summary(),
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
    found: Refreshed, old: ScaleByPartitionNewtonState, next_refresh: jax.Array
) -> ScaleByPartitionNewtonState:
    """The state after a refresh; if that is not finite, the old one and a count."""
    new = old._replace(
        loss=found.summary.value,
        gradient=found.summary.gradient,
        hessian=found.summary.hessian,
        third=found.summary.third,
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


def _next_refresh(
    count: jax.Array, update_interval: jax.typing.ArrayLike | None, size: int
) -> jax.Array:
    """The count at which the rates are refreshed next."""
    if update_interval is None:
        following = count + refresh_interval(count, size)
    else:
        following = count + update_interval - count % update_interval
    return jnp.asarray(following, count.dtype)
