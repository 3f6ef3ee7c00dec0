"""An average of the last iterates, for evaluation without a schedule.

Noise keeps the parameters at a distance from the minimum that is proportional to the
length of the steps. A schedule that decreases the length removes it, but must know the
number of steps in advance; an average over the trajectory needs no such number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton._checks import check_number
from partnewton._strictness import at_least_float32, permissive

__all__ = ["TrackAverageState", "track_average"]


class TrackAverageState(NamedTuple):
    """State of :func:`track_average`.

    Attributes:
      count: the number of updates, shape (), int32.
      average: the average of the parameters, in float32 at least; None for leaves that
        are frozen or not floating-point numbers.
    """

    count: jax.Array
    average: optax.Params


def track_average(
    fraction: jax.typing.ArrayLike = 0.1,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformation:
    """Keep an average of the parameters over about the last tenth of the training.

    The last transformation of a chain; updates pass unchanged. Let theta_t be the
    parameters after t updates and k = 1 / fraction. The average is

        a_t = a_(t-1) + k / (t + k - 1) * (theta_t - a_(t-1)),

    in which theta_s has a weight of about (s / t)^(k-1), so that the average forgets
    the initial parameters and is about fraction * t updates behind. With a fraction of
    1 it is the arithmetic mean. :func:`partnewton.averaged_params` returns it.

    Evaluate the model with the average while the loss of the parameters is dominated by
    noise. The statistics of batch normalisation belong to the parameters from which
    they were computed: compute them anew for the average.

    Args:
      fraction: the fraction of the training that is averaged, above 0 and up to 1.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is used: of
        leaves that are frozen no average is stored. By default none is frozen.

    Returns:
      A :class:`optax.GradientTransformation` whose state is a
      :class:`TrackAverageState`. It stores one copy of the parameters. Its update
      function needs `params`.

    Raises:
      ValueError: `fraction` is out of its range. From `update`, when it is traced:
        `params` is missing.

    Example:
      >>> from partnewton import averaged_params
      >>> tx = optax.chain(optax.sgd(1.0), track_average(0.5))
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for grad in (-3.0, 3.0, -3.0):
      ...     updates, state = tx.update(jnp.array(grad), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, averaged_params(state, params))
      3.0 3.0
      0.0 1.0
      3.0 2.0

    References:
      O. Shamir and T. Zhang, arXiv 1212.1824, polynomial-decay averaging with
      eta = k - 1.
    """
    check_number("fraction", fraction, strict=True, below=1 + 1e-6)

    def tracked(params: optax.Params) -> optax.Params:
        """The parameters with None in place of the leaves without an average."""
        leaves, treedef = jax.tree.flatten(params)
        is_tracked = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
        if param_labels is not None:
            active = partitions.partition_of(params, param_labels).active
            is_tracked = [x and i in active for i, x in enumerate(is_tracked)]
        return treedef.unflatten(
            x if keep else None for x, keep in zip(leaves, is_tracked, strict=True)
        )

    def init_fn(params: optax.Params) -> TrackAverageState:
        average = params
        if not partitions.is_placeholder(params):
            # In half precision, small changes of the average would be rounded to zero.
            # A copy, since state and parameters may both be donated.
            average = jax.tree.map(
                lambda x: jnp.array(x, at_least_float32(jnp.result_type(x)), copy=True),
                tracked(params),
            )
        return TrackAverageState(jnp.zeros((), jnp.int32), average)

    def update_fn(
        updates: optax.Updates,
        state: TrackAverageState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, TrackAverageState]:
        if params is None:
            raise ValueError("params: track_average needs the parameters.")
        with permissive():
            weight = 1 / (1 + fraction * state.count)  # k / (t + k - 1)

        def moved(average: jax.Array | None, x: jax.Array, u: jax.Array) -> jax.Array:
            if average is None:
                return None
            with permissive():
                after = optax.apply_updates(x, u).astype(average.dtype)
            return average + weight.astype(average.dtype) * (after - average)

        average = jax.tree.map(
            moved, state.average, params, updates, is_leaf=lambda x: x is None
        )
        return updates, TrackAverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(init_fn, update_fn)
