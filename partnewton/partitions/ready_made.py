"""Functions from parameters to labels, to be passed as `param_labels`."""

import collections
import re
from typing import Any

import jax
import numpy as np

from partnewton.partitions.paths import ROOT, leaf_keys, leaf_names, listing

PyTree = Any


def per_tensor(params: PyTree) -> PyTree:
    """One subset per leaf, the "canonical" partition of the paper.

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


def per_role(params: PyTree) -> PyTree:
    """One subset per role of a matrix; all leaves with fewer than two axes are one.

    Leaves have the same role if their shapes are equal and their paths differ in
    numbers only, such as the query kernels of all layers of a transformer. They have
    one learning rate, as if the layers were stacked for :func:`jax.lax.scan`, which is
    computed from the entries of all of them. The number of subsets, and so the cost of
    a summary in gradients, does not grow with the number of layers.

    Biases, and the scales of normalisation layers, are many and small: the curvature of
    one of them along its direction is mostly noise of the batch.

    Args:
      params: a pytree of arrays, or of objects with a shape.

    Returns:
      A pytree like `params` of labels: "vectors" for leaves with fewer than two axes;
      otherwise the path of the leaf, in which "*" replaces each number if other leaves
      have the same role, with the shape behind it if it is not the only one there.

    Raises:
      ValueError: as for `per_tensor`; the path of a leaf with two axes is "vectors".

    Example:
      >>> layer = {"bias": np.zeros(3), "kernel": np.zeros((3, 3))}
      >>> first, second = per_role([layer, layer])
      >>> first
      {'bias': 'vectors', 'kernel': '*/kernel'}
    """
    names, treedef = jax.tree.flatten(per_tensor(params))
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    roles = [
        (re.sub(r"\d+", "*", name), shape) if len(shape) >= 2 else (_VECTORS, None)
        for name, shape in zip(names, shapes, strict=True)
    ]
    leaves_of = collections.Counter(roles)
    shapes_of = collections.Counter(path for path, _ in leaves_of)

    def label(name: str, role: tuple[str, Any]) -> str:
        path, shape = role
        if shape is None:
            return _VECTORS
        if leaves_of[role] == 1:
            return name
        return path if shapes_of[path] == 1 else f"{path} {shape}"

    labels = [label(*x) for x in zip(names, roles, strict=True)]
    if labels.count(_VECTORS) != leaves_of[_VECTORS, None]:
        raise ValueError(
            f"params: the leaf {_VECTORS!r} has two axes or more and the name of the "
            "subset of all leaves with fewer; pass param_labels with other labels."
        )
    return jax.tree.unflatten(treedef, labels)


_VECTORS = "vectors"


def auto(params: PyTree) -> PyTree:
    """The default of `partition_newton`: `per_tensor`, or `per_role` of many leaves.

    Up to 16 leaves, each is a subset. Beyond that, `per_role`: a summary costs up to
    half a loss per subset, and the losses of training are lower, see
    ``docs/design_notes.md``.

    Args:
      params: a pytree of arrays, or of objects with a shape.

    Returns:
      A pytree like `params` of labels.

    Raises:
      ValueError: as for `per_tensor` and `per_role`.

    Example:
      >>> auto({"bias": np.zeros(2), "kernel": np.zeros((3, 2))})
      {'bias': 'bias', 'kernel': 'kernel'}
    """
    is_large = len(jax.tree.leaves(params)) > _MOST_TENSORS
    return per_role(params) if is_large else per_tensor(params)


_MOST_TENSORS = 16


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


_BY_NAME = {
    fn.__name__: fn
    for fn in (
        auto,
        per_tensor,
        per_role,
        whole,
        weights_biases,
        per_layer,
        per_element,
    )
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
