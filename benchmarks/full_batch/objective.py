"""The type of a full-batch problem, and the pieces that several problems share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "Objective",
    "PyTree",
    "cast",
    "dtype_of",
    "from_residuals",
    "mlp",
    "mlp_init",
    "normal",
    "relative_l2",
    "stacked",
]

PyTree = Any


class Objective(NamedTuple):
    """A deterministic loss of a dictionary of parameters.

    All functions compute in the dtype of the parameters, float32 or float64, and can
    be jitted.

    Attributes:
      name: as on the command line.
      init: ``init(key, dtype)``, the initial parameters. The random numbers of both
        dtypes are the same up to rounding.
      loss: ``loss(params)``, a scalar.
      residuals: ``residuals(params)``, a vector whose mean of squares is the loss; None
        if the loss is no mean of squares.
      error: ``error(params)``, the relative L2 error of the computed solution; None if
        there is no true solution.
      minimum: a lower bound of the loss, or its minimum if known. Reports show the
        difference.
    """

    name: str
    init: Callable[[jax.Array, Any], PyTree]
    loss: Callable[[PyTree], jax.Array]
    residuals: Callable[[PyTree], jax.Array] | None = None
    error: Callable[[PyTree], jax.Array] | None = None
    minimum: float = 0.0


def from_residuals(
    name: str,
    init: Callable[[jax.Array, Any], PyTree],
    residuals: Callable[[PyTree], jax.Array],
    error: Callable[[PyTree], jax.Array] | None = None,
) -> Objective:
    """The objective whose loss is the mean of squares of the residuals."""

    def loss(params: PyTree) -> jax.Array:
        return jnp.mean(residuals(params) ** 2)

    return Objective(name, init, loss, residuals, error)


def dtype_of(params: PyTree) -> Any:
    """The dtype of the first leaf, which is that of all."""
    return jax.tree.leaves(params)[0].dtype


def cast(data: Any, dtype: Any) -> Any:
    """Arrays of a pytree as jax arrays of a dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), data)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normal numbers, the same for both dtypes up to rounding."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def stacked(blocks: Sequence[tuple[float, jax.Array]]) -> jax.Array:
    """A vector whose mean of squares is ``sum_i weight_i * mean(residual_i ** 2)``."""
    total = sum(r.size for _, r in blocks)
    return jnp.concatenate([math.sqrt(w * total / r.size) * r for w, r in blocks])


def relative_l2(computed: jax.Array, true: jax.Array) -> jax.Array:
    """The norm of the difference, divided by that of the true values."""
    return jnp.linalg.norm(computed - true) / jnp.linalg.norm(true)


def mlp_init(key: jax.Array, sizes: Sequence[int], dtype: Any) -> PyTree:
    """Kernels with Glorot's normal initialisation, and biases of zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {
            "kernel": normal(k, (m, n), dtype) * math.sqrt(2 / (m + n)),
            "bias": jnp.zeros(n, dtype),
        }
        for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def mlp(
    params: PyTree, x: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """A multilayer perceptron whose last layer is linear; x is (n, inputs)."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        if i < len(params) - 1:
            x = activation(x)
    return x
