"""Partitions of the parameters into subsets.

A partition is specified by `param_labels`, as in :func:`optax.partition`: a pytree of
labels that is a prefix of the parameters, or a function from the parameters to such a
pytree, or the name of a function of this module, such as "per_layer". Entries with
equal labels form one subset. A label is

- a string or an integer, for a whole leaf or for all leaves of a subtree,
- an integer array that broadcasts to the shape of its leaf, for subsets of a leaf,
- :data:`FROZEN`, as a label or as an entry of such an array, for entries that are not
  trained.

A leaf without entries, of shape (0,) for example, is treated as frozen, whatever its
label. If the parameters contain None or :class:`optax.MaskedNode` in place of a leaf,
as filtered Equinox models do, no label is needed there, and a label there is ignored. A
frozen leaf may have any dtype.

The functions of this module that return labels can be passed as `param_labels`. Labels
are matched to leaves by key path, not by tree structure, so a nested dict of labels can
be used for a dict, for the parameters of Flax linen and for an `nnx.State`. Partitions
are computed when a function is traced, from structures and shapes only.
"""

from partnewton.partitions.direction import checked_direction as checked_direction
from partnewton.partitions.factories import alternate, blocks, by_path
from partnewton.partitions.labels import ParamLabels as ParamLabels
from partnewton.partitions.labels import partition_of as partition_of
from partnewton.partitions.labels import subset_names
from partnewton.partitions.partition import FROZEN
from partnewton.partitions.partition import Partition as Partition
from partnewton.partitions.partition import is_frozen as is_frozen
from partnewton.partitions.partition import sharded_like as sharded_like
from partnewton.partitions.partition import zeros_of_frozen as zeros_of_frozen
from partnewton.partitions.paths import is_placeholder as is_placeholder
from partnewton.partitions.paths import leaf_names as leaf_names
from partnewton.partitions.paths import listing as listing
from partnewton.partitions.ready_made import (
    auto,
    per_element,
    per_layer,
    per_role,
    per_tensor,
    weights_biases,
    whole,
)

__all__ = [
    "FROZEN",
    "alternate",
    "auto",
    "blocks",
    "by_path",
    "per_element",
    "per_layer",
    "per_role",
    "per_tensor",
    "subset_names",
    "weights_biases",
    "whole",
]
