"""Rungs without images and text: a differential equation, and graphs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, problems_base
from benchmarks.full_batch import references
from benchmarks.full_batch.pinn import taylor, uniform
from benchmarks.ladder.rung import Batch, Rung, supervised
from benchmarks.networks import affine, dense_params
from benchmarks.problems_base import cross_entropy, error_rate

__all__ = ["SCIENCE"]

PyTree = Any
BOUNDS = ((-1.0, 1.0), (0.0, 1.0))  # of x and t
NODES, NEIGHBOURS = 24, 6  # of the graph of a digit
ROUNDS = 3


def _pinn_burgers(scale: int) -> Rung:
    """``u_t + u u_x = (0.01 / pi) u_xx``; each batch has other points.

    The network n enters as ``u = -sin(pi x) + t (1 - x^2) n(x, t)``, so that initial
    and boundary values are exact. The metric is the square of the relative error.
    """
    network = networks.mlp([2, *[64 // scale] * 4, 1], jnp.tanh)

    def loss(params: PyTree, stats: PyTree, batch: Batch, training: bool) -> tuple:
        points = batch[0][:, 0], batch[0][:, 1]
        value, u_x, u_xx = taylor(_solution(network, params), points, 0)
        u_t = taylor(_solution(network, params), points, 1)[1]
        residual = u_t + value * u_x - references.BURGERS_VISCOSITY * u_xx
        return jnp.mean(residual**2), stats

    def metric(params: PyTree, stats: PyTree, batch: Batch) -> jax.Array:
        points, truth = batch
        found = _solution(network, params)(points[:, 0], points[:, 1])
        return jnp.mean((found - truth) ** 2) / mean_square

    train, test = _collocation(0, 20000), _collocation(1, 4096)
    mean_square = float(np.mean(test[1] ** 2))
    return Rung(
        lambda key: (network.init(key), {}),
        loss,
        metric,
        "relative error squared",
        train,
        test,
        batch=256,
        steps=4000,
        evaluated=4096,
    )


def _solution(network: networks.Network, params: PyTree) -> Callable:
    def u(x: jax.Array, t: jax.Array) -> jax.Array:
        inputs = jnp.stack([x, 2 * t - 1], -1)
        correction = network.apply(params, inputs)[:, 0]
        return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * correction

    return u


def _collocation(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    x, t = uniform(np.random.default_rng(seed), count, BOUNDS)
    truth = np.concatenate(
        [references.burgers(*part) for part in zip(*_parts(x, t), strict=True)]
    )
    return np.stack([x, t], -1).astype(np.float32), truth.astype(np.float32)


def _parts(*arrays: np.ndarray) -> list[list[np.ndarray]]:
    return [np.array_split(x, -(-len(x) // 1000)) for x in arrays]


def _graph_digits(scale: int) -> Rung:
    """Digits as graphs: the brightest pixels, each with edges to the nearest ones."""
    train, test = (_graphs(*data) for data in problems_base.digits())
    return supervised(
        message_passing(64 // scale),
        train,
        test,
        cross_entropy,
        error_rate,
        metric_name="error rate",
        batch=64,
        steps=800,
    )


def _graphs(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Nodes (n, NODES, 3): intensity and place; senders (n, NODES, NEIGHBOURS)."""
    pixels = np.argsort(-x, axis=1, kind="stable")[:, :NODES]
    places = np.stack(np.divmod(pixels, 8), -1) / 4 - 1
    nodes = np.concatenate([np.take_along_axis(x, pixels, 1)[..., None], places], -1)
    distances = np.sum((places[:, :, None] - places[:, None]) ** 2, -1)
    senders = np.argsort(distances, axis=2, kind="stable")[..., 1 : NEIGHBOURS + 1]
    return nodes.astype(np.float32), senders.astype(np.int32), labels


def message_passing(width: int) -> networks.Network:
    """Messages along edges are summed at their receivers, and change the nodes."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 3 * ROUNDS + 3))
        return {
            "nodes": dense_params(next(keys), 3, width),
            "rounds": [
                {
                    "message": dense_params(next(keys), 2 * width + 2, width),
                    "second": dense_params(next(keys), width, width),
                    "update": dense_params(next(keys), 2 * width, width),
                }
                for _ in range(ROUNDS)
            ],
            "hidden": dense_params(next(keys), width, width),
            "output": dense_params(next(keys), width, 10),
        }

    def apply(params: PyTree, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        nodes, senders = x
        graphs = len(nodes)
        first = NODES * jnp.arange(graphs)
        sender = (senders + first[:, None, None]).ravel()
        receiver = jnp.repeat(jnp.arange(graphs * NODES), NEIGHBOURS)
        features = nodes.reshape(-1, 3)
        offset = features[sender, 1:] - features[receiver, 1:]
        h = jax.nn.gelu(affine(params["nodes"], features))
        for layer in params["rounds"]:
            edge = jnp.concatenate([h[sender], h[receiver], offset], -1)
            edge = jax.nn.gelu(affine(layer["message"], edge))
            edge = affine(layer["second"], edge) / NEIGHBOURS
            received = jax.ops.segment_sum(edge, receiver, graphs * NODES)
            both = jnp.concatenate([h, received], -1)
            h = h + jax.nn.gelu(affine(layer["update"], both))
        graph = h.reshape(graphs, NODES, -1).mean(1)
        return affine(params["output"], jax.nn.gelu(affine(params["hidden"], graph)))

    return networks.Network(init, apply)


SCIENCE: dict[str, Callable[[int], Rung]] = {
    "graph_digits": _graph_digits,
    "pinn_burgers": _pinn_burgers,
}
"""Functions of a divisor of the widths."""
