"""A direction, checked against the parameters it belongs to."""

from typing import Any

import jax
import numpy as np

from partnewton.partitions.partition import Partition
from partnewton.partitions.paths import leaf_names

PyTree = Any


def checked_direction(
    direction: PyTree,
    params: PyTree,
    name: str = "direction",
    partition: Partition | None = None,
    num_directions: int | None = None,
) -> list[Any]:
    """The leaves of `direction`, if they have the paths and shapes of `params`.

    At a leaf that is frozen in `partition`, any shape and dtype is accepted, such as
    `float0`, the dtype of gradients with respect to integers in jax.

    Args:
      direction: a pytree like `params`.
      params: the parameters.
      name: the argument, for the message.
      partition: the partition of `params`; by default no leaf is frozen.
      num_directions: the length of a leading axis of all leaves; by default there is
        no such axis.

    Returns:
      A list of leaves, frozen ones included.

    Raises:
      ValueError: the structures or shapes differ.
    """
    leaves, treedef = jax.tree.flatten(direction)
    likes, params_treedef = jax.tree.flatten(params)
    if treedef != params_treedef:
        theirs, ours = leaf_names(direction), leaf_names(params)
        for missing in [path for path in ours if path not in theirs]:
            raise ValueError(f"{name} has no leaf {missing!r}, but params has one.")
        for extra in [path for path in theirs if path not in ours]:
            raise ValueError(f"{name} has a leaf {extra!r}, but params has none.")
    frozen = set() if partition is None else {*range(len(leaves))} - {*partition.active}
    axes = () if num_directions is None else (num_directions,)
    and_axis = f" and num_directions={num_directions}" if axes else ""
    for i, (u, leaf) in enumerate(zip(leaves, likes, strict=True)):
        if i not in frozen and np.shape(u) != axes + np.shape(leaf):
            raise ValueError(
                f"{name}: the leaf {leaf_names(params)[i]!r} has shape {np.shape(u)}, "
                f"but in params it has shape {np.shape(leaf)}{and_axis}."
            )
    return leaves
