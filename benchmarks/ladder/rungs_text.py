"""Rungs on text: transformers in a Python loop and by `lax.scan`, and a GRU."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import networks
from benchmarks.ladder import text
from benchmarks.ladder.rung import Rung, supervised
from benchmarks.problems_base import cross_entropy

__all__ = ["TEXT"]

PyTree = Any


def _language_model(
    network: networks.Network, vocabulary: int, length: int, **options: Any
) -> Rung:
    train, test, bytes_per_token = text.windows(length, vocabulary)

    def bits_per_byte(logits: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(logits, y) / (math.log(2) * bytes_per_token)

    return supervised(
        network,
        train,
        test,
        cross_entropy,
        bits_per_byte,
        metric_name="bits / byte",
        **options,
    )


def _gpt(
    scale: int,
    *,
    vocabulary: int,
    width: int,
    heads: int,
    layers: int,
    length: int,
    scan: bool = False,
    **options: Any,
) -> Rung:
    network = networks.transformer(
        vocabulary,
        width // scale,
        heads,
        layers,
        length,
        hidden=4,
        tied=True,
        scan=scan,
        embedding_init=jax.nn.initializers.normal(0.02),
    )
    return _language_model(network, vocabulary, length, **options)


def gru(vocabulary: int, embedding: int, width: int) -> networks.Network:
    """One GRU layer by `lax.scan`, from tokens to the logits of the next ones."""

    def init(key: jax.Array) -> PyTree:
        a, b, c, d = jax.random.split(key, 4)
        return {
            "embedding": jax.random.normal(a, (vocabulary, embedding)),
            "input": networks.dense_params(b, embedding, 3 * width),
            "hidden": networks.dense_params(c, width, 3 * width),
            "head": networks.dense_params(d, width, vocabulary),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        inputs = networks.affine(params["input"], params["embedding"][x])

        def step(h: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = networks.affine(params["hidden"], h)
            (r, z, n), (r_h, z_h, n_h) = (jnp.split(a, 3, -1) for a in (inputs, hidden))
            reset, keep = jax.nn.sigmoid(r + r_h), jax.nn.sigmoid(z + z_h)
            h = keep * h + (1 - keep) * jnp.tanh(n + reset * n_h)
            return h, h

        start = jnp.zeros((len(x), width), inputs.dtype)
        _, h = lax.scan(step, start, jnp.moveaxis(inputs, 1, 0))
        return networks.affine(params["head"], jnp.moveaxis(h, 0, 1))

    return networks.Network(init, apply)


def _gru_bytes(scale: int) -> Rung:
    network = gru(256, 128 // scale, 256 // scale)
    return _language_model(network, 256, 64, batch=32, steps=500, evaluated=512)


_bytes = functools.partial(
    _gpt,
    vocabulary=256,
    width=160,
    heads=4,
    layers=4,
    length=64,
    batch=8,
    steps=250,
    evaluated=128,
)
_large = functools.partial(
    _gpt,
    vocabulary=4096,
    width=768,
    heads=12,
    length=256,
    batch=16,
    steps=1000,
    evaluated=512,
    dtype=jnp.bfloat16,
)

TEXT: dict[str, Callable[[int], Rung]] = {
    "gru_bytes": _gru_bytes,
    "gpt_bytes": _bytes,
    "gpt_bytes_scan": functools.partial(_bytes, scan=True),
    "gpt_bpe": functools.partial(
        _gpt,
        vocabulary=1024,
        width=192,
        heads=6,
        layers=6,
        length=96,
        batch=8,
        steps=250,
        evaluated=128,
    ),
    "gpt_gpu": functools.partial(_large, layers=6),
    "gpt_scan_gpu": functools.partial(_large, layers=12, scan=True),
}
"""Functions of a divisor of the widths."""
