"""The optax transformation: updates in, updates with their learning rates out.

Data flows one way: the updates are the direction; with the parameters and the loss
they make a summary; an average and a rule turn it into learning rates; each subset of
the updates is multiplied by its own. The method is P. Wolinski's (arXiv 2312.03885).
What differs from the paper: rates that cannot be trusted (not finite) are refused and
counted, and a subset whose direction is zero keeps its last rate.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import averaging, partitions, rules
from partnewton._backtracking import descending_fraction
from partnewton._checks import check_average, check_number, check_rule
from partnewton._eager import compiled_when_eager
from partnewton._extra_args import check_arguments, extract_fn_kwargs
from partnewton._measured_direction import MeasuredDirection
from partnewton._tree import all_finite, select
from partnewton.engines.nesting import DifferentiationError
from partnewton.summary import Summary, summarize

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
    engine: str = "auto",
    batch_size: int | None = None,
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
      batch_size: how many subsets are processed at once, see
        :func:`partnewton.summarize`.
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
    third_order = rules.needs_third_order(rule)
    if normalize not in (None, "norm", "rms"):
        raise ValueError(f"normalize must be 'norm', 'rms' or None, got {normalize!r}.")
    # A number that is traced, as optax.inject_hyperparams makes it, may be any.
    backtracks = not (isinstance(backtracking, int | np.integer) and backtracking == 0)

    def init_fn(params: optax.Params) -> ScaleByPartitionNewtonState:
        if partitions.is_placeholder(params):  # nothing here is like the parameters
            S, dtype, subsets = 1, np.dtype(np.float32), jnp.zeros(())
        else:
            partition = partitions.partition_of(params, param_labels)
            S, dtype = partition.size, partition.dtype
            subsets = {f"{s} {name}": None for s, name in enumerate(partition.names)}
        summary = _zero_summary(S, dtype, third_order)
        return ScaleByPartitionNewtonState(
            jnp.zeros((), jnp.int32),
            *summary,
            learning_rates=jnp.zeros(S, dtype),
            predicted_decrease=jnp.zeros((), dtype),
            status=jnp.zeros((), jnp.int32),
            notfinite_count=jnp.zeros((), jnp.int32),
            next_refresh=jnp.zeros((), jnp.int32),
            average=average.init(_zero_summary(S, dtype, third_order)),
            smoothing=smoothing.init((jnp.zeros(S, dtype),)),
            subsets=subsets,
        )

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

        def loss_at(eta: jax.Array) -> jax.Array:
            value = value_fn(direction.moved(-eta), **loss_args)
            return value[0] if has_aux else value

        def measured(third_order: bool) -> Summary:
            result = summarize(
                lambda x: value_fn(x, **loss_args),
                params,
                direction.normalized(),
                param_labels=direction.partition,
                third_order=third_order,
                engine=engine,
                batch_size=batch_size,
                has_aux=has_aux,
            )
            return result[0] if has_aux else result

        def refresh(old: ScaleByPartitionNewtonState) -> ScaleByPartitionNewtonState:
            summary = _with_finite_third(measured) if third_order else measured(False)
            averaged, average_state = average.update(summary, old.average)
            proposal = rule(averaged)
            proposed = (proposal.learning_rates,)
            (rates,), smoothing_state = smoothing.update(proposed, old.smoothing)
            # A subset that did not move tells nothing of its rate.
            silent = (summary.gradient == 0) & jnp.all(summary.hessian == 0, axis=1)
            eta = jnp.where(silent, old.learning_rates, rates)
            if backtracks:
                slope = jnp.sum(summary.gradient * eta)
                eta = eta * descending_fraction(
                    lambda t: loss_at(t * eta), summary.value, slope, backtracking
                )
            new = old._replace(
                loss=summary.value,
                gradient=summary.gradient,
                hessian=summary.hessian,
                third=summary.third,
                learning_rates=eta,
                predicted_decrease=proposal.predicted_decrease,
                status=proposal.status,
                next_refresh=_next_refresh(old.count, update_interval, len(eta)),
                average=average_state,
                smoothing=smoothing_state,
            )
            count = optax.safe_increment(old.notfinite_count)
            is_good = all_finite((summary, proposal, new))
            return select(is_good, new, old._replace(notfinite_count=count))

        at_rest = jnp.all(state.learning_rates == 0)
        due = (state.count >= state.next_refresh) | at_rest
        refreshed = jax.lax.cond(
            due & direction.is_measurable, refresh, lambda old: old, state
        )
        eta = refreshed.learning_rates
        is_usable = direction.is_finite(eta)
        # One update counts once, whatever was not finite.
        notfinite_count = jnp.where(
            is_usable,
            refreshed.notfinite_count,
            optax.safe_increment(state.notfinite_count),
        )
        scaled = direction.scaled(eta, where=is_usable)
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(direction.treedef, scaled), refreshed._replace(
            count=count, notfinite_count=notfinite_count
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, compiled_when_eager(update_fn, has_aux)
    )


def _with_finite_third(measured: Callable[[bool], Summary]) -> Summary:
    """A summary whose third order is zero where only the second order exists."""
    try:
        summary = measured(True)
    except DifferentiationError as error:
        summary = measured(False)  # or the same error for the second order
        warnings.warn(
            "value_fn can be differentiated twice, but not three times: learning rates "
            f"are computed without the third order. {error}",
            stacklevel=2,
        )
        return summary._replace(third=jnp.zeros_like(summary.gradient))
    third = jnp.where(jnp.isfinite(summary.third), summary.third, 0)
    return summary._replace(third=third)


def refresh_interval(count: Any, size: int, xp: Any = jnp) -> Any:
    """After how many updates rates are refreshed by default, `count` updates made."""
    return xp.clip(count // 4, 20, max(20, 5 * size))


def default_refreshes(num_updates: int, size: int) -> list[int]:
    """The counts, of so many updates, at which rates are refreshed by default."""
    counts, count = [], 0
    while count < num_updates:
        counts.append(count)
        count += int(refresh_interval(count, size, np))
    return counts


def _next_refresh(
    count: jax.Array, update_interval: jax.typing.ArrayLike | None, size: int
) -> jax.Array:
    """The count at which the rates are refreshed next."""
    if update_interval is None:
        following = count + refresh_interval(count, size)
    else:
        following = count + update_interval - count % update_interval
    return jnp.asarray(following, count.dtype)


def _zero_summary(size: int, dtype: np.dtype, third_order: bool) -> Summary:
    third = jnp.zeros(size, dtype) if third_order else None
    shapes = (), (size,), (size, size)
    return Summary(*(jnp.zeros(shape, dtype) for shape in shapes), third)
