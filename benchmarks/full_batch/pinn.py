"""Physics-informed neural networks: an equation, its points, and the objective."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.full_batch.objective import (
    Objective,
    PyTree,
    cast,
    dtype_of,
    from_residuals,
    mlp,
    mlp_init,
    relative_l2,
    stacked,
)

__all__ = ["Equation", "as_objective", "boundary", "taylor", "uniform"]

Function = Callable[..., jax.Array]  # of one array (n,) per coordinate
Points = tuple[np.ndarray, ...]  # one array (n,) per coordinate


class Equation(NamedTuple):
    """A differential equation with its conditions, and its true solution.

    Attributes:
      bounds: the interval of each coordinate.
      blocks: ``blocks(u, dtype, coefficients)``, pairs of a weight and a vector of
        residuals, which are zero for the true solution; u is any function of the
        coordinates that jax can differentiate.
      truth: coordinates and values of the true solution.
      hidden: the widths of the hidden layers of the network.
      coefficients: initial values of unknown coefficients of the equation.
      periodic: whether the first coordinate is periodic; the network then receives its
        cosine and sine.
    """

    bounds: Sequence[tuple[float, float]]
    blocks: Callable[[Function, Any, PyTree], Sequence[tuple[float, jax.Array]]]
    truth: tuple[Points, np.ndarray]
    hidden: Sequence[int] = (32, 32, 32)
    coefficients: dict[str, float] = {}  # noqa: RUF012  read only
    periodic: bool = False


def as_objective(name: str, equation: Equation) -> Objective:
    """The objective of a network with tanh that takes the place of the solution."""
    inputs = len(equation.bounds) + equation.periodic

    def init(key: jax.Array, dtype: Any) -> PyTree:
        network = mlp_init(key, (inputs, *equation.hidden, 1), dtype)
        coefficients = {k: jnp.asarray(v, dtype) for k, v in given.items()}
        return {"network": network} | coefficients

    def solution(params: PyTree) -> Function:
        return lambda *coordinates: mlp(
            params["network"], _features(equation, coordinates), jnp.tanh
        )[:, 0]

    def residuals(params: PyTree) -> jax.Array:
        coefficients = {k: params[k] for k in given}
        u = solution(params)
        return stacked(equation.blocks(u, dtype_of(params), coefficients))

    def error(params: PyTree) -> jax.Array:
        points, values = cast(equation.truth, dtype_of(params))
        return relative_l2(solution(params)(*points), values)

    given = equation.coefficients
    return from_residuals(name, init, residuals, error)


def _features(equation: Equation, coordinates: Sequence[jax.Array]) -> jax.Array:
    """Coordinates scaled to [-1, 1]; (n, inputs)."""
    scaled = [
        (2 * z - (low + high)) / (high - low)
        for z, (low, high) in zip(coordinates, equation.bounds, strict=True)
    ]
    if equation.periodic:
        angle = math.pi * scaled[0]
        scaled = [jnp.cos(angle), jnp.sin(angle), *scaled[1:]]
    return jnp.stack(scaled, -1)


def taylor(
    u: Function, coordinates: Sequence[jax.Array], axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u and its first and second derivative along one coordinate, at all points."""
    before, after = coordinates[:axis], coordinates[axis + 1 :]
    one = jnp.ones_like(coordinates[axis])

    def first(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda z: u(*before, z, *after), (z,), (one,))

    (value, slope), (_, curvature) = jax.jvp(first, (coordinates[axis],), (one,))
    return value, slope, curvature


def uniform(
    rng: np.random.Generator, count: int, bounds: Sequence[tuple[float, float]]
) -> Points:
    """Uniformly distributed points inside of a box."""
    return tuple(rng.uniform(low, high, count) for low, high in bounds)


def boundary(
    rng: np.random.Generator, per_face: int, bounds: Sequence[tuple[float, float]]
) -> Points:
    """Uniformly distributed points on the faces of a box."""
    faces = []
    for axis, ends in enumerate(bounds):
        for end in ends:
            points = list(uniform(rng, per_face, bounds))
            points[axis] = np.full(per_face, end)
            faces.append(points)
    return tuple(np.concatenate(z) for z in zip(*faces, strict=True))
