"""Named axes of a `vmap` around a summary, over which a loss must not compute."""

from typing import Any

import jax

from partnewton.engines import compat

__all__ = ["refuse_named_axes"]


def refuse_named_axes(jaxpr: Any) -> None:
    """Raises an error for a collective over a named axis of a `vmap` around the loss.

    There, the derivative of ``pmean(loss, axis)`` in jax is that of the sum over all
    lanes (indices of the mapped axis). Since each lane has separate parameters, it
    cannot compute the curvature of the mean. Axes of a `shard_map`, and of a `vmap`
    inside of the loss, are allowed.

    Args:
      jaxpr: of the loss.

    Raises:
      ValueError: the jaxpr contains such a collective.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = [axis for axis in compat.named_axes(jaxpr) if axis not in manual]
    if axes:
        name = repr(axes[0])
        raise ValueError(
            f"value_fn: it computes over {name}, the axis_name of a vmap around it, "
            "and derivatives of a mean over such an axis are silently wrong. Put the "
            "vmap into value_fn and return the mean over its lanes; or, for several "
            "devices, use jit with sharded arguments, or shard_map with check_vma=True "
            f"and jax.lax.pmean(loss, {name})."
        )
