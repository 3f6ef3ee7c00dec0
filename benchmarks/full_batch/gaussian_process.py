"""The marginal likelihood of a Gaussian process with one length scale per feature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from benchmarks.full_batch.objective import Objective, PyTree, cast, dtype_of, normal

__all__ = ["gaussian_process"]

JITTER = 1e-5
EXAMPLES = 150
MINIMUM = 1.15981907863555
"""By L-BFGS and Newton's method; the same from 12 initial points."""


def gaussian_process(name: str = "gaussian_process", seed: int = 0) -> Objective:
    """Minus the log marginal likelihood per example, of 150 rows of the diabetes data.

    A squared-exponential kernel; the logarithms of its length scales, its amplitude and
    the noise (standard deviations), and the mean, are the leaves. Features and targets
    are standardised. The data do not depend on the seed.

    The logarithms of the length scales have a normal prior of mean 1 and standard
    deviation 1. Without it, those of irrelevant features tend to infinity.
    """
    x, y = datasets.load_diabetes(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))[:EXAMPLES]
    x, y = x[rows], y[rows]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()

    def init(key: jax.Array, dtype: Any) -> PyTree:
        keys = jax.random.split(key, 3)
        return {
            "log_lengthscales": 1 + 0.3 * normal(keys[0], x.shape[1:], dtype),
            "log_amplitude": 0.3 * normal(keys[1], (), dtype),
            "log_noise": -1 + 0.3 * normal(keys[2], (), dtype),
            "mean": jnp.zeros((), dtype),
        }

    def loss(params: PyTree) -> jax.Array:
        inputs, targets = cast((x, y), dtype_of(params))
        scaled = inputs * jnp.exp(-params["log_lengthscales"])
        distance = jnp.sum((scaled[:, None] - scaled[None, :]) ** 2, -1)
        kernel = jnp.exp(2 * params["log_amplitude"] - distance / 2)
        noise = jnp.exp(2 * params["log_noise"]) + JITTER
        factor = jnp.linalg.cholesky(
            kernel + noise * jnp.eye(len(targets), dtype=distance.dtype)
        )
        whitened = jax.scipy.linalg.solve_triangular(
            factor, targets - params["mean"], lower=True
        )
        log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
        quadratic = jnp.sum(whitened**2)
        constant = len(targets) * jnp.log(2 * jnp.pi)
        prior = jnp.sum((params["log_lengthscales"] - 1) ** 2)
        total = quadratic + log_determinant + constant + prior
        return total / (2 * len(targets))

    return Objective(name, init, loss, minimum=MINIMUM)
