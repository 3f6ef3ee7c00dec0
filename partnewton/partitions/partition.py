"""A partition of the entries of some arrays, and operations per subset."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._strictness import permissive
from partnewton.engines import compat

FROZEN = -1
"""The label of entries that are not trained: their updates are zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """A partition of the entries of some leaves into S nonempty subsets.

    Attributes:
      names: the names of the S subsets, in the order of every axis of length S.
      labels: for each leaf the index of its subset, or an array with the index of the
        subset of each entry; FROZEN for entries in no subset and for empty leaves.
      dtype: the dtype of sums over a subset: float32, or float64 if an active leaf has
        it.
    """

    names: tuple[str, ...]
    labels: tuple[int | np.ndarray, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of subsets S."""
        return len(self.names)

    @functools.cached_property
    def active(self) -> tuple[int, ...]:
        """The indices of the leaves with at least one entry in a subset."""
        return tuple(i for i, label in enumerate(self.labels) if not is_frozen(label))

    def of_active(self) -> "Partition":
        """The partition of the active leaves."""
        labels = tuple(self.labels[i] for i in self.active)
        return dataclasses.replace(self, labels=labels)

    def take_active(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves at the indices `active`."""
        return [leaves[i] for i in self.active]

    def put_active(self, leaves: Sequence[Any], active: Sequence[Any]) -> list[Any]:
        """The leaves, with those at the indices `active` replaced."""
        result = list(leaves)
        for i, leaf in zip(self.active, active, strict=True):
            result[i] = leaf
        return result

    def restrict(self, leaves: Sequence[jax.Array], s: jax.typing.ArrayLike) -> list:
        """The leaves with zeros outside of subset `s`, which may be traced."""
        return [
            jnp.where(sharded_like(x, label == s), x, jnp.zeros_like(x))
            for x, label in zip(leaves, self.labels, strict=True)
        ]

    def inner(self, xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
        """The inner product <x, y> on each subset, (S,)."""
        # Not a dot product, which may round its operands (TF32, bfloat16).
        return self._reduced(lambda x, y: x * y, jnp.sum, "add", xs, ys)

    def largest(self, xs: Sequence[jax.Array]) -> jax.Array:
        """The largest absolute value on each subset, or NaN, (S,)."""
        return self._reduced(jnp.abs, jnp.max, "max", xs)

    def _reduced(
        self,
        function: Callable[..., jax.Array],
        reduction: Callable[[jax.Array], jax.Array],
        operation: str,
        *columns: Sequence[jax.Array],
    ) -> jax.Array:
        """A function of each entry, reduced over each subset, starting with 0, (S,).

        Args:
          function: of an array of each column.
          reduction: of all entries of an array.
          operation: the same for two numbers, "add" or "max".
          columns: lists with an array per leaf.
        """
        whole, whole_labels = [], []
        result = jnp.zeros(self.size, self.dtype)
        for *arrays, label in zip(*columns, self.labels, strict=True):
            if is_frozen(label):
                continue
            terms = function(*(x.astype(self.dtype) for x in arrays))
            if isinstance(label, np.ndarray):
                slots = np.where(label == FROZEN, self.size, label)
                result = _reduce_at(result, slots, terms, operation)
            else:
                whole.append(reduction(terms))
                whole_labels.append(label)
        if whole:
            at = result.at[np.array(whole_labels)]
            result = getattr(at, operation)(jnp.stack(whole))
        return result

    def counts(self, leaves: Sequence[jax.Array]) -> np.ndarray:
        """The number of entries of each subset, (S,)."""
        result = np.zeros(self.size + 1, int)  # FROZEN = -1 is the last one
        for x, label in zip(leaves, self.labels, strict=True):
            if isinstance(label, np.ndarray):
                np.add.at(result, label, 1)
            else:
                result[label] += np.size(x)
        return result[:-1]

    def broadcast_to_leaves(self, values: jax.Array) -> list[jax.Array]:
        """For each leaf, the value of its subset (), or of each entry's subset."""

        def broadcast(values: jax.Array) -> list[jax.Array]:
            padded = jnp.append(values, jnp.zeros(1, values.dtype))  # FROZEN = -1
            return [padded[label] for label in self.labels]

        # Not inlined: kernels that read a scalar, instead of an element of a vector,
        # are equal for leaves of equal shapes, and XLA compiles equal kernels once.
        return compat.as_call(broadcast)(values)

    def take(self, tree: Any) -> Any:
        """The tree with None in place of frozen leaves and zeros at frozen entries."""
        leaves, treedef = jax.tree.flatten(tree)
        active = [
            None if is_frozen(label) else jnp.asarray(x)
            for x, label in zip(leaves, self.labels, strict=True)
        ]
        return jax.tree.unflatten(treedef, self.without_frozen(active))

    def put(self, tree: Any, active: Any) -> Any:
        """The inverse of `take`, with zeros for the frozen leaves of `tree`."""
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
        """The updates, each entry multiplied by the value of its subset.

        Frozen entries become zero, whatever they were. Frozen leaves are not read and
        may have the dtype `float0`.

        Args:
          updates: one array per leaf, of the shape of the leaf.
          values: the factor of each subset, (S,).
          params: the leaves of the parameters, which determine the dtypes of the
            result; by default the updates do.
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
        """``params + steps`` in the dtypes of `params`, with frozen leaves unchanged.

        Args:
          params: the parameters.
          steps: a tree like `params`; at frozen leaves anything, or None.
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
        """The leaves with zeros at frozen entries of active leaves."""
        return [
            jnp.where(sharded_like(x, label == FROZEN), jnp.zeros_like(x), x)
            if isinstance(label, np.ndarray) and np.any(label == FROZEN)
            else x
            for x, label in zip(leaves, self.labels, strict=True)
        ]


def is_frozen(label: int | np.ndarray) -> bool:
    """Whether all entries of a leaf with this label are frozen."""
    return not isinstance(label, np.ndarray) and label == FROZEN


def zeros_of_frozen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """The update of a frozen leaf: zeros of its dtype, or float32 for random keys.

    Later transformations of a chain would fail on an update of dtype `float0`.
    """
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
        return jnp.zeros(np.shape(leaf), jnp.float32)
    return jnp.zeros_like(leaf)


def sharded_like(x: jax.Array, array: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """`array`, of the shape of `x` or (), sharded like `x` on explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    if np.ndim(array) == 0 or not sharding.mesh.explicit_axes:
        return array
    return jax.sharding.reshard(array, sharding.spec)


def gathered(x: jax.Array) -> jax.Array:
    """`x`, replicated on explicit mesh axes."""
    if not jax.typeof(x).sharding.mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, jax.P())


def _reduce_at(
    results: jax.Array, slots: np.ndarray, terms: jax.Array, operation: str
) -> jax.Array:
    """Combine each term with the result at its slot, unless the slot is out of range.

    Args:
      results: (S,).
      slots: of the shape of `terms`.
      terms: what is added, or compared.
      operation: "add" or "max".
    """

    def reduce(results: jax.Array, terms: jax.Array) -> jax.Array:
        return getattr(results.at[slots], operation)(terms, mode="drop")

    if jax.typeof(terms).sharding.mesh.explicit_axes:
        # jax has no sharding rule for this scatter on explicit axes; XLA has.
        replicated = jax.sharding.PartitionSpec(None)
        reduce = jax.sharding.auto_axes(reduce, out_sharding=replicated)
    return reduce(results, terms)
