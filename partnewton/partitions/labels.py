"""From labels to a partition: the index of the subset of each entry."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._strictness import at_least_float32
from partnewton.partitions.partition import FROZEN, Partition
from partnewton.partitions.paths import labels_of_leaves, leaf_names
from partnewton.partitions.ready_made import by_name

PyTree = Any
Label = str | int | np.ndarray
ParamLabels = PyTree | Callable[[PyTree], PyTree]


def partition_of(params: PyTree, param_labels: ParamLabels) -> Partition:
    """The partition of `params` that the labels define.

    Args:
      params: a pytree of arrays, or of objects with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one, or the
        name of a function of :mod:`partnewton.partitions`.

    Returns:
      The partition. Subsets are in the order of the first appearance of their labels,
      those of one array of labels in ascending order.

    Raises:
      ValueError: a label without a leaf, a leaf without a label, an array of labels
        that does not broadcast to its leaf, an unknown name, or a
        partition without subsets.
      TypeError: a label of another type, or a parameter that is not real floating
        point and not frozen.
    """
    names = functools.cache(lambda: leaf_names(params))  # not needed by most calls
    leaves = [
        _abstract(leaf, lambda i=i: names()[i])
        for i, leaf in enumerate(jax.tree.leaves(params))
    ]
    label_fn = by_name(param_labels)
    # A pytree of labels can be callable: a module of Equinox, for example.
    is_function = callable(label_fn) and type(label_fn) is not type(params)
    with jax.ensure_compile_time_eval():  # label functions may use jnp inside jit
        labels = label_fn(params) if is_function else label_fn
        by_leaf = [
            _checked_label(label, leaf, lambda i=i: names()[i])
            for i, (label, leaf) in enumerate(
                zip(labels_of_leaves(labels, params), leaves, strict=True)
            )
        ]
    subsets: dict[str, str | int] = {}  # subset name -> its label
    owners = _owners(by_leaf, names)
    index_of = functools.cache(
        functools.partial(_index_of_label, names=subsets, owners=owners)
    )
    indices = tuple(_indices(label, index_of) for label in by_leaf)
    if not subsets:
        raise ValueError(
            f"param_labels: the partition is empty: params has {_kinds_of(leaves)}."
        )
    dtypes = {
        leaf.dtype
        for leaf, index in zip(leaves, indices, strict=True)
        if isinstance(index, np.ndarray) or index != FROZEN
    }
    dtype = at_least_float32(*dtypes)
    return Partition(tuple(subsets), indices, dtype)


def subset_names(
    params: PyTree, param_labels: ParamLabels = "per_tensor"
) -> tuple[str, ...]:
    """The names of the subsets, in the order of the axes of a summary.

    The name of a subset is its label. If a label occurs only in the array of labels of
    one leaf, the name is "path[label]".

    Args:
      params: a pytree of arrays, or of objects with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one, or the
        name of a function of :mod:`partnewton.partitions`.

    Returns:
      S names.

    Raises:
      ValueError, TypeError: the labels do not match the parameters.

    Example:
      >>> params = {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}
      >>> subset_names(params)
      ('bias', 'kernel')
      >>> subset_names(params, {"bias": "b", "kernel": np.arange(3)[:, None]})
      ('b', 'kernel[0]', 'kernel[1]', 'kernel[2]')
    """
    return partition_of(params, param_labels).names


def _abstract(leaf: Any, name: Callable[[], str]) -> jax.ShapeDtypeStruct:
    """The leaf, or its shape and dtype if it is not a jax type."""
    if isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"params: the leaf {name()!r} is a {type(leaf).__name__}, not an array. "
            "Remove leaves that are not parameters, for example by eqx.partition(model,"
            " eqx.is_inexact_array), and put them back in value_fn."
        )
    return leaf


def _checked_label(label: Any, leaf: Any, name: Callable[[], str]) -> Label:
    """The label as a string, an int, or an int array of the leaf's shape."""
    if isinstance(label, str):
        result: Label = label
    elif isinstance(label, jax.core.Tracer):
        raise TypeError(
            f"param_labels: the labels of leaf {name()!r} are traced, but partitions "
            "are computed at trace time; create the labels with NumPy, from shapes."
        )
    elif _is_integer(label) and np.ndim(label) == 0:
        result = int(label)
    elif _is_integer(label):
        try:
            result = np.broadcast_to(np.asarray(label), leaf.shape)
        except ValueError:
            raise ValueError(
                f"param_labels: the labels of leaf {name()!r} have shape "
                f"{label.shape}, which does not broadcast to the leaf's {leaf.shape}."
            ) from None
    else:
        kind = getattr(label, "dtype", type(label).__name__)
        raise TypeError(
            f"param_labels: the label of leaf {name()!r} must be a string, an integer "
            f"or an array of integers, got {kind}."
        )
    if 0 in leaf.shape:  # a subset has at least one entry
        return FROZEN
    frozen = not isinstance(result, str) and np.all(result == FROZEN)
    if not (frozen or _is_real_float(leaf.dtype)):
        raise TypeError(
            f"params: the leaf {name()!r} has dtype {leaf.dtype}; only real floating-"
            "point leaves can be trained. Label it partitions.FROZEN; split a "
            "complex leaf into its real and imaginary parts; of an nnx model pass "
            "nnx.state(model, nnx.Param)."
        )
    return result


@functools.cache
def _is_real_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _kinds_of(leaves: Sequence[jax.ShapeDtypeStruct]) -> str:
    """Why none of the leaves belongs to a subset."""
    if not leaves:
        return "no leaves"
    empty = sum(0 in leaf.shape for leaf in leaves)
    if empty == len(leaves):
        return "only leaves without entries"
    return "only frozen leaves" + (" and leaves without entries" if empty else "")


def _is_integer(label: Any) -> bool:
    return (isinstance(label, int) and not isinstance(label, bool)) or (
        isinstance(label, np.integer | np.ndarray | jax.Array)
        and np.issubdtype(label.dtype, np.integer)
    )


def _owners(by_leaf: Sequence[Label], names: Callable[[], list[str]]) -> dict[int, str]:
    """The integer labels that occur in the array of one leaf only, and that leaf."""
    owners: dict[int, set[str]] = {}
    whole_leaf = {label for label in by_leaf if isinstance(label, int)}
    for i, label in enumerate(by_leaf):
        if isinstance(label, np.ndarray):
            for x in np.unique(label).tolist():
                owners.setdefault(x, set()).add(names()[i])
    return {
        x: min(leaves)
        for x, leaves in owners.items()
        if len(leaves) == 1 and x not in whole_leaf
    }


def _index_of_label(
    x: str | int, names: dict[str, str | int], owners: dict[int, str]
) -> int:
    """The index of the subset with the label `x`, which is added to `names`."""
    if x == FROZEN:
        return FROZEN
    name = f"{owners[x]}[{x}]" if x in owners else str(x)
    if name in names:
        raise ValueError(
            f"param_labels: the labels {names[name]!r} and {x!r} would both have the "
            f"name {name!r}; rename one of them."
        )
    names[name] = x
    return len(names) - 1


def _indices(label: Label, index_of: Callable[[str | int], int]) -> int | np.ndarray:
    """The label with subsets replaced by their indices."""
    if not isinstance(label, np.ndarray):
        return index_of(label)
    distinct, inverse = np.unique(label, return_inverse=True)
    indices = np.array([index_of(x) for x in distinct.tolist()], np.int32)
    if indices.size == 1:  # the whole leaf is in one subset
        return int(indices[0])
    return indices[inverse].reshape(label.shape)
