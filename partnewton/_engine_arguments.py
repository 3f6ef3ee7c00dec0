"""The arguments of `summarize` and `derivative_tensors`, checked, for the engines."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton import partitions
from partnewton._checks import check_value_fn
from partnewton._error_hints import with_error_hints

__all__ = ["EngineArguments", "checked_loss"]

PyTree = Any


class EngineArguments:
    """Checked arguments of :func:`partnewton.summarize`, in the form engines expect.

    Attributes:
      loss: a function from the list of active leaves to ``(value, aux)``.
      leaves: the active leaves, which have at least one entry that is not frozen.
      directions: at these leaves, with their dtypes and a leading axis K.
      partition: the partition of these leaves.
    """

    def __init__(
        self,
        value_fn: Callable[..., Any],
        params: PyTree,
        direction: PyTree,
        num_directions: int | None,
        param_labels: partitions.ParamLabels,
        has_aux: bool,
    ):
        check_value_fn(value_fn)
        partition = param_labels
        if not isinstance(partition, partitions.Partition):
            partition = partitions.partition_of(params, param_labels)
        everything, treedef = jax.tree.flatten(params)
        leaves = partition.take_active(everything)
        directions, self._has_axis = _stacked(
            direction, num_directions, params, partition
        )
        _check_equal_on_all_devices("params", leaves)
        _check_equal_on_all_devices("direction", directions)

        def loss(leaves: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
            filled = partition.put_active(everything, leaves)
            value_of = with_error_hints(value_fn, params)
            result = value_of(jax.tree.unflatten(treedef, filled))
            return checked_loss(result, has_aux)

        self.loss = loss
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        pairs = zip(directions, self.leaves, strict=True)
        self.directions = [u.astype(leaf.dtype) for u, leaf in pairs]
        self.partition = partition.of_active()

    def shaped(self, derivatives: jax.Array | None) -> jax.Array | None:
        """Derivatives without the axes of length K, if there is one direction."""
        if derivatives is None or self._has_axis:
            return derivatives
        return derivatives.reshape(derivatives.shape[1::2])


def _stacked(
    direction: PyTree,
    num_directions: int | None,
    params: PyTree,
    partition: partitions.Partition,
) -> tuple[list[jax.Array], bool]:
    """The active leaves of all directions, (K, *shape), and whether K is an axis."""
    if num_directions is not None and not (
        isinstance(num_directions, int) and num_directions >= 1
    ):
        raise ValueError(
            f"num_directions must be an integer of at least 1, got {num_directions!r}."
        )
    check = functools.partial(_active_leaves, params=params, partition=partition)
    if not _is_sequence(direction, params):
        leaves = check(direction, "direction", num_directions=num_directions)
        if num_directions is None:
            return [u[None] for u in leaves], False
        return leaves, True
    if num_directions not in (None, len(direction)):
        raise ValueError(
            f"direction is a sequence of {len(direction)} pytrees, but num_directions "
            f"is {num_directions}."
        )
    columns = [check(u, f"direction[{k}]") for k, u in enumerate(direction)]
    return [jnp.stack(column) for column in zip(*columns, strict=True)], True


def _is_sequence(direction: PyTree, params: PyTree) -> bool:
    """Whether this is a sequence of directions, and not a direction."""
    if not isinstance(direction, list | tuple):
        return False
    paths = partitions.leaf_names(params)
    if partitions.leaf_names(direction) == paths:
        return False
    return any(partitions.leaf_names(u) == paths for u in direction)


def _active_leaves(
    direction: PyTree,
    name: str,
    params: PyTree,
    partition: partitions.Partition,
    num_directions: int | None = None,
) -> list[jax.Array]:
    """The leaves of a checked direction that are not frozen."""
    leaves = partitions.checked_direction(
        direction, params, name, partition, num_directions
    )
    active = [jnp.asarray(u) for u in partition.take_active(leaves)]
    for i, u in zip(partition.active, active, strict=True):
        if jnp.iscomplexobj(u):
            raise TypeError(
                f"{name}: the leaf {partitions.leaf_names(params)[i]!r} has dtype "
                f"{u.dtype}, but a direction is real."
            )
    return active


def checked_loss(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """``(loss, aux)``, if the loss is a real floating point scalar."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "value_fn must return a pair (loss, aux) because has_aux=True, got "
            f"{type(result).__name__}."
        )
    value, aux = result if has_aux else (result, None)
    _check_equal_on_all_devices("value_fn", value)
    if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
        raise TypeError(
            f"value_fn must return a scalar loss, got a {type(value).__name__}; pass "
            "has_aux=True if it returns (loss, aux)."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value_fn must return a scalar loss, got shape {jnp.shape(value)}; "
            "return a mean or a sum."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            "value_fn must return a real floating point loss, got dtype "
            f"{jnp.result_type(value)}."
        )
    return jnp.asarray(value), aux


def _check_equal_on_all_devices(name: str, tree: PyTree) -> None:
    """Check, inside `shard_map`, that a tree is the same on all devices.

    If jax does not track which values differ between devices (``check_vma=False`` or
    `pmap`), the derivative of a mean over devices is wrong without any error.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis in mesh.manual_axes:
        if mesh.shape[axis] == 1:
            continue
        if axis not in _varying(jax.lax.axis_index(axis)):
            raise ValueError(
                "value_fn: inside pmap, or shard_map with check_vma=False, derivatives "
                "of a mean over devices are wrong; use shard_map with check_vma=True, "
                "or jit with sharded arguments."
            )
        for leaf in jax.tree.leaves(tree):
            if axis in _varying(leaf):
                raise ValueError(
                    f"{name}: inside shard_map, {_DIFFERS[name].format(axis=axis)}"
                )


_DIFFERS = {
    "value_fn": "the loss differs between the devices of the mesh axis {axis!r}; "
    "return jax.lax.pmean(loss, {axis!r}).",
    "direction": "it differs between the devices of the mesh axis {axis!r}; use the "
    "gradient of jax.lax.pmean(loss, {axis!r}).",
    "params": "the parameters differ between the devices of the mesh axis {axis!r}; to "
    "shard parameters, use jit with sharded arguments.",
}


def _varying(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array may differ."""
    return jax.typeof(x).manual_axis_type.varying
