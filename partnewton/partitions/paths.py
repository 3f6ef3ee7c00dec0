"""Key paths of leaves as text, "dense/kernel"."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax

PyTree = Any

ROOT = "params"
"""The name of a leaf that has no path, and of the topmost layer."""

VALUE = jax.tree_util.GetAttrKey("value")


def is_placeholder(params: PyTree) -> bool:
    """Whether :func:`optax.tree.map_params` initialises, to see what is like params.

    It puts one leaf of a class of its own, which optax does not make public, in the
    place of all parameters; no partition can be made of that.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def leaf_names(
    params: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
    """The key paths of the leaves as text, "dense/kernel"."""
    return [name_of(keys) for keys in leaf_keys(params, is_leaf)]


def name_of(keys: tuple[str, ...]) -> str:
    """The keys of a path as one text."""
    return "/".join(keys) or ROOT


def leaf_keys(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, ...]]:
    """The keys of the path of each leaf, as text.

    The paths of an `nnx.State` (and of linen's boxed parameters) end in the attribute
    `value` in some places and not in others, so that one is left out wherever it is an
    only child.
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
    # The keys of a model are few, its paths are many.
    texts: dict[Any, str] = {}
    for path in paths:
        for key in path:
            if key not in texts:
                texts[key] = jax.tree_util.keystr((key,), simple=True)
    return [tuple(texts[key] for key in path) for path in paths]


def labels_of_leaves(labels: PyTree, params: PyTree) -> list[Any]:
    """For each leaf of `params` the label whose path is a prefix of the leaf's own.

    Labels at places of `params` that hold no leaf, such as None, are ignored.

    Raises:
      ValueError: a leaf without a label, or a label that stands nowhere in `params`.
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
                f"param_labels: the leaf {name_of(path)!r} of params has no label; use "
                "partitions.FROZEN to leave it out."
            )
        unused.discard(prefixes[0])
        found.append(labelled[prefixes[0]])
    if unused:
        unused -= _standing_in(_hollow_places(params), unused)
    if unused:
        raise ValueError(
            f"param_labels: {listing('/'.join(path) for path in sorted(unused))} "
            "matches no leaf of params; the leaves are "
            f"{listing(name_of(path) for path in paths)}."
        )
    return found


def _hollow_places(params: PyTree) -> list[tuple[str, ...]]:
    """The paths at which `params` has None, a MaskedNode or an empty container."""

    def is_hollow(x: Any) -> bool:
        return jax.tree.structure(x).num_leaves == 0

    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_hollow)
    keys = leaf_keys(params, is_hollow)
    return [path for path, (_, x) in zip(keys, flat, strict=True) if is_hollow(x)]


def _standing_in(
    places: list[tuple[str, ...]], paths: set[tuple[str, ...]]
) -> set[tuple[str, ...]]:
    """Those of `paths` that lead to one of the places, or into it."""
    return {
        path
        for path in paths
        for place in places
        if path[: len(place)] == place or place[: len(path)] == path
    }


def listing(names: Iterable[str], most: int = 8) -> str:
    """Some names for an error message, the first few of them."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
