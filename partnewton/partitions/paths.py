"""Key paths of leaves as strings, "dense/kernel"."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax

PyTree = Any

ROOT = "params"
"""The name of a leaf with an empty path, and of the top-level layer."""

VALUE = jax.tree_util.GetAttrKey("value")


def is_placeholder(params: PyTree) -> bool:
    """Whether `params` is the placeholder of :func:`optax.tree.map_params`.

    That function calls `init` with a single object, of a private class of optax, in
    place of the parameters. It cannot be partitioned.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def leaf_names(
    params: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
    """The key paths of the leaves as strings, "dense/kernel"."""
    return [name_of(keys) for keys in leaf_keys(params, is_leaf)]


def name_of(keys: tuple[str, ...]) -> str:
    """The keys of a path as one string."""
    return "/".join(keys) or ROOT


def leaf_keys(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, ...]]:
    """The keys of the path of each leaf, as strings.

    Some, but not all, paths of an `nnx.State` and of linen's boxed parameters end in
    the attribute `value`. It is omitted where it is an only child.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [path for path, _ in flat]
    ends_in_value = [path[-1:] == (VALUE,) for path in paths]
    if any(ends_in_value):
        leaves_below = collections.Counter(
            path[:n] for path in paths for n in range(len(path))
        )
        paths = [
            path[:-1] if boxed and leaves_below[path[:-1]] == 1 else path
            for path, boxed in zip(paths, ends_in_value, strict=True)
        ]
    # A model has few distinct keys in many paths.
    texts: dict[Any, str] = {}
    for path in paths:
        for key in path:
            if key not in texts:
                texts[key] = jax.tree_util.keystr((key,), simple=True)
    return [tuple(texts[key] for key in path) for path in paths]


def labels_of_leaves(labels: PyTree, params: PyTree) -> list[Any]:
    """For each leaf of `params`, the label whose path is a prefix of the leaf's path.

    Labels at None, at a MaskedNode or at an empty container of `params` are ignored.

    Raises:
      ValueError: a leaf without a label, or a label that matches no leaf.
    """
    if jax.tree.structure(labels) == jax.tree.structure(params):
        return jax.tree.leaves(labels)

    def is_none(x: Any) -> bool:
        return x is None

    paths = leaf_keys(params)
    flat = jax.tree.leaves(labels, is_leaf=is_none)
    labelled = dict(zip(leaf_keys(labels, is_none), flat, strict=True))
    unused = {path for path, label in labelled.items() if label is not None}
    found = []
    for path in paths:
        prefixes = [path[:n] for n in range(len(path) + 1) if path[:n] in labelled]
        if not prefixes:
            raise ValueError(
                f"param_labels: the leaf {name_of(path)!r} of params has no label; "
                "label it partitions.FROZEN if it is not trained."
            )
        unused.discard(prefixes[0])
        found.append(labelled[prefixes[0]])
    if unused:
        unused -= _matching(_leafless_paths(params), unused)
    if unused:
        raise ValueError(
            f"param_labels: {listing('/'.join(path) for path in sorted(unused))} "
            "matches no leaf of params; the leaves are "
            f"{listing(name_of(path) for path in paths)}."
        )
    return found


def _leafless_paths(params: PyTree) -> list[tuple[str, ...]]:
    """The paths of None, of MaskedNodes and of empty containers in `params`."""

    def is_leafless(x: Any) -> bool:
        return jax.tree.structure(x).num_leaves == 0

    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leafless)
    keys = leaf_keys(params, is_leafless)
    return [path for path, (_, x) in zip(keys, flat, strict=True) if is_leafless(x)]


def _matching(
    leafless: list[tuple[str, ...]], paths: set[tuple[str, ...]]
) -> set[tuple[str, ...]]:
    """Those of `paths` that are a prefix of a leafless path, or the reverse."""
    return {
        path
        for path in paths
        for other in leafless
        if path[: len(other)] == other or other[: len(path)] == path
    }


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, for an error message."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
