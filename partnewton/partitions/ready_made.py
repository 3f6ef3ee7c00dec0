"""Functions from parameters to labels, to be passed as `param_labels`."""

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from partnewton.partitions.partition import FROZEN
from partnewton.partitions.paths import (
    ROOT,
    labels_of_leaves,
    leaf_keys,
    leaf_names,
    listing,
)

PyTree = Any


def per_tensor(params: PyTree) -> PyTree:
    """One subset per leaf: the default, the "canonical" partition of the paper.

    Args:
      params: a pytree of arrays, or of objects with a shape.

    Returns:
      A pytree like `params` that contains the key path of each leaf.

    Raises:
      ValueError: the paths of two leaves are equal as strings.

    Example:
      >>> per_tensor({"dense": {"bias": 0.0, "kernel": 1.0}})
      {'dense': {'bias': 'dense/bias', 'kernel': 'dense/kernel'}}

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    names = leaf_names(params)
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"params: two leaves have the name {name!r}; pass param_labels with "
                "different labels for them."
            )
    return jax.tree.unflatten(jax.tree.structure(params), names)


def whole(params: PyTree) -> PyTree:
    """All entries in one subset, S = 1: the "trivial" partition of the paper.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree like `params` with the label "params" at each leaf.

    Example:
      >>> whole({"bias": 0.0, "kernel": 1.0})
      {'bias': 'params', 'kernel': 'params'}
    """
    return jax.tree.map(lambda _: ROOT, params)


def weights_biases(params: PyTree) -> PyTree:
    """Two subsets: all weights, all biases.

    A leaf is a weight if the last key of its path is "kernel", "weight", "embedding",
    "w", "w1", ..., and a bias if it is "bias", "b", "b1", .... Leaves with other names
    are weights if their rank is 2 or more.

    Args:
      params: a pytree of arrays, or of objects with a shape.

    Returns:
      A pytree like `params` of labels "weights" and "biases".

    Example:
      >>> weights_biases({"bias": np.zeros(2), "kernel": np.zeros((3, 2))})
      {'bias': 'biases', 'kernel': 'weights'}
    """

    def label(keys: tuple[str, ...], leaf: Any) -> str:
        name = (keys or ("",))[-1].lower()
        if re.search(r"bias|^b_?\d*$", name):
            return "biases"
        if re.search(r"kernel|weight|embedding|^w_?\d*$", name):
            return "weights"
        return "weights" if np.ndim(leaf) >= 2 else "biases"

    leaves, treedef = jax.tree.flatten(params)
    labels = map(label, leaf_keys(params), leaves)
    return jax.tree.unflatten(treedef, labels)


def per_layer(params: PyTree) -> PyTree:
    """One subset per parent node: the kernel and the bias of a layer form a subset.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree like `params` that contains the path of the parent of each leaf.

    Example:
      >>> per_layer({"dense": {"bias": 0.0, "kernel": 1.0}})
      {'dense': {'bias': 'dense', 'kernel': 'dense'}}
    """
    labels = ["/".join(keys[:-1]) or ROOT for keys in leaf_keys(params)]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def per_element(params: PyTree) -> PyTree:
    """One subset per entry, S = P: with this partition the method is Newton's.

    Args:
      params: a pytree of arrays, or of objects with a shape.

    Returns:
      A pytree like `params` of integer arrays, in which all entries are different.

    Example:
      >>> per_element({"bias": np.zeros(2), "kernel": np.zeros((1, 3))})
      {'bias': array([0, 1]), 'kernel': array([[2, 3, 4]])}
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = [np.shape(leaf) for leaf in leaves]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    labels = [
        np.arange(end - int(np.prod(shape)), end).reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]
    return jax.tree.unflatten(treedef, labels)


