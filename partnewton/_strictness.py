"""Dtype and rank promotion when the strict modes of jax are enabled."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["at_least_float32", "permissive"]


@contextlib.contextmanager
def permissive() -> Iterator[None]:
    """Enable the default promotion of ranks and dtypes.

    Transformations of optax multiply integers by floats and fail under
    ``jax_numpy_dtype_promotion="strict"``.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def at_least_float32(*dtypes: Any) -> np.dtype:
    """The dtype in which arrays of these dtypes are summed: float32 or wider."""
    with permissive():
        return functools.reduce(jnp.promote_types, dtypes, np.dtype(np.float32))
