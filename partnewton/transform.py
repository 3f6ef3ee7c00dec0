"""The optax transformation: updates in, updates with their learning rates out.

Data flows one way: the updates are the direction; with the parameters and the loss
they make a summary; an average and a rule turn it into learning rates; each subset of
the updates is multiplied by its own. The method is P. Wolinski's (arXiv 2312.03885).
What differs from the paper: rates that cannot be trusted (not finite) are refused and
counted, and a subset whose direction is zero keeps its last rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import averaging, partitions, rules
from partnewton._extra_args import check_arguments, picked
from partnewton.directions import all_finite, select
from partnewton.summary import Summary, checked_direction, summarize

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
      third: D^3 L[u_s, u_s, u_s] at the last refresh, shape (S,), or None with a rule
        that does not read it.
      learning_rates: eta, shape (S,), before any factor that stands later in a chain.
      predicted_decrease: by how much the rule expected the loss to fall with these
        rates in full, shape ().
      status: a :class:`~partnewton.CubicStatus`, shape (), int32.
      refused: at how many updates something was not finite and was refused: a refresh,
        which leaves the last good rates in force, or the updates themselves, which are
        then zero; shape (), int32.
      overdue: whether the last refresh was refused, and is due again at the next
        update; shape (), bool.
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
    refused: jax.Array
    overdue: jax.Array
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
      update_interval: refresh the rates at every so many updates, and keep them in
        between; None for as many as there are subsets, from 20 to 100, so that a
        summary costs about as much as the gradients in between. While all rates are
        zero they are refreshed at each update, since nothing moves until then.
      average: a running average of the summaries, see :mod:`partnewton.averaging`; by
        default the newest summary alone.
      smoothing: a running average of the rates that the rule proposes, as a tuple of
        one array; by default the newest rates alone.
      backtracking: how often new rates are halved, at most, while a step with them in
        full does not lower the loss by a tenth of what its slope promises (or, against
        the slope, raises it by more than half as much again). The loss is evaluated
        once, and once more for each halving, at refreshes only and on the data that
        `value_fn` sees; by default not at all. It catches a model that is wrong, such
        as the flat curvature of a saturated softmax.
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
    if isinstance(update_interval, int | np.integer) and update_interval < 1:
        raise ValueError(f"update_interval must be at least 1, got {update_interval}.")
    if isinstance(backtracking, int | np.integer) and backtracking < 0:
        raise ValueError(f"backtracking must not be negative, got {backtracking}.")
    # A number that is traced, as optax.inject_hyperparams makes it, may be any.
    checks = not (isinstance(backtracking, int | np.integer) and backtracking == 0)

    def init_fn(params: optax.Params) -> ScaleByPartitionNewtonState:
        if partitions.is_placeholder(params):  # nothing here is like the parameters
            return initial_state(1, np.dtype(np.float32), subsets=jnp.zeros(()))
        partition = partitions.partition_of(params, param_labels)
        names = {f"{s} {name}": None for s, name in enumerate(partition.names)}
        return initial_state(partition.size, partition.dtype, names)

    def initial_state(
        S: int, dtype: np.dtype, subsets: Any
    ) -> ScaleByPartitionNewtonState:
        third = jnp.zeros(S, dtype) if rules.needs_third_order(rule) else None
        zeros = Summary(
            jnp.zeros((), dtype), jnp.zeros(S, dtype), jnp.zeros((S, S), dtype), third
        )
        return ScaleByPartitionNewtonState(
            jnp.zeros((), jnp.int32),
            *zeros,
            learning_rates=jnp.zeros(S, dtype),
            predicted_decrease=jnp.zeros((), dtype),
            status=jnp.zeros((), jnp.int32),
            refused=jnp.zeros((), jnp.int32),
            overdue=jnp.zeros((), bool),
            average=average.init(zeros),
            smoothing=smoothing.init((zeros.gradient,)),
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
        checked_direction(updates, params, "updates")
        partition = partitions.partition_of(params, param_labels)
        loss_args = picked(value_fn, extra_args)

        def loss_at(eta: jax.Array) -> jax.Array:
            step = _scaled(updates, params, partition, -eta)
            value = value_fn(optax.apply_updates(params, step), **loss_args)
            return value[0] if has_aux else value

        def trusted_part(
            eta: jax.Array, value: jax.Array, slope: jax.Array
        ) -> jax.Array:
            allowed = jnp.where(slope > 0, -0.1 * slope, -1.5 * slope)

            def fails(part: jax.Array) -> jax.Array:
                rise = loss_at(part * eta) - value
                return ~(rise <= part * allowed) & (part > 0.5**backtracking)

            one = jnp.ones((), eta.dtype)
            return jax.lax.while_loop(fails, lambda part: part / 2, one)

        def refresh(old: ScaleByPartitionNewtonState) -> ScaleByPartitionNewtonState:
            measured = summarize(
                lambda x: value_fn(x, **loss_args),
                params,
                updates,
                param_labels=param_labels,
                third_order=rules.needs_third_order(rule),
                engine=engine,
                batch_size=batch_size,
                has_aux=has_aux,
            )
            if has_aux:
                measured, _ = measured
            averaged, average_state = average.update(measured, old.average)
            proposal = rule(averaged)
            proposed = (proposal.learning_rates,)
            (rates,), smoothing_state = smoothing.update(proposed, old.smoothing)
            # A subset that did not move tells nothing of its rate.
            silent = (measured.gradient == 0) & jnp.all(measured.hessian == 0, axis=1)
            eta = jnp.where(silent, old.learning_rates, rates)
            if checks:
                slope = jnp.sum(measured.gradient * eta)
                eta = eta * trusted_part(eta, measured.value, slope)
            new = old._replace(
                loss=measured.value,
                gradient=measured.gradient,
                hessian=measured.hessian,
                third=measured.third,
                learning_rates=eta,
                predicted_decrease=proposal.predicted_decrease,
                status=proposal.status,
                overdue=jnp.zeros((), bool),
                average=average_state,
                smoothing=smoothing_state,
            )
            good = all_finite((measured, proposal, new))
            refused = old._replace(
                refused=optax.safe_increment(old.refused), overdue=jnp.ones((), bool)
            )
            return select(good, new, refused)

        at_rest = jnp.all(state.learning_rates == 0)
        automatic = update_interval is None
        interval = interval_of(partition.size) if automatic else update_interval
        due = (state.count % interval == 0) | at_rest | state.overdue
        refreshed = jax.lax.cond(due, refresh, lambda old: old, state)
        scaled = _scaled(updates, params, partition, refreshed.learning_rates)
        usable = all_finite(scaled)
        scaled = jax.tree.map(lambda u: jnp.where(usable, u, jnp.zeros_like(u)), scaled)
        # At most one refusal an update, whatever was not finite.
        refused = jnp.where(
            usable, refreshed.refused, optax.safe_increment(state.refused)
        )
        count = optax.safe_increment(state.count)
        return scaled, refreshed._replace(count=count, refused=refused)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def interval_of(size: int) -> int:
    """After how many updates a partition is measured again, if nobody has said."""
    return min(max(20, size), 100)


def _scaled(
    updates: optax.Updates,
    params: optax.Params,
    partition: partitions.Partition,
    eta: jax.Array,
) -> optax.Updates:
    """eta_s * u_s, in the dtypes of the parameters; zero where frozen."""

    def scale(
        u: jax.Array, leaf: jax.Array, rate: jax.Array, label: int | np.ndarray
    ) -> jax.Array:
        frozen = label == partitions.FROZEN
        if np.all(frozen):
            return jnp.zeros_like(leaf)
        frozen = partitions.sharded_like(leaf, frozen)
        rate = partitions.sharded_like(leaf, rate)
        return jnp.where(frozen, 0, rate * u).astype(jnp.result_type(leaf))

    updates_leaves, treedef = jax.tree.flatten(updates)
    rates = partition.spread(eta)
    columns = (updates_leaves, jax.tree.leaves(params), rates, partition.labels)
    scaled = [scale(*row) for row in zip(*columns, strict=True)]
    return jax.tree.unflatten(treedef, scaled)
