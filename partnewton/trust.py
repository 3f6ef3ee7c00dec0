"""How far a step may go: a fraction of the size of the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import partitions
from partnewton._checks import check_number

__all__ = ["ClipByParameterRmsState", "clip_by_parameter_rms"]


class ClipByParameterRmsState(NamedTuple):
    """The state of :func:`clip_by_parameter_rms`.

    Attributes:
      reference_rms: the largest root mean square so far that each subset is compared
        with, shape (S,).
    """

    reference_rms: jax.Array


def clip_by_parameter_rms(
    max_ratio: jax.typing.ArrayLike = 0.01,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformation:
    """Clip the step of each subset to a fraction of the size of its parameters.

    A model of second or third order is true nearby. How near is not for it to say: it
    does not see what is piecewise, a relu or a hinge, nor what the next batches will
    want. With rms(x) the root mean square of the entries of a subset, and size_s the
    largest so far of rms(theta_s) and of the root mean square of all that move,

        u_s <- u_s * min(1, max_ratio * size_s / rms(u_s)).

    Behind :func:`partnewton.partition_newton` it keeps weights from growing where steps
    that lower the loss of a batch make them large, as networks of relus do on labels
    with noise; elsewhere it costs speed at the start, see ``docs/how_to_choose.md``.

    So a tensor that starts from zero, a bias, is compared with the others, and a number
    on its way through zero with what it was. Where all parameters are zero there is
    nothing to compare with: then the longest of the first steps defines the
    size.

    Args:
      max_ratio: upper bound on the RMS of a step, relative to that of the parameters;
        positive.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default each
        leaf is a subset.

    Returns:
      A :class:`optax.GradientTransformation` whose state is a
      :class:`ClipByParameterRmsState`; its update function needs `params`.

    Raises:
      ValueError: `max_ratio` is not positive; from `update`, at trace time: an argument
        does not fit.

    Example:
      >>> tx = clip_by_parameter_rms(0.1)
      >>> params = {"kernel": jnp.array([3.0, -3.0]), "bias": jnp.zeros(1)}
      >>> updates = {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([0.1])}
      >>> clipped, state = tx.update(updates, tx.init(params), params)
      >>> print(clipped["kernel"])
      [0.3 0.3]

    References:
      The size of a tensor as the measure of its steps: You, Gitman and Ginsburg, arXiv
      1708.03888, as in :func:`optax.scale_by_trust_ratio`; as a bound: Brock, De, Smith
      and Simonyan, arXiv 2102.06171, as in :func:`optax.adaptive_grad_clip`.
    """
    param_labels = partitions.per_tensor if param_labels is None else param_labels
    check_number("max_ratio", max_ratio, strict=True)

    def init_fn(params: optax.Params) -> ClipByParameterRmsState:
        if partitions.is_placeholder(params):
            return ClipByParameterRmsState(jnp.zeros(1, jnp.float32))
        partition = partitions.partition_of(params, param_labels)
        return ClipByParameterRmsState(jnp.zeros(partition.size, partition.dtype))

    def update_fn(
        updates: optax.Updates,
        state: ClipByParameterRmsState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ClipByParameterRmsState]:
        if params is None:
            raise ValueError("params: clip_by_parameter_rms needs the parameters.")
        partition = partitions.partition_of(params, param_labels)
        leaves = partitions.checked_direction(updates, params, "updates", partition)
        counts = np.asarray(partition.counts(leaves), partition.dtype)

        def squares(leaves: list) -> jax.Array:
            active = [jnp.asarray(leaves[i]) for i in partition.active]
            return partition.of_active().inner(active, active)

        own = squares(jax.tree.leaves(params))
        lengths = jnp.sqrt(squares(leaves) / counts)
        is_active = lengths > 0
        number = jnp.sum(jnp.where(is_active, counts, 0))
        pooled = jnp.sum(jnp.where(is_active, own, 0)) / jnp.maximum(number, 1)
        now = jnp.sqrt(jnp.maximum(own / counts, pooled))
        size = jnp.maximum(state.reference_rms, jnp.where(jnp.isfinite(now), now, 0))
        size = jnp.where(
            jnp.any(size > 0), size, jnp.max(lengths, initial=0) / max_ratio
        )
        size = size.astype(state.reference_rms.dtype)

        longest = max_ratio * size
        is_longer = lengths > longest
        factors = jnp.where(is_longer, longest / jnp.where(is_longer, lengths, 1), 1)
        clipped = partition.scaled(leaves, factors)
        treedef = jax.tree.structure(updates)
        return jax.tree.unflatten(treedef, clipped), ClipByParameterRmsState(size)

    return optax.GradientTransformation(init_fn, update_fn)
