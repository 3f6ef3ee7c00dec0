"""Labels of every kind become the numbers of subsets."""

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
    """Works out which entry of `params` belongs to which subset.

    Args:
      params: a pytree of arrays, or of anything with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one, or the
        name of a ready-made function.

    Returns:
      The partition; its subsets are in the order in which their labels first appear,
      ascending within an array of labels.

    Raises:
      ValueError: labels without a leaf, a leaf without a label, an array of labels that
        does not broadcast to its leaf, the name of no partition, or nothing but frozen
        entries.
      TypeError: a label of another type, or a parameter that is not a real float.
    """
    names = functools.cache(lambda: leaf_names(params))  # which most calls do not need
    leaves = [
        _abstract(leaf, lambda i=i: names()[i])
        for i, leaf in enumerate(jax.tree.leaves(params))
    ]
    label_fn = by_name(param_labels)
    # A pytree of labels may be callable itself, as the modules of Equinox are.
    is_function = callable(label_fn) and type(label_fn) is not type(params)
    with jax.ensure_compile_time_eval():  # label functions may use jnp under a jit
        labels = label_fn(params) if is_function else label_fn
        by_leaf = [
            _checked_label(label, leaf, lambda i=i: names()[i])
            for i, (label, leaf) in enumerate(
                zip(labels_of_leaves(labels, params), leaves, strict=True)
            )
        ]
    subsets: dict[str, str | int] = {}  # subset name -> its label
    owners = _owners(by_leaf, names)
    number_of = functools.cache(functools.partial(_enter, names=subsets, owners=owners))
    numbers = tuple(_number(label, number_of) for label in by_leaf)
    if not subsets:
        raise ValueError(
            f"param_labels: the partition is empty: params has {_nothing_but(leaves)}."
        )
    dtypes = {
        leaf.dtype
        for leaf, number in zip(leaves, numbers, strict=True)
        if isinstance(number, np.ndarray) or number != FROZEN
    }
    dtype = at_least_float32(*dtypes)
    return Partition(tuple(subsets), numbers, dtype)


def subset_names(
    params: PyTree, param_labels: ParamLabels = "per_tensor"
) -> tuple[str, ...]:
    """The names of the subsets, in the order of every axis of a summary.

    A label that is a string or an integer is the name itself. A label that occurs only
    inside arrays of labels of one leaf is named after the leaf, "path[label]".

    Args:
      params: a pytree of arrays, or of anything with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one, or the
        name of a ready-made function.

    Returns:
      S names.

    Raises:
      ValueError, TypeError: the labels do not fit the parameters.

    Example:
      >>> params = {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}
      >>> subset_names(params)
      ('bias', 'kernel')
      >>> subset_names(params, {"bias": "b", "kernel": np.arange(3)[:, None]})
      ('b', 'kernel[0]', 'kernel[1]', 'kernel[2]')
    """
    return partition_of(params, param_labels).names


def _abstract(leaf: Any, name: Callable[[], str]) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, in the types of jax."""
    if isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"params: the leaf {name()!r} is a {type(leaf).__name__}, not an array. "
            "Take out what is not a parameter, as eqx.partition(model, "
            "eqx.is_inexact_array) does, and put it back in value_fn."
        )
    return leaf


def _checked_label(label: Any, leaf: Any, name: Callable[[], str]) -> Label:
    """The label as a string, an int, or an int array of the leaf's shape."""
    if isinstance(label, str):
        result: Label = label
    elif isinstance(label, jax.core.Tracer):
        raise TypeError(
            f"param_labels: the labels of leaf {name()!r} are traced, but a partition "
            "is worked out before anything runs; make them with numpy, from shapes "
            "alone."
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
    if 0 in leaf.shape:  # no subset is without entries
        return FROZEN
    frozen = not isinstance(result, str) and np.all(result == FROZEN)
    if not (frozen or _is_real_float(leaf.dtype)):
        raise TypeError(
            f"params: the leaf {name()!r} has dtype {leaf.dtype}; only real floating-"
            "point leaves can be trained. Label it partitions.FROZEN, or split "
            "a complex leaf into its real and imaginary parts."
        )
    return result


@functools.cache
def _is_real_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _nothing_but(leaves: Sequence[jax.ShapeDtypeStruct]) -> str:
    """Of what kinds leaves are that make no subset."""
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
    """The integer labels that occur only inside one leaf, and the name of that leaf."""
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


def _enter(x: str | int, names: dict[str, str | int], owners: dict[int, str]) -> int:
    """The number of the subset labelled `x`, which is entered into `names`."""
    if x == FROZEN:
        return FROZEN
    name = f"{owners[x]}[{x}]" if x in owners else str(x)
    if name in names:
        raise ValueError(
            f"param_labels: the labels {names[name]!r} and {x!r} would both be called "
            f"{name!r}; rename one of them."
        )
    names[name] = x
    return len(names) - 1


def _number(label: Label, number_of: Callable[[str | int], int]) -> int | np.ndarray:
    """Replaces labels by the numbers of their subsets."""
    if not isinstance(label, np.ndarray):
        return number_of(label)
    distinct, places = np.unique(label, return_inverse=True)
    numbers = np.array([number_of(x) for x in distinct.tolist()], np.int32)
    if numbers.size == 1:  # one subset holds the leaf: no array is needed to say so
        return int(numbers[0])
    return numbers[places].reshape(label.shape)
