"""Functions of pytrees that several modules use."""

from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines import compat

PyTree = Any


def all_finite(tree: PyTree) -> jax.Array:
    """Whether all entries of a tree of small arrays are finite."""

    def check(leaves: list[jax.Array]) -> jax.Array:
        finite = [jnp.ravel(jnp.isfinite(x)) for x in leaves]
        return jnp.all(jnp.concatenate([jnp.ones(1, bool), *finite]))

    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    # Not inlined: XLA would fuse the check into each kernel that reads the result.
    return compat.as_call(check)(numbers)


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds, else `old`, in the dtypes of `old`."""
    return jax.tree.map(
        lambda x, y: jnp.where(condition, jnp.asarray(x).astype(y.dtype), y), new, old
    )
