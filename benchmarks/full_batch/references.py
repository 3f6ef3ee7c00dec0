"""Solutions of the evolution equations, computed with numpy in float64."""

import functools

import numpy as np

__all__ = ["ALLEN_CAHN_DIFFUSIVITY", "BURGERS_VISCOSITY", "allen_cahn", "burgers"]

BURGERS_VISCOSITY = 0.01 / np.pi
ALLEN_CAHN_DIFFUSIVITY = 1e-4


def burgers(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    r"""The solution of Burgers' equation with ``u(x, 0) = -sin(pi x)``, on [-1, 1].

    By the transformation of Cole and Hopf,

        u(x, t) = -E[sin(pi y) f(y)] / E[f(y)],   y = x - sqrt(4 nu t) z,

    with ``f(y) = exp(-cos(pi y) / (2 pi nu))`` and the weight ``exp(-z^2)``. The
    trapezoidal rule converges exponentially. ``f`` varies by the factor
    ``exp(100)``, hence the range of z.

    Args:
      x, t: coordinates, of one shape.

    Returns:
      The solution, of the same shape.
    """
    z = np.linspace(-13, 13, 801)
    y = x[..., None] - np.sqrt(4 * BURGERS_VISCOSITY * t)[..., None] * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * BURGERS_VISCOSITY) - z**2
    weight = np.exp(exponent - exponent.max(-1, keepdims=True))
    return -np.sum(np.sin(np.pi * y) * weight, -1) / np.sum(weight, -1)


@functools.cache
def allen_cahn(
    points: int = 1024, steps: int = 2000, saved: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""The solution of the Allen-Cahn equation, periodic on [-1, 1], for t in [0, 1].

        u_t = 1e-4 u_xx + 5 u - 5 u^3,   u(x, 0) = x^2 cos(pi x)

    Strang's splitting: the diffusion is solved exactly by Fourier transforms, the
    reaction by its closed form, ``u^2 -> u^2 / (u^2 + (1 - u^2) exp(-10 t))``.

    Args:
      points: the number of points of the periodic grid.
      steps: the number of time steps; the error is proportional to its square.
      saved: the number of times at which the solution is returned, besides t = 0.

    Returns:
      ``x (points,)``, ``t (1 + saved,)`` and ``u (1 + saved, points)``.
    """
    x = -1 + 2 * np.arange(points) / points
    wave_number = 2 * np.pi * np.fft.rfftfreq(points, 2 / points)
    half = np.exp(-ALLEN_CAHN_DIFFUSIVITY * wave_number**2 / (2 * steps))
    decay = np.exp(-10 / steps)
    u = x**2 * np.cos(np.pi * x)
    solution = [u]
    for i in range(1, steps + 1):
        u = np.fft.irfft(half * np.fft.rfft(u), points)
        u = u / np.sqrt(u**2 + (1 - u**2) * decay)
        u = np.fft.irfft(half * np.fft.rfft(u), points)
        if i % (steps // saved) == 0:
            solution.append(u)
    return x, np.linspace(0, 1, 1 + saved), np.stack(solution)
