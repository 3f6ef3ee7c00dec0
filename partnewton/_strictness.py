"""What the strict modes of jax would refuse without need."""

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
    """Promotes ranks and dtypes as usual, for transformations that rely on that.

    Those of optax, which multiply integers by floats, fail otherwise under
    ``jax_numpy_dtype_promotion="strict"``.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def at_least_float32(*dtypes: Any) -> np.dtype:
    """The dtype in which numbers of these dtypes are accumulated."""
    with permissive():
        return functools.reduce(jnp.promote_types, dtypes, np.dtype(np.float32))
