"""Small functions of pytrees that several modules use."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def all_finite(tree: PyTree) -> jax.Array:
    """Whether all numbers in a tree of small arrays are finite."""
    finite = [
        jnp.ravel(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return jnp.all(jnp.concatenate([jnp.ones(1, bool), *finite]))


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` or `old`, in the dtypes of `old`: a state never changes its types."""
    return jax.tree.map(
        lambda x, y: jnp.where(condition, jnp.asarray(x).astype(y.dtype), y), new, old
    )
