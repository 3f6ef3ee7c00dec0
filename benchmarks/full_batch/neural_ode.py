"""A neural differential equation that is fitted to a spiral, solved with diffrax."""

from typing import Any

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
)

__all__ = ["objective", "spiral"]

STEPS = 40
TRAJECTORIES = 8
END = 2.0
RADIUS = 1.5
_MATRIX = np.array([[-0.1, 2.0], [-2.0, -0.1]])


def spiral(seed: int = 0) -> np.ndarray:
    """Trajectories of ``y' = A y^3``, as (1 + STEPS, TRAJECTORIES, 2), t in [0, END].

    The initial values are uniform on a ring. Twenty classical Runge-Kutta
    steps per saved value: the error is below 1e-7.
    """
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, TRAJECTORIES)
    radius = RADIUS * np.sqrt(rng.uniform(0.1, 1, TRAJECTORIES))
    y = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    inner = 20
    h = END / STEPS / inner
    saved = [y]
    for _ in range(STEPS):
        for _ in range(inner):
            y = _runge_kutta(y, h)
        saved.append(y)
    return np.stack(saved)


def _runge_kutta(y: np.ndarray, h: float) -> np.ndarray:
    def f(y: np.ndarray) -> np.ndarray:
        return y**3 @ _MATRIX

    a = f(y)
    b = f(y + h / 2 * a)
    c = f(y + h / 2 * b)
    return y + h / 6 * (a + 2 * b + 2 * c + f(y + h * c))


def objective(name: str = "neural_ode", seed: int = 0) -> Objective:
    """The network ``y' = MLP(y^3)`` of width 32; residuals are those of all values.

    Heun's method with constant steps, differentiated through its steps, so that forward
    and reverse mode work, and any of their compositions.
    """
    import diffrax

    values = spiral(seed)
    times = np.linspace(0.0, END, 1 + STEPS)

    def init(key: jax.Array, dtype: Any) -> PyTree:
        return mlp_init(key, (2, 32, 2), dtype)

    def solution(params: PyTree) -> jax.Array:
        y0, ts = cast((values[0], times), dtype_of(params))
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, params: mlp(params, y**3, jnp.tanh)),
            diffrax.Heun(),
            t0=ts[0],
            t1=ts[-1],
            dt0=None,
            y0=y0,
            args=params,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.StepTo(ts=ts),
            max_steps=STEPS,
            adjoint=diffrax.DirectAdjoint(),
        )
        return found.ys[1:]

    def residuals(params: PyTree) -> jax.Array:
        return (solution(params) - cast(values[1:], dtype_of(params))).ravel()

    def error(params: PyTree) -> jax.Array:
        return relative_l2(solution(params), cast(values[1:], dtype_of(params)))

    return from_residuals(name, init, residuals, error)
