"""Evolution equations: Burgers, Allen-Cahn, and the heat equation's inverse problem."""

import jax.numpy as jnp
import numpy as np

from benchmarks.full_batch import references
from benchmarks.full_batch.objective import Objective, cast
from benchmarks.full_batch.pinn import Equation, Points, as_objective, taylor, uniform

__all__ = ["DIFFUSIVITY", "EQUATIONS", "allen_cahn", "burgers", "heat_inverse"]

PI = np.pi
DIFFUSIVITY = 0.1
"""The true coefficient of :func:`heat_inverse`."""


def burgers(seed: int = 0) -> Equation:
    """``u_t + u u_x = (0.01 / pi) u_xx``, which has a shock at x = 0.

    ``u(x, 0) = -sin(pi x)``, ``u(-1, t) = u(1, t) = 0``, t in [0, 1].
    """
    bounds = [(-1.0, 1.0), (0.0, 1.0)]
    rng = np.random.default_rng(seed)
    inside = uniform(rng, 1000, bounds)
    start = rng.uniform(-1, 1, 60)
    ends = np.repeat([-1.0, 1.0], 20), rng.uniform(0, 1, 40)

    def blocks(u, dtype, coefficients):
        points, x, edge = cast((inside, start, ends), dtype)
        value, u_x, u_xx = taylor(u, points, 0)
        u_t = taylor(u, points, 1)[1]
        return [
            (1.0, u_t + value * u_x - references.BURGERS_VISCOSITY * u_xx),
            (1.0, u(x, jnp.zeros_like(x)) + jnp.sin(PI * x)),
            (1.0, u(*edge)),
        ]

    points = _grid(np.linspace(-1, 1, 201), np.linspace(0, 1, 41))
    truth = references.burgers(*points)
    return Equation(bounds, blocks, (points, truth), (20,) * 4)


def allen_cahn(seed: int = 0) -> Equation:
    """``u_t = 1e-4 u_xx + 5 u - 5 u^3``, periodic, ``u(x, 0) = x^2 cos(pi x)``."""
    bounds = [(-1.0, 1.0), (0.0, 1.0)]
    rng = np.random.default_rng(seed)
    inside = uniform(rng, 800, bounds)
    start = rng.uniform(-1, 1, 80)

    def blocks(u, dtype, coefficients):
        points, x = cast((inside, start), dtype)
        value, _, u_xx = taylor(u, points, 0)
        u_t = taylor(u, points, 1)[1]
        diffusion = references.ALLEN_CAHN_DIFFUSIVITY * u_xx
        initial = u(x, jnp.zeros_like(x)) - x**2 * jnp.cos(PI * x)
        return [
            (1.0, u_t - diffusion - 5 * value * (1 - value**2)),
            (100.0, initial),
        ]

    x, t, values = references.allen_cahn()
    points = _grid(x[::8], t)
    truth = values.T[::8].ravel()
    return Equation(bounds, blocks, (points, truth), (24,) * 3, periodic=True)


def heat_inverse(seed: int = 0) -> Equation:
    """``u_t = kappa u_xx`` on [0, 1], with an unknown kappa and 50 observations of u.

    ``u = exp(-kappa pi^2 t) sin(pi x) + exp(-9 kappa pi^2 t) sin(3 pi x) / 2``,
    t in [0, 1]. The leaf ``log_diffusivity`` is the logarithm of kappa; it starts at
    0, the true one is ``log(0.1)``.
    """
    bounds = [(0.0, 1.0), (0.0, 1.0)]
    rng = np.random.default_rng(seed)
    inside = uniform(rng, 600, bounds)
    ends = np.repeat([0.0, 1.0], 20), rng.uniform(0, 1, 40)
    observed = uniform(rng, 50, bounds)
    observations = heat(*observed)

    def blocks(u, dtype, coefficients):
        points, edge, places, data = cast((inside, ends, observed, observations), dtype)
        u_xx, u_t = taylor(u, points, 0)[2], taylor(u, points, 1)[1]
        return [
            (1.0, u_t - jnp.exp(coefficients["log_diffusivity"]) * u_xx),
            (10.0, u(*edge)),
            (10.0, u(*places) - data),
        ]

    points = _grid(np.linspace(0, 1, 51), np.linspace(0, 1, 41))
    return Equation(
        bounds, blocks, (points, heat(*points)), (24,) * 3, {"log_diffusivity": 0.0}
    )


def heat(x, t, xp=np):
    """The true solution of :func:`heat_inverse`, with numpy or jax.numpy."""
    rate = DIFFUSIVITY * PI**2
    slow = xp.exp(-rate * t) * xp.sin(PI * x)
    return slow + 0.5 * xp.exp(-9 * rate * t) * xp.sin(3 * PI * x)


EQUATIONS = {"burgers": burgers, "allen_cahn": allen_cahn, "heat_inverse": heat_inverse}


def objective(name: str, seed: int) -> Objective:
    """The network for one of `EQUATIONS`; the seed is that of the points."""
    return as_objective(name, EQUATIONS[name](seed))


def _grid(x: np.ndarray, t: np.ndarray) -> Points:
    return tuple(z.ravel() for z in np.meshgrid(x, t, indexing="ij"))
