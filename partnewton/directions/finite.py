"""Directions whose state does not change by updates that are not finite."""

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton._checks import check_transformation
from partnewton._strictness import at_least_float32, permissive
from partnewton._tree import select
from partnewton.engines.compat import as_call

__all__ = ["KeepsFinite", "skip_nonfinite"]


class KeepsFinite(optax.GradientTransformation):
    """A transformation whose state does not change by updates that are not finite.

    :func:`skip_nonfinite` then does not select between two states, which for a state
    with a large matrix takes time.
    """


def skip_nonfinite(
    direction: optax.GradientTransformation,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation so that nonfinite updates do not change its state.

    If the sum of squares of the incoming updates is not finite, the state is kept and
    the outgoing updates are NaN, which :func:`~partnewton.scale_by_partition_newton`
    replaces by zeros and counts. Without this, one NaN would make the averages of Adam
    NaN for the rest of the training. The dtypes of the state do not change, even if
    hyperparameters are traced.

    With `param_labels`, the transformation receives no frozen parameters either: frozen
    leaves are replaced by None, so that it stores no state for them, and frozen entries
    inside a leaf by zeros. The outgoing updates of frozen leaves are zero.

    Args:
      direction: any transformation; the state of the result is its state.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is used; by
        default no leaf is frozen, and `params` is not needed.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Example:
      >>> tx = skip_nonfinite(optax.trace(0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (2.0, jnp.nan, 6.0):
      ...     sums, state = tx.update(jnp.array([grad]), state)
      >>> print(sums)
      [7.]
    """
    check_transformation("direction", direction)
    keeps_finite = isinstance(direction, KeepsFinite)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
        if param_labels is not None and not partitions.is_placeholder(params):
            partition = partitions.partition_of(params, param_labels)
            params = partition.take(params)
        # A weakly typed state, as of weakly typed parameters, would change its type at
        # the first update.
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
        partition = None
        if param_labels is not None:
            if params is None:
                raise ValueError(
                    "params: skip_nonfinite needs the parameters; call "
                    "tx.update(updates, state, params, ...)."
                )
            partition = partitions.partition_of(params, param_labels)
            everything = params
            partitions.checked_direction(updates, params, "updates", partition)
            updates, params = partition.take(updates), partition.take(params)
        is_finite = _has_finite_squares(updates)
        with permissive():
            outgoing, new = direction.update(updates, state, params, **extra_args)
        factor = jnp.where(is_finite, 1, jnp.nan)
        outgoing = jax.tree.map(
            lambda u, like: (factor * u).astype(like.dtype), outgoing, updates
        )
        if partition is not None:
            outgoing = partition.put(everything, outgoing)
        return outgoing, new if keeps_finite else select(is_finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _has_finite_squares(tree: optax.Updates) -> jax.Array:
    """Whether the sum of all squares in a tree is finite, in float32 at least."""
    # Not inlined: XLA would fuse the sums into each kernel that reads the result.
    check = as_call(_sum_of_squares_is_finite)
    return check([jnp.asarray(x) for x in jax.tree.leaves(tree)])


def _sum_of_squares_is_finite(leaves: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for x in leaves:
        total = total + jnp.sum(x.astype(at_least_float32(x.dtype)) ** 2)
    return jnp.isfinite(total)
