"""Running summaries: what is known of the loss over several refreshes.

An average is a pair of functions on arrays, like an optax transformation,

    init(summary) -> state
    update(summary, state) -> (averaged summary, state)

where `init` sees a summary of zeros, for its shapes and dtypes. It stands between the
measurement of a summary and the rule that reads it. `none`, `exponential` and
`nonnegative` average any tuple of arrays, so that they serve for learning rates too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.summary import Summary

__all__ = [
    "Average",
    "exponential",
    "none",
    "nonnegative",
    "relative",
    "uniform",
]


class Average(NamedTuple):
    """A running average of summaries.

    Attributes:
      init: from a summary of zeros to the first state.
      update: from the newest summary and the state to an average and the next state.
    """

    init: Callable[[Summary], Any]
    update: Callable[[Summary, Any], tuple[Summary, Any]]


def none() -> Average:
    """The newest summary alone.

    Returns:
      An average.

    Example:
      >>> summary = Summary(jnp.ones(()), jnp.ones(1), jnp.ones((1, 1)), None)
      >>> none().update(summary, none().init(summary))[0] is summary
      True
    """
    return Average(lambda summary: (), lambda summary, state: (summary, state))


class ExponentialState(NamedTuple):
    """The state of :func:`exponential`.

    Attributes:
      weight: for each array the sum of the weights given so far, shape ().
      total: the weighted sum.
    """

    weight: Any
    total: Any


def exponential(decay: Any = 0.9, *, absolute_third: bool = False) -> Average:
    """An exponential moving average with bias correction.

    After the summaries x_1, ..., x_n the average is
    sum_i decay^(n-i) x_i / sum_i decay^(n-i).

    Args:
      decay: how much of the past is kept at each refresh, in [0, 1); or a
        :class:`~partnewton.Summary` of such numbers, one a field: the gradient and the
        third order are far noisier than the Hessian.
      absolute_third: whether |third| is averaged. The third order changes its sign from
        batch to batch; as a measure of how far the quadratic model can be trusted, its
        size is what counts.

    Returns:
      An average.

    Raises:
      ValueError: a decay outside [0, 1).

    Example:
      >>> summary = lambda x: Summary(x, x[None], x[None, None], None)
      >>> average = exponential(0.5)
      >>> state = average.init(summary(jnp.array(0.0)))
      >>> for x in (3.0, 6.0):
      ...     mean, state = average.update(summary(jnp.array(x)), state)
      >>> print(mean.value)
      5.0
    """
    for number in jax.tree.leaves(decay):
        if isinstance(number, int | float | np.number) and not 0 <= number < 1:
            raise ValueError(f"decay must be in [0, 1), got {number}.")

    def init(summary: Summary) -> ExponentialState:
        zeros = jax.tree.map(jnp.zeros_like, tuple(summary))
        weights = jax.tree.map(lambda x: jnp.zeros((), x.dtype), zeros)
        return ExponentialState(weights, zeros)

    def update(
        summary: Summary, state: ExponentialState
    ) -> tuple[Summary, ExponentialState]:
        summary = _known(summary, state.total, state.weight)
        new = tuple(summary)
        if absolute_third and isinstance(summary, Summary) and new[3] is not None:
            new = (*new[:3], jnp.abs(new[3]))
        decays = tuple(decay) if isinstance(decay, Summary) else (decay,) * len(new)
        decays = tuple(
            None if x is None else d for d, x in zip(decays, new, strict=True)
        )
        weight = jax.tree.map(lambda d, w: d * w + 1, decays, state.weight)
        total = jax.tree.map(lambda d, t, x: d * t + x, decays, state.total, new)
        mean = jax.tree.map(lambda t, w: t / w, total, weight)
        mean = Summary(*mean) if isinstance(summary, Summary) else mean
        return mean, ExponentialState(weight, total)

    return Average(init, update)


class UniformState(NamedTuple):
    """The state of :func:`uniform`.

    Attributes:
      count: how many summaries were seen, shape (), int32.
      used: the sum over the window in use.
      filling: the sum over the window that will be in use next.
    """

    count: jax.Array
    used: tuple
    filling: tuple


def uniform(period: int = 3, warm_up: int = 3) -> Average:
    """The plain mean over one of two windows that take turns.

    Both windows take in each new summary. At every `period` summaries the one in use is
    emptied and starts to fill, and the other, which by then has seen `period` of them,
    comes into use. So after n >= period summaries the average is the mean of the last
    period + (n mod period); before that, of all n.

    Args:
      period: the summaries between two changes of windows.
      warm_up: for so many summaries, the last of them included, the gradient of the
        average is zero, so that every rule gives the rate zero and nothing is applied.
        While nothing moves the transformation refreshes at each update, so a warm-up
        lasts so many updates, whatever the interval.

    Returns:
      An average.

    Raises:
      ValueError: a period below 1 or a negative warm-up.

    Example:
      >>> summary = lambda x: Summary(x, x[None], x[None, None], None)
      >>> average = uniform(period=2, warm_up=0)
      >>> state = average.init(summary(jnp.array(0.0)))
      >>> for x in (1.0, 2.0, 3.0, 4.0, 5.0):
      ...     mean, state = average.update(summary(jnp.array(x)), state)
      ...     print(mean.value, end=" ")
      1.0 1.5 2.0 3.5 4.0
    """
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}.")
    if warm_up < 0:
        raise ValueError(f"warm_up must not be negative, got {warm_up}.")

    def init(summary: Summary) -> UniformState:
        # Two buffers, since both may be donated.
        used, filling = (jax.tree.map(jnp.zeros_like, tuple(summary)) for _ in range(2))
        return UniformState(jnp.zeros((), jnp.int32), used, filling)

    def update(summary: Summary, state: UniformState) -> tuple[Summary, UniformState]:
        before = jnp.where(
            state.count < period, state.count, period + state.count % period
        )
        new = tuple(_known(summary, state.used, (before,) * len(summary)))
        count = jnp.minimum(state.count, jnp.iinfo(jnp.int32).max - 1) + 1
        used, filling = (jax.tree.map(jnp.add, x, new) for x in state[1:])
        # The window in use was empty one period before the last change.
        length = jnp.where(count < period, count, period + count % period)
        turn = count % period == 0
        zeros = jax.tree.map(jnp.zeros_like, new)

        def choose(a: tuple, b: tuple) -> tuple:
            return jax.tree.map(lambda x, y: jnp.where(turn, x, y), a, b)

        used, filling = choose(filling, used), choose(zeros, filling)
        mean = Summary(*jax.tree.map(lambda x: x / length.astype(x.dtype), used))
        waits = count <= warm_up
        gradient = jnp.where(waits, jnp.zeros_like(mean.gradient), mean.gradient)
        return mean._replace(gradient=gradient), UniformState(count, used, filling)

    return Average(init, update)


def relative(average: Average) -> Average:
    """An average in which each summary counts relative to its own gradient.

    Late batches have a smaller loss than early ones, and would be drowned by them; one
    exploding batch would drown all others. So each summary is divided by the norm of
    its gradient before it enters the average, and the average is multiplied by that of
    the newest. Learning rates do not depend on the scale of a loss, and derivatives do
    not change when a constant is added to it, whatever its sign: a division by the loss
    itself would. (The norm of the Hessian in its place is not safe: where a softmax is
    saturated the curvature vanishes and the gradient does not, and such batches would
    promise ever longer steps.) Directions should have unit norms, see
    `normalize` of :func:`partnewton.scale_by_partition_newton`, or the norm measures
    them.

    Args:
      average: what averages the summaries so divided.

    Returns:
      An average; a summary without gradient enters it as it is.

    Example:
      >>> summary = lambda x: Summary(x, x[None], x[None, None] ** 2, None)
      >>> average = relative(exponential(0.5))
      >>> state = average.init(summary(jnp.array(0.0)))
      >>> for x in (1.0, 2.0):
      ...     mean, state = average.update(summary(jnp.array(x)), state)
      >>> print(*mean.gradient, *mean.hessian[0])
      2.0 3.3333333
    """

    def scaled(summary: Summary, factor: jax.Array) -> Summary:
        return jax.tree.map(lambda x: x * factor, summary)

    def update(summary: Summary, state: Any) -> tuple[Summary, Any]:
        largest = jnp.max(jnp.abs(summary.gradient))
        largest = jnp.where(largest > 0, largest, 1)  # no square may overflow
        norm = largest * jnp.linalg.norm(summary.gradient / largest)
        norm = jnp.where(norm > 0, norm, 1)
        mean, state = average.update(scaled(summary, 1 / norm), state)
        return scaled(mean, norm)._replace(value=summary.value), state

    return Average(average.init, update)


def nonnegative(average: Average) -> Average:
    """What another average gives, with negative numbers set to zero.

    For learning rates: those that are averaged stay as they are, negative or not.

    Args:
      average: an average of arrays.

    Returns:
      An average.

    Example:
      >>> average = nonnegative(exponential(0.5))
      >>> state = average.init((jnp.array(0.0),))
      >>> for rate in (-3.0, 3.0):
      ...     (mean,), state = average.update((jnp.array(rate),), state)
      ...     print(mean, end=" ")
      0.0 1.0
    """

    def update(new: Any, state: Any) -> tuple[Any, Any]:
        mean, state = average.update(new, state)
        return jax.tree.map(lambda x: jnp.maximum(x, 0), mean), state

    return Average(average.init, update)


def _known(summary: Summary, total: tuple, weight: tuple) -> Summary:
    """A summary whose third order is finite where that of the measured one is not.

    Where it is not, an average stays what it was, zero at first.
    """
    if not isinstance(summary, Summary) or summary.third is None:
        return summary
    third, weight = summary.third, weight[3].astype(summary.third.dtype)
    mean = total[3] / jnp.where(weight > 0, weight, 1)
    return summary._replace(third=jnp.where(jnp.isfinite(third), third, mean))
