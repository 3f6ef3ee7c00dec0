"""Functions that return functions from parameters to labels."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from partnewton.partitions.partition import FROZEN
from partnewton.partitions.paths import labels_of_leaves, leaf_names, listing
from partnewton.partitions.ready_made import by_name, per_tensor

PyTree = Any


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
