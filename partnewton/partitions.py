"""Which entry of the parameters belongs to which subset, and sums per subset.

A partition is given as `param_labels`, in the sense of :func:`optax.partition`: a
pytree of labels that is a prefix of the parameters, or a function from the parameters
to one. Entries with equal labels form one subset. A label is

- a string or an integer for a whole leaf (or for all the leaves below that place),
- an integer array that broadcasts to the shape of its leaf, for subsets inside it,
- :data:`FROZEN`, as a label or as an entry of such an array, to leave entries out.

The functions of this module that make labels can be given as `param_labels` wherever
it is asked for. Labels meet leaves by key path and never by tree structure, so that a
nested dict of labels serves a dict, a Flax linen params dict and an `nnx.State` alike.
Everything here is computed at trace time, from structure and shapes alone.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

PyTree = Any
Label = str | int | np.ndarray
ParamLabels = PyTree | Callable[[PyTree], PyTree]

FROZEN = -1
"""The label of entries that stay as they are: their update is zero, at no cost."""

ROOT = "params"  # the name of a leaf that has no path, and of the topmost layer


# --- Ready-made partitions -------------------------------------------------------


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
    for name in names:
        if names.count(name) > 1:
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
    labels = map(label, _leaf_keys(params), leaves)
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
    labels = ["/".join(keys[:-1]) or ROOT for keys in _leaf_keys(params)]
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
                    f"leaf of params; the leaves are {_listing(names)}."
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
    n: int, of: Callable[[PyTree], PyTree] = per_tensor
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
    n: int, of: Callable[[PyTree], PyTree] = per_tensor
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
    of: Callable[[PyTree], PyTree],
    label_of: Callable[[int, int], str],
) -> Callable[[PyTree], PyTree]:
    """Labels that join the subsets of `of` by their place in the order of leaves."""
    if n < 1:
        raise ValueError(f"{caller}: n must be at least 1, got {n}.")

    def labels(params: PyTree) -> PyTree:
        finer = of(params)
        if not all(isinstance(x, str | int) for x in jax.tree.leaves(finer)):
            raise TypeError(f"{caller}: of= must give one label a leaf, not arrays.")
        order = [x for x in dict.fromkeys(jax.tree.leaves(finer)) if x != FROZEN]
        if n > len(order):
            raise ValueError(
                f"{caller}: n = {n}, but there are only {len(order)} subsets to group."
            )
        coarser = {x: label_of(i, len(order)) for i, x in enumerate(order)}
        return jax.tree.map(lambda x: coarser.get(x, FROZEN), finer)

    return labels


# --- A partition, worked out -----------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """A split of the entries of some leaves into S subsets.

    Attributes:
      names: the S names of the subsets, in the order of every axis of length S.
      labels: for each leaf the number of its subset, or an array of its shape of such
        numbers; FROZEN for what is in none.
      dtype: what sums over a subset are accumulated in: float32, or float64 if an
        active leaf has it.
    """

    names: tuple[str, ...]
    labels: tuple[int | np.ndarray, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """S."""
        return len(self.names)

    @functools.cached_property
    def active(self) -> tuple[int, ...]:
        """The places of the leaves that are not frozen altogether."""
        return tuple(
            i for i, label in enumerate(self.labels) if np.any(label != FROZEN)
        )

    def of_active(self) -> "Partition":
        """The same partition of the active leaves alone."""
        labels = tuple(self.labels[i] for i in self.active)
        return dataclasses.replace(self, labels=labels)

    def part(self, leaves: Sequence[jax.Array], s: jax.typing.ArrayLike) -> list:
        """The leaves on subset `s`, zero elsewhere; `s` may be traced."""
        return [
            jnp.where(sharded_like(x, label == s), x, jnp.zeros_like(x))
            for x, label in zip(leaves, self.labels, strict=True)
        ]

    def inner(self, xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
        """The inner products <x, y> on each subset, (S,)."""
        whole_sums, whole_labels = [], []
        result = jnp.zeros(self.size, self.dtype)
        for x, y, label in zip(xs, ys, self.labels, strict=True):
            # A product and a sum, not a dot: a dot may round its inputs (TF32, bf16).
            product = x.astype(self.dtype) * y.astype(self.dtype)
            if isinstance(label, np.ndarray):
                slots = np.where(label == FROZEN, self.size, label)
                result = _add_at(result, slots, product)
            elif label != FROZEN:
                whole_sums.append(jnp.sum(product))
                whole_labels.append(label)
        if whole_sums:
            result = result.at[np.array(whole_labels)].add(jnp.stack(whole_sums))
        return result

    def counts(self, leaves: Sequence[jax.Array]) -> np.ndarray:
        """How many entries each subset has, (S,)."""
        result = np.zeros(self.size, int)
        for x, label in zip(leaves, self.labels, strict=True):
            subsets, numbers = np.unique(label, return_counts=True)
            if np.ndim(label) == 0:
                numbers = np.array([np.size(x)])
            moving = subsets != FROZEN
            result[subsets[moving]] += numbers[moving]
        return result

    def spread(self, values: jax.Array) -> list[jax.Array]:
        """`values` (S,) at the entries of each leaf: () or the leaf's shape."""
        padded = jnp.append(values, jnp.zeros(1, values.dtype))  # FROZEN = -1: the last
        return [padded[label] for label in self.labels]


