"""Named axes of a `vmap` around a summary, over which a loss must not compute."""

from typing import Any

import jax

from partnewton.engines import compat

__all__ = ["refuse_named_axes"]


def refuse_named_axes(jaxpr: Any) -> None:
    """Raises an error for a collective over a named axis of a `vmap` around the loss.

    What jax calls the derivative of ``pmean(loss, axis)`` there is that of the sum over
    all lanes, each with parameters of its own, of which a lane can measure no curvature
    but its own. The axes of a `shard_map` are another matter, and so are axes of a
    `vmap` inside of the loss.

    Args:
      jaxpr: of the loss.

    Raises:
      ValueError: there is one.
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
