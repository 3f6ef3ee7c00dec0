"""The unseen problems with other networks than perceptrons, see `problems_unseen.py`.

Convolutions and recurrences over time, a tied decoder, the residual of a differential
equation, a graph, a transformer that reads expressions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import networks
from benchmarks.problems_base import (
    Data,
    Problem,
    cross_entropy,
    digits,
    error_rate,
    problem,
    split,
    squared,
)

__all__ = ["UNSEEN_NETWORKS"]

PyTree = Any


def _dense(key: jax.Array, inputs: int, outputs: int) -> PyTree:
    return networks.mlp([inputs, outputs], jnp.tanh).init(key)[0]


def _motifs() -> tuple[Data, Data]:
    """Classification of noisy signals by the motif that they contain."""
    rng = np.random.default_rng(11)
    motifs = rng.normal(size=(4, 9))
    y = rng.integers(0, 4, 3000)
    x = 0.8 * rng.normal(size=(3000, 40))
    for row, label, start in zip(x, y, rng.integers(0, 31, 3000), strict=True):
        row[start : start + 9] += motifs[label]
    return split(x, y)


def _convolutions_over_time(channels: Sequence[int], classes: int) -> networks.Network:
    """Two convolutions with a stride of 2, a maximum over time, a dense layer."""
    first, second = channels

    def init(key: jax.Array) -> PyTree:
        a, b, c = jax.random.split(key, 3)
        return {
            "conv_0": networks.dense_params(a, 7, 1, first),
            "conv_1": networks.dense_params(b, 5, first, second),
            "dense": _dense(c, second, classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x[..., None]
        for name in ("conv_0", "conv_1"):
            layer = params[name]
            x = lax.conv_general_dilated(
                x,
                layer["kernel"],
                (2,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            x = jax.nn.gelu(x + layer["bias"])
        return networks.affine(params["dense"], x.max(1))

    return networks.Network(init, apply)


def _oscillations() -> tuple[Data, Data]:
    """The next value of a noisy oscillation."""
    rng = np.random.default_rng(12)
    phase, speed = rng.uniform(0, 6, (2500, 1)), rng.uniform(0.3, 0.9, (2500, 1))
    angle = speed * np.arange(17) + phase
    series = (
        np.sin(angle) + 0.3 * np.sin(2 * angle) + 0.05 * rng.normal(size=(2500, 17))
    )
    return split(series[:, :16], series[:, 16:])


def _gated_recurrence(width: int) -> networks.Network:
    """A GRU over a sequence of numbers, and a dense layer on its last state."""

    def init(key: jax.Array) -> PyTree:
        a, b, c = jax.random.split(key, 3)
        return {
            "input": _dense(a, 1, 3 * width),
            "hidden": networks.lecun_normal(b, (width, 3 * width)),
            "dense": _dense(c, width, 1),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            inputs = jnp.split(networks.affine(params["input"], x[:, None]), 3, axis=-1)
            hidden = jnp.split(h @ params["hidden"], 3, axis=-1)
            reset = jax.nn.sigmoid(inputs[0] + hidden[0])
            keep = jax.nn.sigmoid(inputs[1] + hidden[1])
            new = jnp.tanh(inputs[2] + reset * hidden[2])
            return keep * h + (1 - keep) * new, None

        h, _ = lax.scan(step, jnp.zeros((len(x), width)), x.T)
        return networks.affine(params["dense"], h)

    return networks.Network(init, apply)


def _noisy_and_clean() -> tuple[Data, Data]:
    rng = np.random.default_rng(15)
    (x, _), (x_test, _) = digits()

    def noisy(x: np.ndarray) -> np.ndarray:
        return (x + 0.4 * rng.normal(size=x.shape)).astype(np.float32)

    return (noisy(x), x), (noisy(x_test), x_test)


def _tied_decoder(inputs: int, width: int) -> networks.Network:
    """An autoencoder whose decoder uses the transposed weights of the encoder."""

    def init(key: jax.Array) -> PyTree:
        return {
            "encoder": _dense(key, inputs, width),
            "bias": jnp.zeros(inputs),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        h = jax.nn.sigmoid(networks.affine(params["encoder"], x))
        return h @ params["encoder"]["kernel"].T + params["bias"]

    return networks.Network(init, apply)


def _summed_squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum((outputs - y) ** 2, -1))


def _strip() -> tuple[Data, Data]:
    x = np.random.default_rng(16).uniform(0, 1, (1900, 2))
    return split(x, np.zeros(1900))


def _heat(name: str) -> Problem:
    """u_t = u_xx / 10 + sin(2 pi x) by a network, from u = sin(pi x) at time 0."""
    network = networks.mlp([3, 24, 24, 1], jnp.tanh)

    def loss(params: PyTree, points: jax.Array, _: jax.Array) -> jax.Array:
        def u(x: jax.Array, t: jax.Array) -> jax.Array:
            around = jnp.stack([jnp.sin(jnp.pi * x), jnp.cos(jnp.pi * x), t])
            return jnp.sin(jnp.pi * x) + t * network.apply(params, around)[0]

        def residual(point: jax.Array) -> jax.Array:
            x, t = point
            u_xx = jax.grad(jax.grad(u))(x, t)
            return jax.grad(u, 1)(x, t) - 0.1 * u_xx - jnp.sin(2 * jnp.pi * x)

        return jnp.mean(jax.vmap(residual)(points) ** 2)

    return Problem(name, network.init, loss, loss, *_strip(), 100, 1500)


def _graph(name: str) -> Problem:
    """Classification of nodes, by two means over neighbours."""
    rng = np.random.default_rng(17)
    y = rng.integers(0, 5, 700)
    near = rng.random((700, 700)) < np.where(y[:, None] == y, 0.03, 0.01)
    near = near | near.T | np.eye(700, dtype=bool)
    mean = np.asarray(near / near.sum(1, keepdims=True), np.float32)
    features = (rng.normal(size=(700, 30)) + 1.2 * np.eye(30)[y]).astype(np.float32)
    network = networks.mlp([30, 32, 5], jax.nn.relu)

    def outputs(params: PyTree, nodes: jax.Array) -> jax.Array:
        h = jax.nn.relu(mean @ networks.affine(params[0], features))
        return (mean @ networks.affine(params[1], h))[nodes]

    (nodes, labels), (test_nodes, test_labels) = split(np.arange(700)[:, None], y)
    return Problem(
        name,
        network.init,
        lambda params, x, y: cross_entropy(outputs(params, x), y),
        lambda params, x, y: error_rate(outputs(params, x), y),
        (nodes[:, 0].astype(np.int32), labels),
        (test_nodes[:, 0].astype(np.int32), test_labels),
        50,
        1000,
    )


def _expressions() -> tuple[Data, Data]:
    """The value of a sum of four signed digits, from its characters."""
    rng = np.random.default_rng(21)
    numbers, signs = rng.integers(0, 10, (4000, 4)), rng.integers(0, 2, (4000, 4))
    x = np.stack([10 + signs, numbers], -1).reshape(4000, 8)
    y = np.sum(np.where(signs, -1, 1) * numbers, 1, keepdims=True) / 10
    (a, c), (b, d) = split(x, y)
    return (a.astype(np.int32), c), (b.astype(np.int32), d)


def _read(network: networks.Network) -> networks.Network:
    """The first output at the last character."""

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        return network.apply(params, x)[:, -1, :1]

    return networks.Network(network.init, apply)


UNSEEN_NETWORKS: dict[str, Callable[[str], Problem]] = {
    "motifs": problem(
        _motifs,
        _convolutions_over_time([12, 16], 4),
        cross_entropy,
        error_rate,
        batch=50,
        steps=1200,
    ),
    "forecast": problem(
        _oscillations, _gated_recurrence(24), squared, batch=32, steps=1500
    ),
    "denoising": problem(
        _noisy_and_clean, _tied_decoder(64, 80), _summed_squares, batch=128, steps=2000
    ),
    "heat": _heat,
    "graph": _graph,
    "expressions": problem(
        _expressions,
        _read(
            networks.transformer(vocabulary=12, width=32, heads=2, layers=2, length=8)
        ),
        squared,
        batch=64,
        steps=1000,
    ),
}