def sharded_like(x: jax.Array, array: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """An array of the shape of `x`, or a scalar, sharded as `x` under explicit axes."""
    sharding = jax.typeof(x).sharding
    if np.ndim(array) == 0 or not sharding.mesh.explicit_axes:
        return array
    return jax.sharding.reshard(array, sharding.spec)


def _add_at(sums: jax.Array, slots: np.ndarray, terms: jax.Array) -> jax.Array:
    """Adds each term to the sum in its slot; a slot behind the last drops it."""

    def add(sums: jax.Array, terms: jax.Array) -> jax.Array:
        return sums.at[slots].add(terms, mode="drop")

    if jax.typeof(terms).sharding.mesh.explicit_axes:
        # A scatter has no rule for sharded terms under explicit axes: let XLA do it.
        replicated = jax.sharding.PartitionSpec(None)
        add = jax.sharding.auto_axes(add, out_sharding=replicated)
    return add(sums, terms)


def partition_of(params: PyTree, param_labels: ParamLabels) -> Partition:
    """Works out which entry of `params` belongs to which subset.

    Args:
      params: a pytree of arrays, or of anything with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one.

    Returns:
      The partition; its subsets are in the order in which their labels first appear,
      ascending within an array of labels.

    Raises:
      ValueError: labels without a leaf, a leaf without a label, an array of labels that
        does not broadcast to its leaf, or nothing but frozen entries.
      TypeError: a label of another type, or a parameter that is not a real float.
    """
    leaves = jax.tree.leaves(jax.eval_shape(lambda tree: tree, params))
    paths = _leaf_keys(params)
    with jax.ensure_compile_time_eval():  # label functions may use jnp under a jit
        labels = param_labels(params) if callable(param_labels) else param_labels
        by_leaf = [
            _checked_label(label, leaf, "/".join(path) or ROOT)
            for label, leaf, path in zip(
                _labels_of_leaves(labels, paths), leaves, paths, strict=True
            )
        ]
    names: dict[str, str | int] = {}  # subset name -> its label
    owners = _owners(by_leaf, paths)
    number_of = functools.cache(functools.partial(_enter, names=names, owners=owners))
    numbers = tuple(_number(label, number_of) for label in by_leaf)
    if not names:
        raise ValueError(
            "param_labels: the partition is empty: params has "
            + ("only frozen leaves." if leaves else "no leaves.")
        )
    dtypes = [
        leaf.dtype
        for leaf, label in zip(leaves, numbers, strict=True)
        if np.any(label != FROZEN)
    ]
    dtype = functools.reduce(jnp.promote_types, dtypes, np.dtype(np.float32))
    return Partition(tuple(names), numbers, dtype)


def subset_names(
    params: PyTree, param_labels: ParamLabels = per_tensor
) -> tuple[str, ...]:
    """The names of the subsets, in the order of every axis of a summary.

    A label that is a string or an integer is the name itself. A label that occurs only
    inside arrays of labels of one leaf is named after the leaf, "path[label]".

    Args:
      params: a pytree of arrays, or of anything with a shape and a dtype.
      param_labels: a prefix pytree of labels, or a function from params to one.

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


def is_placeholder(params: PyTree) -> bool:
    """Whether :func:`optax.tree.map_params` initialises, to see what is like params.

    It puts one leaf of a class of its own, which optax does not make public, in the
    place of all parameters; no partition can be made of that.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def leaf_names(params: PyTree) -> list[str]:
    """The key paths of the leaves as text, "dense/kernel"."""
    return ["/".join(keys) or ROOT for keys in _leaf_keys(params)]


def _leaf_keys(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, ...]]:
    """The keys of the path of each leaf, as text.

    The paths of an `nnx.State` (and of linen's boxed parameters) end in the attribute
    `value` in some places and not in others, so that one is left out wherever it is an
    only child.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [path for path, _ in flat]
    leaves_below = collections.Counter(
        path[:n] for path in paths for n in range(len(path))
    )

    def keys(path: tuple) -> tuple[str, ...]:
        boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
        if boxed and leaves_below[path[:-1]] == 1:
            path = path[:-1]
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    return [keys(path) for path in paths]


def _labels_of_leaves(labels: PyTree, paths: list[tuple[str, ...]]) -> list[Any]:
    """For each leaf the label whose path is a prefix of the leaf's own."""

    def is_none(x: Any) -> bool:
        return x is None

    flat = jax.tree.leaves(labels, is_leaf=is_none)
    labelled = dict(zip(_leaf_keys(labels, is_none), flat, strict=True))
    unused = set(labelled)
    found = []
    for path in paths:
        prefixes = [path[:n] for n in range(len(path) + 1) if path[:n] in labelled]
        if not prefixes:
            raise ValueError(
                f"param_labels: the leaf {'/'.join(path) or ROOT!r} of params has no "
                "label; use partitions.FROZEN to leave it out."
            )
        unused.discard(prefixes[0])
        found.append(labelled[prefixes[0]])
    if unused:
        raise ValueError(
            f"param_labels: {_listing('/'.join(path) for path in sorted(unused))} "
            "matches no leaf of params; the leaves are "
            f"{_listing('/'.join(path) or ROOT for path in paths)}."
        )
    return found


