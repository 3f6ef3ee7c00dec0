"""Running summaries: what is known of the loss over several refreshes.

An average is a pair of functions on arrays, like an optax transformation,

    init(summary) -> state
    update(summary, state) -> (averaged summary, state)

where `init` sees a summary of zeros, for its shapes and dtypes. It stands between the
measurement of a summary and the rule that reads it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.summary import Summary

__all__ = ["Average", "exponential", "none"]


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
      weight: the sum of the weights given so far, shape ().
      total: the weighted sum of summaries.
    """

    weight: jax.Array
    total: tuple


def exponential(decay: jax.typing.ArrayLike = 0.9) -> Average:
    """An exponential moving average with bias correction.

    After the summaries x_1, ..., x_n the average is
    sum_i decay^(n-i) x_i / sum_i decay^(n-i).

    Args:
      decay: how much of the past is kept at each refresh, in [0, 1).

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
    if isinstance(decay, int | float | np.number) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")

    def init(summary: Summary) -> ExponentialState:
        zeros = jax.tree.map(jnp.zeros_like, tuple(summary))
        return ExponentialState(jnp.zeros((), summary.value.dtype), zeros)

    def update(
        summary: Summary, state: ExponentialState
    ) -> tuple[Summary, ExponentialState]:
        weight = decay * state.weight + 1
        total = jax.tree.map(lambda t, x: decay * t + x, state.total, tuple(summary))
        mean = Summary(*jax.tree.map(lambda t: t / weight, total))
        return mean, ExponentialState(weight, total)

    return Average(init, update)
