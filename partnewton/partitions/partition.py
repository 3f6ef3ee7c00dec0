"""Which entry is in which subset, as numbers; and what is done to each subset."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._strictness import permissive
from partnewton.engines import versions

FROZEN = -1
"""The label of entries that stay as they are: their update is zero, at no cost."""


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """A split of the entries of some leaves into S subsets, none of which is empty.

    Attributes:
      names: the S names of the subsets, in the order of every axis of length S.
      labels: for each leaf the number of its subset, or an array of its shape of such
        numbers; FROZEN for what is in none, leaves without entries among them.
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
        return tuple(i for i, label in enumerate(self.labels) if not is_frozen(label))

    def of_active(self) -> "Partition":
        """The same partition of the active leaves alone."""
        labels = tuple(self.labels[i] for i in self.active)
        return dataclasses.replace(self, labels=labels)

    def restrict(self, leaves: Sequence[jax.Array], s: jax.typing.ArrayLike) -> list:
        """The leaves on subset `s`, zero elsewhere; `s` may be traced."""
        return [
            jnp.where(sharded_like(x, label == s), x, jnp.zeros_like(x))
            for x, label in zip(leaves, self.labels, strict=True)
        ]

    part = restrict  # the engines' name for it

    def inner(self, xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
        """The inner products <x, y> on each subset, (S,)."""
        whole_sums, whole_labels = [], []
        result = jnp.zeros(self.size, self.dtype)
        for x, y, label in zip(xs, ys, self.labels, strict=True):
            if is_frozen(label):
                continue
            # A product and a sum, not a dot: a dot may round its inputs (TF32, bf16).
            product = x.astype(self.dtype) * y.astype(self.dtype)
            if isinstance(label, np.ndarray):
                slots = np.where(label == FROZEN, self.size, label)
                result = _add_at(result, slots, product)
            else:
                whole_sums.append(jnp.sum(product))
                whole_labels.append(label)
        if whole_sums:
            result = result.at[np.array(whole_labels)].add(jnp.stack(whole_sums))
        return result

    def counts(self, leaves: Sequence[jax.Array]) -> np.ndarray:
        """How many entries each subset has, (S,); never zero."""
        result = np.zeros(self.size + 1, int)  # FROZEN = -1: the last
        for x, label in zip(leaves, self.labels, strict=True):
            if isinstance(label, np.ndarray):
                np.add.at(result, label, 1)
            else:
                result[label] += np.size(x)
        return result[:-1]

    def broadcast_to_leaves(self, values: jax.Array) -> list[jax.Array]:
        """`values` (S,) at the entries of each leaf: () or the leaf's shape."""

        def broadcast(values: jax.Array) -> list[jax.Array]:
            padded = jnp.append(values, jnp.zeros(1, values.dtype))  # FROZEN = -1
            return [padded[label] for label in self.labels]

        # By itself: kernels that read scalars, and no place in a vector, are equal for
        # leaves of equal shapes, and equal kernels are compiled once.
        return versions.apart(broadcast)(values)

    def take(self, tree: Any) -> Any:
        """A tree like the parameters with None in the place of frozen leaves.

        Entries that are frozen inside a leaf are zero.
        """
        leaves, treedef = jax.tree.flatten(tree)
        active = [
            None if is_frozen(label) else jnp.asarray(x)
            for x, label in zip(leaves, self.labels, strict=True)
        ]
        return jax.tree.unflatten(treedef, self.without_frozen(active))

    def put(self, tree: Any, active: Any) -> Any:
        """The reverse of `take`; `tree` tells the types of frozen leaves, now zeros."""
        leaves, treedef = jax.tree.flatten(tree)
        filled = [
            zeros_of_frozen(x) if is_frozen(label) else y
            for x, y, label in zip(
                leaves, treedef.flatten_up_to(active), self.labels, strict=True
            )
        ]
        return jax.tree.unflatten(treedef, filled)

    def scaled(
        self,
        updates: Sequence[jax.Array],
        values: jax.Array,
        params: Sequence[jax.Array] | None = None,
    ) -> list[jax.Array]:
        """The updates times `values` (S,), each entry by that of its subset.

        Frozen entries become zero, whatever they were. A leaf that is frozen altogether
        is not looked at: it may be `float0`, as jax makes gradients of integers.

        Args:
          updates: one array a leaf, of the shape of the leaf.
          values: what each subset is multiplied by.
          params: the leaves of the parameters, whose dtypes the result gets; by default
            it keeps those of the updates, and of frozen leaves everything.
        """
        scaled = []
        likes = updates if params is None else params
        columns = updates, likes, self.broadcast_to_leaves(values), self.labels
        for u, like, value, label in zip(*columns, strict=True):
            if is_frozen(label):
                scaled.append(zeros_of_frozen(like))
                continue
            with permissive():  # float32 times bfloat16
                product = sharded_like(like, value) * u
            if isinstance(label, np.ndarray):
                frozen = sharded_like(like, label == FROZEN)
                product = jnp.where(frozen, 0, product)
            scaled.append(product.astype(jnp.result_type(like)))
        return scaled

    def moved(self, params: Any, steps: Any) -> Any:
        """``params + steps`` in the dtypes of `params`; frozen leaves as they are.

        Args:
          params: the parameters.
          steps: a tree like them, with anything or None in the place of frozen leaves.
        """
        leaves, treedef = jax.tree.flatten(params)
        moved = [
            p if is_frozen(label) else (p + step).astype(jnp.result_type(p))
            for p, step, label in zip(
                leaves, treedef.flatten_up_to(steps), self.labels, strict=True
            )
        ]
        return jax.tree.unflatten(treedef, moved)

    def without_frozen(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves, zero at entries that are frozen inside a leaf."""
        return [
            jnp.where(sharded_like(x, label == FROZEN), jnp.zeros_like(x), x)
            if isinstance(label, np.ndarray) and np.any(label == FROZEN)
            else x
            for x, label in zip(leaves, self.labels, strict=True)
        ]


def is_frozen(label: int | np.ndarray) -> bool:
    """Whether a leaf with this label is frozen altogether."""
    return not isinstance(label, np.ndarray) and label == FROZEN


def zeros_of_frozen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """The update of a frozen leaf: zeros of its dtype, or of float32 for random keys.

    They go through whatever follows in a chain; gradients of type `float0` would not.
    """
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
        return jnp.zeros(np.shape(leaf), jnp.float32)
    return jnp.zeros_like(leaf)


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
