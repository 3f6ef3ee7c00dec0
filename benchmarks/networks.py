"""Networks in plain JAX, as pairs of pure functions."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Network",
    "affine",
    "attention_block",
    "attention_block_params",
    "cnn",
    "conv",
    "dense_params",
    "factors",
    "layer_norm",
    "lecun_normal",
    "lstm",
    "lstm_cell",
    "mlp",
    "norm_params",
    "residual",
    "transformer",
]

PyTree = Any
Init = Callable[[jax.Array, Sequence[int]], jax.Array]


class Network(NamedTuple):
    """``init(key) -> params`` and ``apply(params, x) -> outputs``."""

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]


# --- Layers ------------------------------------------------------------------------


def lecun_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Normal random numbers with the variance 1 / fan_in; the last axis is fan_out."""
    return jax.random.normal(key, shape) / jnp.sqrt(math.prod(shape[:-1]))


def dense_params(
    key: jax.Array, *shape: int, kernel_init: Init = lecun_normal
) -> PyTree:
    """The kernel and the bias of a dense layer or, with four axes, a convolution."""
    return {"kernel": kernel_init(key, shape), "bias": jnp.zeros(shape[-1])}


def _normal_embedding(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return 0.1 * jax.random.normal(key, shape)


def affine(layer: PyTree, x: jax.Array) -> jax.Array:
    """A dense layer without activation."""
    return x @ layer["kernel"] + layer["bias"]


def conv(layer: PyTree, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution of images without activation, with zero padding."""
    y = lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + layer["bias"]


def norm_params(width: int) -> PyTree:
    """The parameters of a layer norm."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def layer_norm(layer: PyTree, x: jax.Array) -> jax.Array:
    """A layer norm with scale and bias."""
    return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["bias"]


# --- Networks ----------------------------------------------------------------------


def mlp(
    widths: Sequence[int], activation: Callable, kernel_init: Init = lecun_normal
) -> Network:
    """Dense layers with an activation between them; the parameters are a list."""

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(widths) - 1)
        shapes = itertools.pairwise(widths)
        return [
            dense_params(key, *shape, kernel_init=kernel_init)
            for key, shape in zip(keys, shapes, strict=True)
        ]

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = activation(affine(layer, x))
        return affine(params[-1], x)

    return Network(init, apply)


def cnn(size: int, channels: Sequence[int], classes: int) -> Network:
    """Two convolutions with stride 2 and a dense layer, for size x size pixels."""
    first, second = channels
    features = (size // 4) ** 2 * second

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 3)
        return {
            "conv_0": dense_params(keys[0], 3, 3, 1, first),
            "conv_1": dense_params(keys[1], 3, 3, first, second),
            "dense": dense_params(keys[2], features, classes),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, size, size, 1)
        for name in ("conv_0", "conv_1"):
            x = jax.nn.relu(conv(params[name], x, stride=2))
        return affine(params["dense"], x.reshape(len(x), -1))

    return Network(init, apply)


def residual(inputs: int, width: int, blocks: int, outputs: int) -> Network:
    """Residual blocks of a layer norm, a dense layer, gelu and a dense layer."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 2 * blocks + 2))
        params = {"input": dense_params(next(keys), inputs, width)}
        for n in range(blocks):
            params[f"block_{n}"] = {
                "norm": norm_params(width),
                "up": dense_params(next(keys), width, width),
                "down": dense_params(next(keys), width, width),
            }
        return params | {"output": dense_params(next(keys), width, outputs)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = affine(params["input"], x)
        for n in range(blocks):
            block = params[f"block_{n}"]
            h = jax.nn.gelu(affine(block["up"], layer_norm(block["norm"], x)))
            x = x + affine(block["down"], h)
        return affine(params["output"], x)

    return Network(init, apply)


def factors(rows: int, columns: int, rank: int) -> Network:
    """A matrix factorisation with biases, evaluated at pairs (row, column)."""

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


def attention_block_params(
    keys: Sequence[jax.Array],
    width: int,
    hidden: int,
    qkv_bias: bool = True,
    kernel_init: Init = lecun_normal,
) -> PyTree:
    """The parameters of :func:`attention_block`, from four keys."""

    def dense(key: jax.Array, *shape: int) -> PyTree:
        return dense_params(key, *shape, kernel_init=kernel_init)

    qkv, out, up, down = keys
    qkv_params = dense(qkv, width, 3 * width)
    return {
        "norm1": norm_params(width),
        "qkv": qkv_params if qkv_bias else qkv_params["kernel"],
        "out": dense(out, width, width),
        "norm2": norm_params(width),
        "up": dense(up, width, hidden * width),
        "down": dense(down, hidden * width, width),
    }


def attention_block(
    block: PyTree, x: jax.Array, heads: int, *, is_causal: bool
) -> jax.Array:
    """Self-attention and a perceptron with gelu, pre-norm; x is (batch, n, width)."""
    normed = layer_norm(block["norm1"], x)
    has_bias = isinstance(block["qkv"], dict)
    qkv = affine(block["qkv"], normed) if has_bias else normed @ block["qkv"]
    q, k, v = (y.reshape(*y.shape[:-1], heads, -1) for y in jnp.split(qkv, 3, axis=-1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
    x = x + affine(block["out"], mixed.reshape(x.shape))
    h = jax.nn.gelu(affine(block["up"], layer_norm(block["norm2"], x)))
    return x + affine(block["down"], h)


def transformer(
    vocabulary: int,
    width: int,
    heads: int,
    layers: int,
    length: int,
    *,
    hidden: int = 2,
    tied: bool = False,
    qkv_bias: bool = True,
    scan: bool = False,
    kernel_init: Init = lecun_normal,
    embedding_init: Init = _normal_embedding,
) -> Network:
    """A causal pre-norm transformer: from tokens to the logits of the next ones.

    Args:
      vocabulary, width, heads, layers, length: the usual sizes.
      hidden: the width of the perceptrons, as a multiple of `width`.
      tied: whether the embedding is also the output layer.
      qkv_bias: whether queries, keys and values have biases.
      scan: whether the parameters of the blocks are stacked along a leading axis and
        the blocks evaluated by `lax.scan`, instead of a list and a Python loop.
      kernel_init, embedding_init: the initializers.
    """

    def dense(key: jax.Array, *shape: int) -> PyTree:
        return dense_params(key, *shape, kernel_init=kernel_init)

    def init_block(keys: jax.Array) -> PyTree:
        return attention_block_params(keys, width, hidden, qkv_bias, kernel_init)

    def init(key: jax.Array) -> PyTree:
        embedding, position, head, *keys = jax.random.split(key, 4 * layers + 3)
        blocks = [init_block(keys[4 * i : 4 * i + 4]) for i in range(layers)]
        params = {
            "embedding": embedding_init(embedding, (vocabulary, width)),
            "position": embedding_init(position, (length, width)),
            "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)
            if scan
            else blocks,
            "norm": norm_params(width),
        }
        return params if tied else params | {"head": dense(head, width, vocabulary)}

    def apply_block(block: PyTree, x: jax.Array) -> jax.Array:
        return attention_block(block, x, heads, is_causal=True)

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = params["embedding"][x] + params["position"]
        if scan:
            x, _ = lax.scan(
                lambda x, block: (apply_block(block, x), None), x, params["blocks"]
            )
        else:
            for block in params["blocks"]:
                x = apply_block(block, x)
        x = layer_norm(params["norm"], x)
        return x @ params["embedding"].T if tied else affine(params["head"], x)

    return Network(init, apply)


def lstm(vocabulary: int, width: int) -> Network:
    """One LSTM layer, from tokens to the logits of the next ones."""

    def init(key: jax.Array) -> PyTree:
        a, b, c, d = jax.random.split(key, 4)
        normal = jax.random.normal
        return {
            "embedding": normal(a, (vocabulary, width)) / jnp.sqrt(width),
            "input": dense_params(b, width, 4 * width),
            "hidden": lecun_normal(c, (width, 4 * width)),
            "head": dense_params(d, width, vocabulary),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        inputs = affine(params["input"], params["embedding"][x])

        def step(carry: tuple, inputs: jax.Array) -> tuple:
            h, c = lstm_cell(carry[1], inputs + carry[0] @ params["hidden"])
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], width))
        _, h = lax.scan(step, (zeros, zeros), jnp.moveaxis(inputs, 1, 0))
        return affine(params["head"], jnp.moveaxis(h, 0, 1))

    return Network(init, apply)


def lstm_cell(c: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next h and c of an LSTM; 1 is added to the bias of the forget gate."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c
