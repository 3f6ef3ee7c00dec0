"""Directions: what stands before the link in a chain.

Any transformation of optax makes a direction. What is here knows two things that those
do not: that a bad batch must leave no trace, and what a subset is.
"""

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton.summary import checked_direction

__all__ = ["guarded", "normalize_by_subset"]


def guarded(
    direction: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that forgets whatever is not finite.

    Where the incoming updates, the outgoing ones or the new state are not finite, the
    state stays as it was and the outgoing updates are NaN, for
    :func:`~partnewton.scale_by_partition_newton` to refuse and to count. A bad batch
    leaves no trace: without this, the averages of Adam would be NaN for ever. Traced
    hyperparameters do not change the dtypes of a state.

    Args:
      direction: any transformation; the state of the result is its state.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Example:
      >>> tx = guarded(optax.trace(0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (2.0, jnp.nan, 6.0):
      ...     sums, state = tx.update(jnp.array([grad]), state)
      >>> print(sums)
      [7.]
    """
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
        # A state like a weakly typed parameter would change its type at an update.
        return jax.tree.map(
            lambda x: x.astype(x.dtype) if isinstance(x, jax.Array) else x,
            direction.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        new_updates, new_state = direction.update(updates, state, params, **extra_args)
        good = all_finite((updates, new_updates, new_state))
        nan = jax.tree.map(lambda u: jnp.full_like(u, jnp.nan), updates)
        return select(good, new_updates, nan), select(good, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def normalize_by_subset(
    param_labels: partitions.ParamLabels = partitions.per_tensor,
) -> optax.GradientTransformation:
    """Give each subset of the updates the norm 1.

    With u_s the updates on subset s, the outgoing updates are u_s / ||u_s||, and zero
    where u_s is zero or frozen. A learning rate of such a direction is the length of a
    step. Lengths, unlike rates, can be kept while the norm of a gradient changes, and
    the derivatives along unit directions can be averaged over time.

    Args:
      param_labels: the partition, see :mod:`partnewton.partitions`.

    Returns:
      A :class:`optax.GradientTransformation`, without state; its update function needs
      `params`.

    Raises:
      ValueError, TypeError: from `update`, at trace time, if an argument does not fit.

    Example:
      >>> tx = normalize_by_subset()
      >>> updates, params = jnp.array([3.0, 4.0]), jnp.zeros(2)
      >>> print(tx.update(updates, tx.init(params), params)[0])
      [0.6 0.8]
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if params is None:
            raise ValueError("params: normalize_by_subset needs the parameters.")
        leaves = checked_direction(updates, params, "updates")
        partition = partitions.partition_of(params, param_labels)
        active = [jnp.asarray(leaves[i]) for i in partition.active]
        norms = jnp.sqrt(partition.of_active().inner(active, active))
        inverse = jnp.where(norms == 0, 0, 1 / jnp.where(norms == 0, 1, norms))
        factors = partition.spread(inverse)
        unit = [
            (factor * u).astype(jnp.result_type(u))
            for u, factor in zip(leaves, factors, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), unit), state

    return optax.GradientTransformation(init_fn, update_fn)


def all_finite(tree: object) -> jax.Array:
    """Whether all numbers in a tree are finite."""
    finite = [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return jnp.all(jnp.stack([jnp.array(True), *finite]))


def select(condition: jax.Array, new: object, old: object) -> object:
    """`new` or `old`, in the dtypes of `old`: a state never changes its types."""
    return jax.tree.map(
        lambda x, y: jnp.where(condition, jnp.asarray(x).astype(y.dtype), y), new, old
    )
