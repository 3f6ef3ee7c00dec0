"""Fits of networks to data: regression, a deep linear network, digits, an image."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from benchmarks.full_batch.objective import (
    Objective,
    PyTree,
    cast,
    dtype_of,
    from_residuals,
    mlp,
    mlp_init,
    normal,
    relative_l2,
)

__all__ = ["deep_linear", "digits_softmax", "regression", "siren"]

DIGITS_MINIMUM = 0.0886583848233073
"""By Newton's method, to a norm of the gradient of 4e-17."""


def regression(name: str = "regression", seed: int = 0) -> Objective:
    """100 examples of a random teacher, 3073 parameters: a minimum of zero.

    One hidden layer of 256 tanh; the teacher has 5.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(100, 10))
    hidden = np.tanh(x @ rng.normal(size=(10, 5)) / math.sqrt(10))
    y = hidden @ rng.normal(size=5)

    def init(key: jax.Array, dtype: Any) -> PyTree:
        return mlp_init(key, (10, 256, 1), dtype)

    def residuals(params: PyTree) -> jax.Array:
        inputs, targets = cast((x, y), dtype_of(params))
        return mlp(params, inputs, jnp.tanh)[:, 0] - targets

    return from_residuals(name, init, residuals)


def deep_linear(name: str = "deep_linear", seed: int = 0) -> Objective:
    """A product of 6 matrices of 16 x 16 that has to become a given matrix.

    The singular values of the latter go from 1 to 0.01.
    """
    width, depth = 16, 6
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(2))
    target = left @ np.diag(np.logspace(0, -2, width)) @ right

    def init(key: jax.Array, dtype: Any) -> PyTree:
        return {
            f"layer{i}": normal(k, (width, width), dtype) / math.sqrt(width)
            for i, k in enumerate(jax.random.split(key, depth))
        }

    def product(params: PyTree) -> jax.Array:
        out = params["layer0"]
        for i in range(1, depth):
            out = out @ params[f"layer{i}"]
        return out

    def residuals(params: PyTree) -> jax.Array:
        return (product(params) - cast(target, dtype_of(params))).ravel()

    def error(params: PyTree) -> jax.Array:
        return relative_l2(product(params), cast(target, dtype_of(params)))

    return from_residuals(name, init, residuals, error)


def digits_softmax(name: str = "digits_softmax", seed: int = 0) -> Objective:
    """Multinomial logistic regression of the digits with L2 1e-4, strictly convex.

    The data do not depend on the seed.
    """
    x, y = datasets.load_digits(return_X_y=True)
    x = x / 16

    def init(key: jax.Array, dtype: Any) -> PyTree:
        kernel = 0.1 * normal(key, (64, 10), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(10, dtype)}

    def loss(params: PyTree) -> jax.Array:
        logits = cast(x, dtype_of(params)) @ params["kernel"] + params["bias"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return entropy.mean() + 0.5e-4 * optax.tree.norm(params, squared=True)

    return Objective(name, init, loss, minimum=DIGITS_MINIMUM)


def siren(name: str = "siren", seed: int = 0) -> Objective:
    """An image of 32 x 32 pixels as the values of a network of sines.

    Grey values between -1 and 1 of the middle of scikit-learn's picture of a flower;
    3 hidden layers of 40 sines, the frequency of the first one is 30. The data do
    not depend on the seed.
    """
    pixels = datasets.load_sample_image("flower.jpg").mean(-1)
    pixels = pixels[50:370, 130:450].reshape(32, 10, 32, 10).mean((1, 3))
    pixels = (2 * (pixels - pixels.min()) / np.ptp(pixels) - 1).ravel()
    line = np.linspace(-1, 1, 32)
    grid = np.stack([z.ravel() for z in np.meshgrid(line, line, indexing="ij")], -1)
    sizes, frequency = (2, 40, 40, 40, 1), 30.0

    def init(key: jax.Array, dtype: Any) -> PyTree:
        params = {}
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        for i, (k, m, n) in enumerate(pairs):
            bound = 1 / m if i == 0 else math.sqrt(6 / m) / frequency
            kernel = jax.random.uniform(k, (m, n), jnp.float32, -bound, bound)
            params[f"layer{i}"] = {
                "kernel": kernel.astype(dtype),
                "bias": jnp.zeros(n, dtype),
            }
        return params

    def image(params: PyTree) -> jax.Array:
        inputs = cast(grid, dtype_of(params))
        return mlp(params, inputs, lambda z: jnp.sin(frequency * z))[:, 0]

    def residuals(params: PyTree) -> jax.Array:
        return image(params) - cast(pixels, dtype_of(params))

    def error(params: PyTree) -> jax.Array:
        return relative_l2(image(params), cast(pixels, dtype_of(params)))

    return from_residuals(name, init, residuals, error)
