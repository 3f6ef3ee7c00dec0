"""Which entry of the parameters belongs to which subset, and sums per subset.

A partition is given as `param_labels`, in the sense of :func:`optax.partition`: a
pytree of labels that is a prefix of the parameters, or a function from the parameters
to one, or the name of such a function of this module, "per_layer" for instance. Entries
with equal labels form one subset. A label is

- a string or an integer for a whole leaf (or for all the leaves below that place),
- an integer array that broadcasts to the shape of its leaf, for subsets inside it,
- :data:`FROZEN`, as a label or as an entry of such an array, to leave entries out.

A leaf without entries, of shape (0,) or (3, 0), is in no subset, whatever its label: it
is treated as a frozen one. Where the parameters have None or :class:`optax.MaskedNode`
in the place of a leaf, as filtered Equinox models do, no label is needed, and one that
stands there is ignored. A frozen leaf may have any dtype.

The functions of this module that make labels can be given as `param_labels` wherever
it is asked for. Labels meet leaves by key path and never by tree structure, so that a
nested dict of labels serves a dict, a Flax linen params dict and an `nnx.State` alike.
Everything here is computed at trace time, from structure and shapes alone.
"""

from partnewton.partitions.direction import checked_direction as checked_direction
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
    alternate,
    blocks,
    by_path,
    per_element,
    per_layer,
    per_tensor,
    weights_biases,
    whole,
)

__all__ = [
    "FROZEN",
    "alternate",
    "blocks",
    "by_path",
    "per_element",
    "per_layer",
    "per_tensor",
    "subset_names",
    "weights_biases",
    "whole",
]