def by_path(
    rules: Iterable[tuple[str, str | int]],
) -> Callable[[PyTree], PyTree]:
    """Labels from regular expressions for key paths; the first match applies.

    Args:
      rules: pairs (regular expression, label). The expression is applied by
        :func:`re.search` to the path of a leaf, such as "encoder/dense_0/kernel". A
        label may be :data:`FROZEN`.

    Returns:
      A function from params to labels, to be passed as `param_labels`.

    Raises:
      ValueError: raised by that function if an expression matches no leaf, or no
        expression matches a leaf.

    Example:
      >>> labels = by_path([("embedding", FROZEN), ("bias$", "biases"), ("", "rest")])
      >>> labels({"embedding": 0.0, "dense": {"bias": 0.0, "kernel": 0.0}})
      {'dense': {'bias': 'biases', 'kernel': 'rest'}, 'embedding': -1}
    """
    rules = tuple(rules)

    def labels(params: PyTree) -> PyTree:
        names = leaf_names(params)
        for pattern, label in rules:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"by_path: the pattern {pattern!r}, label {label!r}, matches no "
                    f"leaf of params; the leaves are {listing(names)}."
                )

        def label_of(name: str) -> str | int:
            for pattern, label in rules:
                if re.search(pattern, name):
                    return label
            raise ValueError(
                f"by_path: no pattern matches the leaf {name!r} of params; end the "
                "list with ('', label) or ('', FROZEN) to catch the rest."
            )

        treedef = jax.tree.structure(params)
        return jax.tree.unflatten(treedef, [label_of(name) for name in names])

    return labels


def blocks(
    n: int, of: str | Callable[[PyTree], PyTree] = per_tensor
) -> Callable[[PyTree], PyTree]:
    """`n` subsets of consecutive tensors, of equal size up to one tensor.

    Args:
      n: the number of subsets.
      of: a function from params to labels, such as `per_tensor` or `per_layer`, whose
        subsets are grouped.

    Returns:
      A function from params to labels, to be passed as `param_labels`.

    Raises:
      ValueError: `n` is not positive; raised by that function if `n` is greater than
        the number of subsets to group.

    Example:
      >>> blocks(2)({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0})
      {'a': 'block 0', 'b': 'block 0', 'c': 'block 1', 'd': 'block 1'}
    """
    return _grouping("blocks", n, of, lambda i, count: f"block {i * n // count}")


def alternate(
    n: int, of: str | Callable[[PyTree], PyTree] = per_tensor
) -> Callable[[PyTree], PyTree]:
    """`n` subsets of alternating tensors: tensor i belongs to subset i modulo `n`.

    Args:
      n: the number of subsets.
      of: a function from params to labels, such as `per_tensor` or `per_layer`, whose
        subsets are grouped.

    Returns:
      A function from params to labels, to be passed as `param_labels`.

    Raises:
      ValueError: `n` is not positive; raised by that function if `n` is greater than
        the number of subsets to group.

    Example:
      >>> alternate(2)({"a": 0.0, "b": 0.0, "c": 0.0})
      {'a': 'turn 0', 'b': 'turn 1', 'c': 'turn 0'}
    """
    return _grouping("alternate", n, of, lambda i, count: f"turn {i % n}")


def _grouping(
    caller: str,
    n: int,
    of: str | Callable[[PyTree], PyTree],
    label_of: Callable[[int, int], str],
) -> Callable[[PyTree], PyTree]:
    """Labels that group the subsets of `of` by their positions."""
    if n < 1:
        raise ValueError(f"{caller}: n must be at least 1, got {n}.")

    label_fn = by_name(of)

    def labels(params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        finer = labels_of_leaves(label_fn(params), params)
        if not all(isinstance(x, str | int) for x in finer):
            raise TypeError(
                f"{caller}: of= must return one label per leaf, not arrays."
            )
        order = dict.fromkeys(
            x
            for x, leaf in zip(finer, leaves, strict=True)
            if x != FROZEN and 0 not in np.shape(leaf)
        )
        if n > len(order):
            raise ValueError(
                f"{caller}: n = {n}, but there are only {len(order)} subsets to group."
            )
        coarser = {x: label_of(i, len(order)) for i, x in enumerate(order)}
        return jax.tree.unflatten(treedef, [coarser.get(x, FROZEN) for x in finer])

    return labels


_BY_NAME = {
    fn.__name__: fn
    for fn in (per_tensor, whole, weights_biases, per_layer, per_element)
}


def by_name(param_labels: Any) -> Any:
    """The function with this name, if it is a string; anything else unchanged.

    Raises:
      ValueError: an unknown name.
    """
    if not isinstance(param_labels, str):
        return param_labels
    if param_labels not in _BY_NAME:
        raise ValueError(
            f"param_labels: {param_labels!r} is not the name of a partition; the names "
            f"are {listing(_BY_NAME)}. 'whole' makes all parameters one subset."
        )
    return _BY_NAME[param_labels]
