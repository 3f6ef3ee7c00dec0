"""Elliptic equations with known solutions: Poisson and Helmholtz."""

import jax.numpy as jnp
import numpy as np

from benchmarks.full_batch.objective import Objective, cast
from benchmarks.full_batch.pinn import (
    Equation,
    Points,
    as_objective,
    boundary,
    taylor,
    uniform,
)

__all__ = ["EQUATIONS", "helmholtz_2d", "poisson_1d", "poisson_2d"]

PI = np.pi


def poisson_1d(seed: int = 0) -> Equation:
    """``u'' = f`` on [0, 1]; ``u = sin(2 pi x) + 0.1 sin(10 pi x)``, two scales."""
    bounds = [(0.0, 1.0)]
    (inside,) = uniform(np.random.default_rng(seed), 400, bounds)
    ends = np.array([0.0, 1.0])

    def blocks(u, dtype, coefficients):
        x, end = cast((inside, ends), dtype)
        f = -4 * PI**2 * (jnp.sin(2 * PI * x) + 2.5 * jnp.sin(10 * PI * x))
        return [(1.0, taylor(u, (x,), 0)[2] - f), (100.0, u(end))]

    x = np.linspace(0, 1, 1001)
    truth = np.sin(2 * PI * x) + 0.1 * np.sin(10 * PI * x)
    return Equation(bounds, blocks, ((x,), truth), (32, 32, 32))


def poisson_2d(seed: int = 0) -> Equation:
    """``u_xx + u_yy = f`` on the unit square; ``u = sin(pi x) sin(pi y)``."""
    return _on_a_rectangle(seed, (0.0, 1.0), (PI, PI), 0.0, 600, 30, (32, 32))


def helmholtz_2d(seed: int = 0) -> Equation:
    """``u_xx + u_yy + u = f`` on [-1, 1]^2; ``u = sin(pi x) sin(4 pi y)``."""
    return _on_a_rectangle(seed, (-1.0, 1.0), (PI, 4 * PI), 1.0, 600, 30, (24,) * 4)


EQUATIONS = {
    "poisson_1d": poisson_1d,
    "poisson_2d": poisson_2d,
    "helmholtz_2d": helmholtz_2d,
}


def objective(name: str, seed: int) -> Objective:
    """The network for one of `EQUATIONS`; the seed is that of the points."""
    return as_objective(name, EQUATIONS[name](seed))


def _on_a_rectangle(
    seed: int,
    interval: tuple[float, float],
    frequencies: tuple[float, float],
    shift: float,
    count: int,
    per_face: int,
    hidden: tuple[int, ...],
) -> Equation:
    """``u_xx + u_yy + shift u = f``, u = 0 on the boundary."""
    bounds = [interval, interval]
    rng = np.random.default_rng(seed)
    inside = uniform(rng, count, bounds)
    on_boundary = boundary(rng, per_face, bounds)
    a, b = frequencies

    def blocks(u, dtype, coefficients):
        points, edge = cast((inside, on_boundary), dtype)
        value, _, u_xx = taylor(u, points, 0)
        u_yy = taylor(u, points, 1)[2]
        f = (shift - a**2 - b**2) * jnp.sin(a * points[0]) * jnp.sin(b * points[1])
        return [(1.0, u_xx + u_yy + shift * value - f), (100.0, u(*edge))]

    points = _grid(interval, 51)
    truth = np.sin(a * points[0]) * np.sin(b * points[1])
    return Equation(bounds, blocks, (points, truth), hidden)


def _grid(interval: tuple[float, float], count: int) -> Points:
    line = np.linspace(*interval, count)
    return tuple(z.ravel() for z in np.meshgrid(line, line, indexing="ij"))
