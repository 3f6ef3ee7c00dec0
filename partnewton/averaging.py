"""Running averages of summaries over several refreshes.

An average is an :class:`optax.GradientTransformation` whose updates are summaries: its
`update` maps the newest :class:`~partnewton.Summary` to an averaged one, which the rule
then reads. Its `init` receives a summary of zeros. `none`, `exponential` and
`nonnegative` accept any tuple of arrays and can average learning rates as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton.summary import Summary

__all__ = [
    "exponential",
    "none",
    "nonnegative",
    "relative",
    "uniform",
]

Average = optax.GradientTransformation


def none() -> Average:
    """No average: the newest summary, unchanged.

    Returns:
      An average.

    Example:
      >>> summary = Summary(jnp.ones(()), jnp.ones(1), jnp.ones((1, 1)), None)
      >>> none().update(summary, none().init(summary))[0] is summary
      True
    """
    return optax.identity()


class ExponentialState(NamedTuple):
    """State of :func:`exponential`.

    Attributes:
      weight: for each array, the sum of the weights so far, shape ().
      total: for each array, the weighted sum.
    """

    weight: Any
    total: Any


def exponential(decay: Any = 0.9, *, absolute_third: bool = False) -> Average:
    """An exponential moving average with bias correction.

    After the summaries x_1, ..., x_n, the average is

        sum_i decay^(n-i) x_i / sum_i decay^(n-i).

    Unlike :func:`optax.ema`, which divides by 1 - decay^n, it does not lose digits for
    a decay close to 1, and each field can have a decay of its own.

    Args:
      decay: the decay per refresh, in [0, 1); or a :class:`~partnewton.Summary` with
        one decay per field, since the gradient and the third order are much noisier
        than the Hessian.
      absolute_third: whether to average |third| in place of `third`. The third order
        changes its sign from batch to batch, but rules only use its absolute value, as
        a measure of the error of the quadratic model.

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

    def init_fn(summary: Summary) -> ExponentialState:
        # A plain tuple: optax searches states for a field called `value`.
        zeros = jax.tree.map(jnp.zeros_like, tuple(summary))
        weights = jax.tree.map(lambda x: jnp.zeros((), x.dtype), zeros)
        return ExponentialState(weights, zeros)

    def update_fn(
        summary: Summary, state: ExponentialState, params: Any = None
    ) -> tuple[Summary, ExponentialState]:
        del params
        summary = _replace_nonfinite_third(summary, state.total, state.weight)
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

    return Average(init_fn, update_fn)


class UniformState(NamedTuple):
    """State of :func:`uniform`.

    Attributes:
      count: the number of summaries so far, shape (), int32.
      current: the sum over the current window.
      following: the sum over the window that becomes the current one next.
    """

    count: jax.Array
    current: tuple
    following: tuple


