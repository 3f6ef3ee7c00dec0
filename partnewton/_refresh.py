"""A refresh: learning rates computed from the loss along the current direction."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partnewton import averaging, engines, rules
from partnewton._backtracking import descending_fraction
from partnewton._measured_direction import MeasuredDirection
from partnewton.engines.compat import as_call
from partnewton.engines.nesting import DifferentiationError
from partnewton.partitions import Partition
from partnewton.summary import Summary, summarize

__all__ = [
    "Refresh",
    "Refreshed",
    "default_refreshes",
    "is_cut",
    "next_refresh",
    "refresh_interval",
    "size_for_intervals",
]

Loss = Callable[[Any], Any]  # from parameters to the loss, or to the loss and aux


class Refreshed(NamedTuple):
    """What a refresh computes.

    Attributes:
      summary: of the loss along the direction.
      proposal: the result of the rule for the averaged summary.
      learning_rates: the proposed rates, smoothed and backtracked, (S,).
      average: the state of the running average of summaries.
      smoothing: the state of the running average of rates.
    """

    summary: Summary
    proposal: rules.Proposal
    learning_rates: jax.Array
    average: Any
    smoothing: Any


@dataclasses.dataclass(frozen=True)
class Refresh:
    """How learning rates are refreshed.

    The attributes are the arguments of :func:`partnewton.scale_by_partition_newton`.
    """

    rule: Callable[[Summary], rules.Proposal]
    average: averaging.Average
    smoothing: averaging.Average
    backtracking: jax.typing.ArrayLike
    engine: str | engines.Engine
    has_aux: bool

    @property
    def third_order(self) -> bool:
        """Whether the rule reads the third order."""
        return rules.needs_third_order(self.rule)

    @property
    def backtracks(self) -> bool:
        """Whether it may halve rates; a traced number of halvings may be positive."""
        is_static = isinstance(self.backtracking, int | np.integer)
        return not (is_static and self.backtracking == 0)

    def __call__(
        self,
        loss: Loss,
        direction: MeasuredDirection,
        old_rates: jax.Array,
        average_state: Any,
        smoothing_state: Any,
    ) -> Refreshed:
        """Measures the loss along the direction and solves for the rates."""
        summary = self.measured(loss, direction)
        averaged, average_state = self.average.update(summary, average_state)
        proposal = rules.proposal_of(self.rule, averaged)
        (rates,), smoothing_state = self.smoothing.update(
            (proposal.learning_rates,), smoothing_state
        )
        # The summary of a subset whose direction is zero says nothing about its rate.
        silent = (summary.gradient == 0) & jnp.all(summary.hessian == 0, axis=1)
        eta = jnp.where(silent, old_rates, rates)
        if self.backtracks:
            eta = eta * self.accepted_fraction(loss, direction, summary, eta)
        return Refreshed(summary, proposal, eta, average_state, smoothing_state)

    def measured(self, loss: Loss, direction: MeasuredDirection) -> Summary:
        """The summary that the rule needs."""
        if not self.third_order:
            return self._summary(loss, direction, third_order=False)
        try:
            summary = self._summary(loss, direction, third_order=True)
        except DifferentiationError as error:
            # Or the same error for the second order.
            summary = self._summary(loss, direction, third_order=False)
            warnings.warn(
                "value_fn can be differentiated twice, but not three times: learning "
                f"rates are computed without the third order. {error}",
                stacklevel=2,
            )
            return summary._replace(third=jnp.zeros_like(summary.gradient))
        third = jnp.where(jnp.isfinite(summary.third), summary.third, 0)
        return summary._replace(third=third)

    def accepted_fraction(
        self,
        loss: Loss,
        direction: MeasuredDirection,
        summary: Summary,
        eta: jax.Array,
    ) -> jax.Array:
        """The fraction of the step that decreases the loss enough, see backtracking."""

        def value(params: Any) -> jax.Array:
            result = loss(params)
            return result[0] if self.has_aux else result

        # Not inlined, like the loss in `lookback.py`: equal computations are compiled
        # once.
        value = as_call(value)

        def loss_at(t: jax.Array) -> jax.Array:
            return value(direction.parameters_after(-t * eta))

        slope = jnp.sum(summary.gradient * eta)
        return descending_fraction(loss_at, summary.value, slope, self.backtracking)

    def _summary(
        self, loss: Loss, direction: MeasuredDirection, *, third_order: bool
    ) -> Summary:
        result = summarize(
            loss,
            direction.params,
            direction.normalized(),
            param_labels=direction.partition,
            third_order=third_order,
            engine=self.engine,
            has_aux=self.has_aux,
        )
        return result[0] if self.has_aux else result


_CUT = 0.25  # of the largest rate before
_AFTER_CUT = 3  # updates until the next refresh; others: docs/design_notes.md


def size_for_intervals(partition: Partition) -> int:
    """The number of subsets, or of tensors if it is larger.

    The longest interval is proportional to it, since the cost of a summary grows with
    both.
    """
    return max(partition.size, len(partition.active))


def refresh_interval(count: Any, size: int, xp: Any = jnp) -> Any:
    """The default interval until the next refresh, after `count` updates."""
    return xp.clip(count // 4, 20, max(20, 5 * size))


def is_cut(old_rates: jax.Array, new_rates: jax.Array) -> jax.Array:
    """Whether the largest rate is less than a quarter of the largest one before."""
    old, new = (jnp.max(jnp.abs(rates)) for rates in (old_rates, new_rates))
    return new < _CUT * old


def next_refresh(
    count: jax.Array,
    update_interval: jax.typing.ArrayLike | None,
    size: int,
    after_cut: jax.typing.ArrayLike,
) -> jax.Array:
    """The count at which the rates are refreshed next.

    By default, this is soon if all rates were cut, since one unusual batch can be the
    reason.
    """
    if update_interval is None:
        interval = jnp.where(after_cut, _AFTER_CUT, refresh_interval(count, size))
        following = count + interval
    else:
        following = count + update_interval - count % update_interval
    return jnp.asarray(following, count.dtype)


def default_refreshes(num_updates: int, size: int) -> list[int]:
    """The counts below `num_updates` of the default refreshes if no rates are cut."""
    counts, count = [], 0
    while count < num_updates:
        counts.append(count)
        count += int(refresh_interval(count, size, np))
    return counts
