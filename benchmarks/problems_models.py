"""Small networks as pairs of pure functions, in plain JAX."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Network",
    "affine",
    "cnn",
    "factors",
    "lstm",
    "mlp",
    "residual",
    "transformer",
]

PyTree = Any


class Network(NamedTuple):
    """``init(key) -> params`` and ``apply(params, x) -> outputs``."""

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]


def _dense(key: jax.Array, inputs: int, outputs: int) -> PyTree:
    kernel = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def affine(layer: PyTree, x: jax.Array) -> jax.Array:
    """A dense layer without an activation."""
    return x @ layer["kernel"] + layer["bias"]


def mlp(widths: Sequence[int], activation: Callable) -> Network:
    """Dense layers, with the activation between them."""
    names = [f"layer_{n}" for n in range(len(widths) - 1)]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(names))
        shapes = itertools.pairwise(widths)
        return {
            name: _dense(key, *shape)
            for name, key, shape in zip(names, keys, shapes, strict=True)
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for name in names[:-1]:
            x = activation(affine(params[name], x))
        return affine(params[names[-1]], x)

    return Network(init, apply)


def cnn(size: int, channels: Sequence[int], classes: int) -> Network:
    """Two convolutions with a stride of 2 and a dense layer, on size x size pixels."""
    first, second = channels
    features = (size // 4) ** 2 * second

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 3)
        return {
            "conv_0": {
                "kernel": jax.random.normal(keys[0], (3, 3, 1, first)) / 3,
                "bias": jnp.zeros(first),
            },
            "conv_1": {
                "kernel": jax.random.normal(keys[1], (3, 3, first, second))
                / jnp.sqrt(9 * first),
                "bias": jnp.zeros(second),
            },
            "dense": _dense(keys[2], features, classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, size, size, 1)
        for name in ("conv_0", "conv_1"):
            x = lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + params[name]["bias"])
        return affine(params["dense"], x.reshape(len(x), -1))

    return Network(init, apply)


def _norm(layer: PyTree, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def _norm_params(width: int) -> PyTree:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def residual(inputs: int, width: int, blocks: int, outputs: int) -> Network:
    """Residual blocks of a layer norm, a dense layer, gelu and a dense layer."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 2 * blocks + 2))
        params = {"input": _dense(next(keys), inputs, width)}
        for n in range(blocks):
            params[f"block_{n}"] = {
                "norm": _norm_params(width),
                "up": _dense(next(keys), width, width),
                "down": _dense(next(keys), width, width),
            }
        return params | {"output": _dense(next(keys), width, outputs)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = affine(params["input"], x)
        for n in range(blocks):
            block = params[f"block_{n}"]
            h = jax.nn.gelu(affine(block["up"], _norm(block["norm"], x)))
            x = x + affine(block["down"], h)
        return affine(params["output"], x)

    return Network(init, apply)


def factors(rows: int, columns: int, rank: int) -> Network:
    """A matrix as a product of two, seen at some of its entries, with biases."""

    def init(key: jax.Array) -> PyTree:
        a, b = jax.random.split(key)
        return {
            "rows": 0.3 * jax.random.normal(a, (rows, rank)),
            "columns": 0.3 * jax.random.normal(b, (columns, rank)),
            "row_bias": jnp.zeros(rows),
            "column_bias": jnp.zeros(columns),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        i, j = x[:, 0], x[:, 1]
        product = jnp.sum(params["rows"][i] * params["columns"][j], -1)
        return product + params["row_bias"][i] + params["column_bias"][j]

    return Network(init, apply)


def transformer(
    vocabulary: int, width: int, heads: int, layers: int, length: int
) -> Network:
    """A causal transformer with layer norms before its blocks, on characters."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 4 * layers + 3))
        normal = jax.random.normal
        params = {
            "embedding": 0.1 * normal(next(keys), (vocabulary, width)),
            "position": 0.1 * normal(next(keys), (length, width)),
            "norm": _norm_params(width),
            "head": _dense(next(keys), width, vocabulary),
        }
        for n in range(layers):
            params[f"block_{n}"] = {
                "norm_0": _norm_params(width),
                "qkv": _dense(next(keys), width, 3 * width),
                "out": _dense(next(keys), width, width),
                "norm_1": _norm_params(width),
                "up": _dense(next(keys), width, 2 * width),
                "down": _dense(next(keys), 2 * width, width),
            }
        return params

    def attend(block: PyTree, x: jax.Array) -> jax.Array:
        qkv = affine(block["qkv"], x).reshape(*x.shape[:2], 3, heads, width // heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(width // heads)
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        return affine(block["out"], mixed)

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = params["embedding"][x] + params["position"]
        for n in range(layers):
            block = params[f"block_{n}"]
            x = x + attend(block, _norm(block["norm_0"], x))
            h = jax.nn.gelu(affine(block["up"], _norm(block["norm_1"], x)))
            x = x + affine(block["down"], h)
        return affine(params["head"], _norm(params["norm"], x))

    return Network(init, apply)


def lstm(vocabulary: int, width: int) -> Network:
    """One LSTM layer on characters."""

    def init(key: jax.Array) -> PyTree:
        a, b, c, d = jax.random.split(key, 4)
        normal = jax.random.normal
        return {
            "embedding": normal(a, (vocabulary, width)) / jnp.sqrt(width),
            "input": _dense(b, width, 4 * width),
            "hidden": normal(c, (width, 4 * width)) / jnp.sqrt(width),
            "head": _dense(d, width, vocabulary),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        inputs = affine(params["input"], params["embedding"][x])

        def step(carry: tuple, inputs: jax.Array) -> tuple:
            c, h = carry
            gates = inputs + h @ params["hidden"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        zeros = jnp.zeros((x.shape[0], width))
        _, h = lax.scan(step, (zeros, zeros), jnp.moveaxis(inputs, 1, 0))
        return affine(params["head"], jnp.moveaxis(h, 0, 1))

    return Network(init, apply)