def uniform(period: int = 3, warm_up: int = 3) -> Average:
    """The arithmetic mean over a window of `period` to 2 * `period` - 1 summaries.

    There are two windows, and each new summary is added to both. After every `period`
    summaries, the current window is emptied and the other one, which then holds
    `period` summaries, becomes the current one. So after n >= period summaries the
    average is the mean of the last period + (n mod period) of them; before that, the
    mean of all n.

    Args:
      period: the number of summaries after which the windows are exchanged.
      warm_up: the number of initial summaries, the last of them included, for which the
        averaged gradient is set to zero, so that every rule returns zero rates. While
        all rates are zero, they are refreshed at each update, whatever the interval: a
        warm-up takes `warm_up` updates.

    Returns:
      An average.

    Raises:
      ValueError: `period` is less than 1 or `warm_up` is negative.

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

    def length(count: jax.Array) -> jax.Array:
        """The number of summaries in the current window, before an exchange."""
        return jnp.where(count < period, count, period + count % period)

    def init_fn(summary: Summary) -> UniformState:
        # Two separate buffers, so that both can be donated.
        sums = (jax.tree.map(jnp.zeros_like, tuple(summary)) for _ in range(2))
        return UniformState(jnp.zeros((), jnp.int32), *sums)

    def update_fn(
        summary: Summary, state: UniformState, params: Any = None
    ) -> tuple[Summary, UniformState]:
        del params
        weights = (length(state.count),) * len(summary)
        new = tuple(_replace_nonfinite_third(summary, state.current, weights))
        count = optax.safe_increment(state.count)
        current, following = (jax.tree.map(jnp.add, x, new) for x in state[1:])
        is_exchange = count % period == 0

        def choose(a: tuple, b: tuple) -> tuple:
            return jax.tree.map(lambda x, y: jnp.where(is_exchange, x, y), a, b)

        zeros = jax.tree.map(jnp.zeros_like, new)
        current, following = choose(following, current), choose(zeros, following)
        mean = jax.tree.map(lambda x: x / length(count).astype(x.dtype), current)
        mean = Summary(*mean)
        is_warm = count > warm_up
        gradient = jnp.where(is_warm, mean.gradient, jnp.zeros_like(mean.gradient))
        state = UniformState(count, current, following)
        return mean._replace(gradient=gradient), state

    return Average(init_fn, update_fn)


def relative(average: Average) -> Average:
    """Average summaries after each is divided by the norm of its gradient.

    In a plain average, early summaries dominate because the loss decreases during
    training, and so does a single batch with a very large loss. Here each summary is
    divided by the norm of its gradient before it is averaged, and the average is
    multiplied by the norm of the newest gradient. This final factor has no effect on
    learning rates, which do not depend on the scale of the loss.

    The loss is not used as the divisor, because a constant can be added to it and it
    can be negative. Nor is the norm of the Hessian, which vanishes at a saturated
    softmax while the gradient does not: steps would become arbitrarily long there.
    Normalise the direction (see `normalize` of
    :func:`partnewton.scale_by_partition_newton`), because otherwise the norm depends on
    the length of the direction as well.

    Args:
      average: the average of the divided summaries.

    Returns:
      An average; a summary with zero gradient is not divided.

    Example:
      >>> summary = lambda x: Summary(x, x[None], x[None, None] ** 2, None)
      >>> average = relative(exponential(0.5))
      >>> state = average.init(summary(jnp.array(0.0)))
      >>> for x in (1.0, 2.0):
      ...     mean, state = average.update(summary(jnp.array(x)), state)
      >>> print(*mean.gradient, *mean.hessian[0])
      2.0 3.3333333
    """

    def update_fn(
        summary: Summary, state: Any, params: Any = None
    ) -> tuple[Summary, Any]:
        del params
        largest = jnp.max(jnp.abs(summary.gradient))
        largest = jnp.where(largest > 0, largest, 1)  # avoids overflow in the squares
        norm = largest * jnp.linalg.norm(summary.gradient / largest)
        norm = jnp.where(norm > 0, norm, 1)
        mean, state = average.update(optax.tree.scale(1 / norm, summary), state)
        return optax.tree.scale(norm, mean)._replace(value=summary.value), state

    return Average(average.init, update_fn)


def nonnegative(average: Average) -> Average:
    """An average whose negative results are set to zero.

    Intended for learning rates. Negative rates enter the average unchanged; only the
    result is clipped.

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
    clip = optax.stateless(lambda mean, _: jax.tree.map(jax.nn.relu, mean))
    return optax.chain(average, clip)


def _replace_nonfinite_third(summary: Summary, total: tuple, weight: tuple) -> Summary:
    """Replace non-finite entries of `third` by their average so far, initially zero."""
    if not isinstance(summary, Summary) or summary.third is None:
        return summary
    third, weight = summary.third, weight[3].astype(summary.third.dtype)
    mean = total[3] / jnp.where(weight > 0, weight, 1)
    return summary._replace(third=jnp.where(jnp.isfinite(third), third, mean))