def _checked_label(label: Any, leaf: jax.ShapeDtypeStruct, name: str) -> Label:
    """The label as a string, an int, or an int array of the leaf's shape."""
    if isinstance(label, str):
        result: Label = label
    elif isinstance(label, jax.core.Tracer):
        raise TypeError(
            f"param_labels: the labels of leaf {name!r} are traced, but a partition is "
            "worked out before anything runs; make them with numpy, from shapes alone."
        )
    elif _is_integer(label) and np.ndim(label) == 0:
        result = int(label)
    elif _is_integer(label):
        try:
            result = np.broadcast_to(np.asarray(label), leaf.shape)
        except ValueError:
            raise ValueError(
                f"param_labels: the labels of leaf {name!r} have shape {label.shape}, "
                f"which does not broadcast to the leaf's {leaf.shape}."
            ) from None
    else:
        kind = getattr(label, "dtype", type(label).__name__)
        raise TypeError(
            f"param_labels: the label of leaf {name!r} must be a string, an integer or "
            f"an array of integers, got {kind}."
        )
    frozen = not isinstance(result, str) and np.all(result == FROZEN)
    if not frozen and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"params: the leaf {name!r} has dtype {leaf.dtype}; only real floating-"
            "point leaves can be trained. Label it partitions.FROZEN, or split "
            "a complex leaf into its real and imaginary parts."
        )
    return result


def _is_integer(label: Any) -> bool:
    return (isinstance(label, int) and not isinstance(label, bool)) or (
        isinstance(label, np.integer | np.ndarray | jax.Array)
        and np.issubdtype(label.dtype, np.integer)
    )


def _owners(
    by_leaf: Sequence[Label], paths: Sequence[tuple[str, ...]]
) -> dict[int, str]:
    """The integer labels that occur only inside one leaf, and the name of that leaf."""
    owners: dict[int, set[str]] = {}
    whole_leaf = {label for label in by_leaf if isinstance(label, int)}
    for label, path in zip(by_leaf, paths, strict=True):
        if isinstance(label, np.ndarray):
            for x in np.unique(label).tolist():
                owners.setdefault(x, set()).add("/".join(path) or ROOT)
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


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
