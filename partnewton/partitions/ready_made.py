"""Functions from parameters to labels, to be given as `param_labels`."""

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
    """One subset a leaf: the default, the "canonical" partition of the paper.

    Args:
      params: a pytree of arrays, or of anything with a shape.

    Returns:
      A pytree like `params`: the label of a leaf is its key path.

    Raises:
      ValueError: two leaves have the same path once it is written as text.

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
                f"params: two leaves are both called {name!r}; "
                "give param_labels= that tell them apart."
            )
    return jax.tree.unflatten(jax.tree.structure(params), names)


def whole(params: PyTree) -> PyTree:
    """All entries in one subset, S = 1: the "trivial" partition of the paper.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree like `params` of one and the same label, "params".

    Example:
      >>> whole({"bias": 0.0, "kernel": 1.0})
      {'bias': 'params', 'kernel': 'params'}
    """
    return jax.tree.map(lambda _: ROOT, params)


def weights_biases(params: PyTree) -> PyTree:
    """Two subsets: all weights, all biases.

    The last key of a leaf's path decides where it says so ("kernel", "weight",
    "embedding", "w", "w1", ...; "bias", "b", "b1", ...), and else the rank does: leaves
    of rank 2 and more are weights.

    Args:
      params: a pytree of arrays, or of anything with a shape.

    Returns:
      A pytree like `params` of the labels "weights" and "biases".

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
    """One subset for the leaves that share a parent: kernel and bias together.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree like `params`: the label of a leaf is the path of its parent.

    Example:
      >>> per_layer({"dense": {"bias": 0.0, "kernel": 1.0}})
      {'dense': {'bias': 'dense', 'kernel': 'dense'}}
    """
    labels = ["/".join(keys[:-1]) or ROOT for keys in leaf_keys(params)]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def per_element(params: PyTree) -> PyTree:
    """One subset an entry, S = P: the finest partition, where the method is Newton's.

    Args:
      params: a pytree of arrays, or of anything with a shape.

    Returns:
      A pytree like `params` of integer arrays that number all entries.

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
    """Labels by regular expressions on the leaves' paths; the first that matches wins.

    Args:
      rules: pairs (regular expression, label). An expression is searched for, with
        :func:`re.search`, in the path of a leaf, such as "encoder/dense_0/kernel". A
        label may be :data:`FROZEN`.

    Returns:
      A function from params to labels, to be given as `param_labels`.

    Raises:
      ValueError: from that function, if an expression matches no leaf, or a leaf is
        matched by no expression.

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
    """`n` runs of consecutive tensors, of equal length or nearly so.

    Args:
      n: the number of subsets.
      of: what is run together: another function to labels, `per_tensor` or `per_layer`
        for instance.

    Returns:
      A function from params to labels, to be given as `param_labels`.

    Raises:
      ValueError: `n` is not positive, or, from that function, is more than there are
        subsets to group.

    Example:
      >>> blocks(2)({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0})
      {'a': 'block 0', 'b': 'block 0', 'c': 'block 1', 'd': 'block 1'}
    """
    return _grouping("blocks", n, of, lambda i, count: f"block {i * n // count}")


def alternate(
    n: int, of: str | Callable[[PyTree], PyTree] = per_tensor
) -> Callable[[PyTree], PyTree]:
    """`n` subsets that take turns: the i-th tensor joins subset i modulo `n`.

    Args:
      n: the number of subsets.
      of: what takes turns: another function to labels, `per_tensor` or `per_layer` for
        instance.

    Returns:
      A function from params to labels, to be given as `param_labels`.

    Raises:
      ValueError: `n` is not positive, or, from that function, is more than there are
        subsets to group.

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
    """Labels that join the subsets of `of` by their place in the order of leaves."""
    if n < 1:
        raise ValueError(f"{caller}: n must be at least 1, got {n}.")

    label_fn = by_name(of)

    def labels(params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        finer = labels_of_leaves(label_fn(params), params)
        if not all(isinstance(x, str | int) for x in finer):
            raise TypeError(f"{caller}: of= must give one label a leaf, not arrays.")
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
    """The function that a lone string names; anything else as it is.

    Raises:
      ValueError: a string that names none.
    """
    if not isinstance(param_labels, str):
        return param_labels
    if param_labels not in _BY_NAME:
        raise ValueError(
            f"param_labels: {param_labels!r} is not the name of a partition; the names "
            f"are {listing(_BY_NAME)}. The name of all parameters as one subset is "
            "'whole'."
        )
    return _BY_NAME[param_labels]
