"""Clipping of updates relative to the size of the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import partitions
from partnewton._checks import check_number

__all__ = ["ClipByParameterRmsState", "clip_by_parameter_rms"]


class ClipByParameterRmsState(NamedTuple):
    """State of :func:`clip_by_parameter_rms`.

    Attributes:
      reference_rms: the reference r_s of each subset, shape (S,).
    """

    reference_rms: jax.Array


def clip_by_parameter_rms(
    max_ratio: jax.typing.ArrayLike = 0.01,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformation:
    """Clip the RMS of each subset's update relative to that of its parameters.

    With rms(x) the root mean square of the entries of a subset,

        u_s <- u_s * min(1, max_ratio * r_s / rms(u_s)),

    where r_s is the maximum over all updates so far of two values: rms(theta_s), and
    the RMS of all subsets with a nonzero update, taken together. Without the second
    value, biases that are initialised to zero could not move; without the maximum over
    time, neither could scalars that are close to zero when they change their sign. If
    all parameters are zero, r_s = max_s rms(u_s) / max_ratio.

    A model of second or third order is accurate only near the current parameters. The
    size of this neighbourhood depends on properties that the model does not contain,
    such as the kinks of a relu or of a hinge loss, and the loss on the next batches.
    After :func:`partnewton.partition_newton`, clipping stops weights from growing
    without bound when steps that decrease the loss of one batch increase the weights,
    as in relu networks trained on noisy labels. Elsewhere it slows down the first
    steps; see ``docs/how_to_choose.md``.

    Args:
      max_ratio: upper bound on the RMS of an update, relative to the reference;
        positive.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default one
        subset per leaf.

    Returns:
      A :class:`optax.GradientTransformation` whose state is a
      :class:`ClipByParameterRmsState`; its update function needs `params`.

    Raises:
      ValueError: `max_ratio` is not positive. From `update`, when it is traced:
        `params` is missing, or the updates do not have its structure and shapes.

    Example:
      >>> tx = clip_by_parameter_rms(0.1)
      >>> params = {"kernel": jnp.array([3.0, -3.0]), "bias": jnp.zeros(1)}
      >>> updates = {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([0.1])}
      >>> clipped, state = tx.update(updates, tx.init(params), params)
      >>> print(clipped["kernel"])
      [0.3 0.3]

    References:
      Updates proportional to the size of the parameters: You, Gitman and Ginsburg,
      arXiv 1708.03888, :func:`optax.scale_by_trust_ratio`. Updates bounded by it:
      Brock, De, Smith and Simonyan, arXiv 2102.06171, :func:`optax.adaptive_grad_clip`.
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
            raise ValueError(
                "params: clip_by_parameter_rms needs the parameters; call "
                "tx.update(updates, state, params, ...)."
            )
        partition = partitions.partition_of(params, param_labels)
        leaves = partitions.checked_direction(updates, params, "updates", partition)
        counts = np.asarray(partition.counts(leaves), partition.dtype)

        def sums_of_squares(leaves: list) -> jax.Array:
            active = [jnp.asarray(x) for x in partition.take_active(leaves)]
            return partition.of_active().inner(active, active)

        param_squares = sums_of_squares(jax.tree.leaves(params))
        update_rms = jnp.sqrt(sums_of_squares(leaves) / counts)
        is_active = update_rms > 0
        total_count = jnp.sum(jnp.where(is_active, counts, 0))
        total_squares = jnp.sum(jnp.where(is_active, param_squares, 0))
        mean_square = total_squares / jnp.maximum(total_count, 1)
        param_rms = jnp.sqrt(jnp.maximum(param_squares / counts, mean_square))
        param_rms = jnp.where(jnp.isfinite(param_rms), param_rms, 0)
        reference = jnp.maximum(state.reference_rms, param_rms)
        initial = jnp.max(update_rms, initial=0) / max_ratio
        reference = jnp.where(jnp.any(reference > 0), reference, initial)
        reference = reference.astype(state.reference_rms.dtype)

        bound = max_ratio * reference
        is_longer = update_rms > bound
        factors = jnp.where(is_longer, bound / jnp.where(is_longer, update_rms, 1), 1)
        clipped = partition.scaled(leaves, factors)
        treedef = jax.tree.structure(updates)
        return (
            jax.tree.unflatten(treedef, clipped),
            ClipByParameterRmsState(reference),
        )

    return optax.GradientTransformation(init_fn, update_fn)
