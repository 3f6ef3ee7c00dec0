"""Problems on which no default was tuned; they were written after `partition_newton`.

They differ from the others by their losses, pairs, counts, densities, heavy tails, soft
labels and margins, which are in this file, or by their networks, which are in
`problems_unseen_networks.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks import networks
from benchmarks.problems_base import Data, Problem, digits, huber, problem, split
from benchmarks.problems_unseen_networks import UNSEEN_NETWORKS

__all__ = ["UNSEEN"]

PyTree = Any

_problem = functools.partial(problem, steps=1500)


def _pairs() -> tuple[Data, Data]:
    """Pairs, and which one has the higher score, with noise."""
    rng = np.random.default_rng(13)
    x = rng.normal(size=(3500, 2, 14))
    score = np.tanh(x @ rng.normal(size=14) / 2) + 0.5 * x[..., 0] * x[..., 1]
    y = score[:, 0] - score[:, 1] + 0.5 * rng.logistic(size=3500) > 0
    return split(x, y.astype(int))


def _of_pairs(network: networks.Network) -> networks.Network:
    """The difference of the scores of a pair."""

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        return (network.apply(params, x[:, 0]) - network.apply(params, x[:, 1]))[:, 0]

    return networks.Network(network.init, apply)


def _logistic(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(outputs, y).mean()


def _wrong_sign(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs > 0) != y)


def _counts_with_zeros() -> tuple[Data, Data]:
    rng = np.random.default_rng(14)
    x = rng.normal(size=(3000, 10))
    rate = np.exp(0.5 * np.sin(2 * x[:, 0]) + 0.5 * x[:, 1])
    there = rng.random(3000) < 1 / (1 + np.exp(-2 * x[:, 2]))
    return split(x, (rng.poisson(rate) * there).astype(float))


def _zero_inflated(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Negative log-likelihood of a zero-inflated Poisson distribution."""
    there, log_rate = outputs[:, 0], outputs[:, 1]
    poisson = y * log_rate - jnp.exp(log_rate) - lax.lgamma(y + 1)
    poisson = poisson + jax.nn.log_sigmoid(there)
    zero = jnp.logaddexp(jax.nn.log_sigmoid(-there), poisson)
    return -jnp.mean(jnp.where(y == 0, zero, poisson))


def _heavy_tails() -> tuple[Data, Data]:
    rng = np.random.default_rng(18)
    x = rng.standard_t(3, size=(3500, 12))
    y = np.cos(x[:, :1]) * x[:, 1:2] + np.abs(x[:, 2:3])
    return split(x, y + 0.1 * x[:, 3:].sum(1, keepdims=True))


def _soft_labels() -> tuple[Data, Data]:
    """Digits with the probabilities of a nearest-centre classifier as labels."""
    (x, labels), (x_test, _) = digits()
    centres = np.stack([x[labels == n].mean(0) for n in range(10)])

    def soft(x: np.ndarray) -> np.ndarray:
        distances = np.sum((x[:, None] - centres) ** 2, -1)
        return np.asarray(jax.nn.softmax(-distances), np.float32)

    return (x, soft(x)), (x_test, soft(x_test))


def _divergence(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(y * (jnp.log(y + 1e-9) - jax.nn.log_softmax(outputs)), -1))


def _two_sides() -> tuple[Data, Data]:
    """Two classes, with a tenth of the labels wrong."""
    rng = np.random.default_rng(19)
    x = rng.normal(size=(2500, 16))
    y = np.sign(np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2])
    return split(x, np.where(rng.random(2500) < 0.1, -y, y))


def _hinge(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.hinge_loss(outputs[:, 0], y).mean()


def _mixed_densities() -> tuple[Data, Data]:
    """A relation that is not a function, with up to three values."""
    rng = np.random.default_rng(20)
    y = rng.uniform(0, 1, 3000)
    x = y + 0.3 * np.sin(2 * np.pi * y) + 0.05 * rng.normal(size=3000)
    return split(x[:, None], y)


def _mixture(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Negative log-likelihood of a mixture of five normal distributions, shifted."""
    logits, mean, log_width = jnp.split(outputs, 3, axis=-1)
    distance = (y[:, None] - mean) * jnp.exp(-log_width)
    parts = jax.nn.log_softmax(logits) - log_width - 0.5 * distance**2
    return 4 - jnp.mean(jax.nn.logsumexp(parts, -1))


_UNSEEN_LOSSES: dict[str, Callable[[str], Problem]] = {
    "ranking": _problem(
        _pairs,
        _of_pairs(networks.mlp([14, 48, 24, 1], jax.nn.relu)),
        _logistic,
        _wrong_sign,
    ),
    "zeros": _problem(
        _counts_with_zeros,
        networks.mlp([10, 40, 40, 2], jax.nn.softplus),
        _zero_inflated,
        batch=40,
    ),
    "heavy_tails": _problem(_heavy_tails, networks.residual(12, 40, 3, 1), huber),
    "distillation": _problem(
        _soft_labels,
        networks.mlp([64, 32, 32, 10], jax.nn.silu),
        _divergence,
        steps=1000,
    ),
    "hinge": _problem(
        _two_sides, networks.mlp([16, 48, 48, 1], jax.nn.relu), _hinge, batch=32
    ),
    "mixture": _problem(
        _mixed_densities, networks.mlp([1, 40, 40, 15], jnp.tanh), _mixture, batch=100
    ),
}

_ORDER = (  # of the tables
    "motifs",
    "forecast",
    "ranking",
    "zeros",
    "denoising",
    "heat",
    "graph",
    "heavy_tails",
    "distillation",
    "hinge",
    "mixture",
    "expressions",
)
UNSEEN: dict[str, Callable[[str], Problem]] = {
    name: {**_UNSEEN_LOSSES, **UNSEEN_NETWORKS}[name] for name in _ORDER
}
