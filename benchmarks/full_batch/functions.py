"""Test functions of unconstrained optimisation, split into several tensors.

From J. J. More, B. S. Garbow and K. E. Hillstrom, "Testing Unconstrained Optimization
Software", ACM TOMS 7 (1981). Each one is divided by its number of residuals; the
initial point is the standard one plus normal numbers of standard deviation 0.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.full_batch.objective import Objective, PyTree, from_residuals, normal

__all__ = ["FUNCTIONS", "SOLUTIONS", "objective"]

Residuals = Callable[[PyTree], list[jax.Array]]


def _rosenbrock(p: PyTree) -> list[jax.Array]:
    return [10 * (p["y"] - p["x"] ** 2), 1 - p["x"]]


def _chained_rosenbrock(p: PyTree) -> list[jax.Array]:
    """Variables alternate between the two leaves."""
    z = jnp.stack([p["even"], p["odd"]], -1).ravel()
    return [10 * (z[1:] - z[:-1] ** 2), 1 - z[:-1]]


def _powell_singular(p: PyTree) -> list[jax.Array]:
    """The Hessian is singular at the minimum."""
    a, b, c, d = p["a"], p["b"], p["c"], p["d"]
    root = np.sqrt([5, 10])
    return [a + 10 * b, root[0] * (c - d), (b - 2 * c) ** 2, root[1] * (a - d) ** 2]


def _beale(p: PyTree) -> list[jax.Array]:
    return [
        y - p["x"] * (1 - p["y"] ** i)
        for i, y in enumerate((1.5, 2.25, 2.625), start=1)
    ]


def _wood(p: PyTree) -> list[jax.Array]:
    a, b, c, d = p["a"], p["b"], p["c"], p["d"]
    return [
        10 * (b - a**2),
        1 - a,
        90**0.5 * (d - c**2),
        1 - c,
        10**0.5 * (b + d - 2),
        (b - d) / 10**0.5,
    ]


_Spec = tuple[Residuals, dict[str, float], tuple[int, ...]]

FUNCTIONS: dict[str, _Spec] = {
    "rosenbrock": (_rosenbrock, {"x": -1.2, "y": 1.0}, ()),
    "chained_rosenbrock": (_chained_rosenbrock, {"even": -1.2, "odd": 1.0}, (25,)),
    "powell_singular": (
        _powell_singular,
        {"a": 3.0, "b": -1.0, "c": 0.0, "d": 1.0},
        (25,),
    ),
    "beale": (_beale, {"x": 1.0, "y": 1.0}, ()),
    "wood": (_wood, {"a": -3.0, "b": -1.0, "c": -3.0, "d": -1.0}, ()),
}
"""Residuals, the initial value of each leaf, and the shape of the leaves."""

SOLUTIONS: dict[str, dict[str, float]] = {
    "rosenbrock": {"x": 1.0, "y": 1.0},
    "chained_rosenbrock": {"even": 1.0, "odd": 1.0},
    "powell_singular": {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0},
    "beale": {"x": 3.0, "y": 0.5},
    "wood": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0},
}
"""The minimum of each function, where all residuals are zero."""


def objective(name: str, seed: int = 0) -> Objective:
    """One of `FUNCTIONS`; the seed is not used."""
    function, start, shape = FUNCTIONS[name]

    def init(key: jax.Array, dtype: Any) -> PyTree:
        keys = jax.random.split(key, len(start))
        return {
            leaf: value + 0.1 * normal(k, shape, dtype)
            for k, (leaf, value) in zip(keys, start.items(), strict=True)
        }

    def residuals(params: PyTree) -> jax.Array:
        return jnp.concatenate([jnp.ravel(r) for r in function(params)])

    return from_residuals(name, init, residuals)
