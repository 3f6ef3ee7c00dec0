"""The networks that are measured: losses ``loss(params, batch)``, pure functions.

`NETWORKS` are those of :mod:`benchmarks.summary`, one of each kind. `MORE` are for
:mod:`benchmarks.cost`: a transformer at several depths, and the network of the
demonstration.

Data are random: what is measured is time and memory, not learning. Weights are drawn
as one would draw them for training, so that no activation dies or overflows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from partnewton import demo

__all__ = ["MORE", "NETWORKS", "Model", "Network", "make"]

PyTree = Any
CLASSES = 10
MLP_DEEP, MLP = (3072, *20 * [1024]), (784, 1024, 200, 100)
CNN, CNN_PLACES = (16, 32, 64), 4 * 4  # channels; what is left of 32 x 32
VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
VOCABULARY, TOKENS, WIDTH, HEADS = 256, 64, 128, 4
DEPTHS = (2, 6, 12, 24)  # layers of the transformers
RESNET18 = (64, 128, 256, 512)  # two blocks each
LSTM_STEPS, LSTM_INPUTS, LSTM_WIDTH = 64, 64, 128

kernel_init = jax.nn.initializers.he_normal()
embedding_init = jax.nn.initializers.normal(0.02)


class Model(NamedTuple):
    """A loss and where to measure it.

    Attributes:
      name: its key in `NETWORKS` or `MORE`.
      loss: ``loss(params, batch)``, a scalar.
      params: float32 leaves.
      batch: the data, a pytree of arrays.
    """

    name: str
    loss: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    batch: PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """An entry of `NETWORKS` or `MORE`.

    Attributes:
      build: from a key, a batch size and a divisor of all widths to the loss, the
        parameters and the batch.
      batch: the batch size that it is measured with.
      tensors: how many leaves its parameters have: S with one subset a tensor.
      description: what it is, for a table.
    """

    build: Callable[[jax.Array, int, int], tuple[Callable, PyTree, PyTree]]
    batch: int
    tensors: int
    description: str


def make(
    name: str, batch: int | None = None, *, scale: int = 1, seed: int = 0
) -> Model:
    """The model called `name`.

    Args:
      name: a key of `NETWORKS` or `MORE`.
      batch: the batch size, if not that of the network.
      scale: all widths are divided by this; the number of tensors stays.
      seed: of weights and data.

    Returns:
      The loss, its parameters and a batch.

    Raises:
      KeyError: there is no such network.
    """
    network = (NETWORKS | MORE)[name]
    size = network.batch if batch is None else batch
    return Model(name, *network.build(jax.random.key(seed), size, scale))


# --- What they are made of -------------------------------------------------------


def _images(key: jax.Array, batch: int, shape: Sequence[int]) -> PyTree:
    images, labels = jax.random.split(key)
    return {
        "inputs": jax.random.normal(images, (batch, *shape)),
        "labels": jax.random.randint(labels, (batch,), 0, CLASSES),
    }


def _classifier(logits_fn: Callable[[PyTree, jax.Array], jax.Array]) -> Callable:
    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        return _cross_entropy(logits_fn(params, batch["inputs"]), batch["labels"])

    return loss


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _layer(key: jax.Array, *shape: int) -> PyTree:
    return {"kernel": kernel_init(key, shape), "bias": jnp.zeros(shape[-1])}


def _dense(layer: PyTree, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _conv(layer: PyTree, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + layer["bias"]


def _pool(x: jax.Array) -> jax.Array:
    return linen.max_pool(x, (2, 2), (2, 2))


def _norm(layer: PyTree, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["bias"]


# --- The networks ----------------------------------------------------------------


def _perceptron(widths: Sequence[int], activation: Callable) -> Callable:
    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        sizes = [-(-width // scale) for width in widths] + [CLASSES]
        keys = jax.random.split(key, len(sizes))
        params = [
            _layer(k, *shape)
            for k, shape in zip(keys[1:], itertools.pairwise(sizes), strict=True)
        ]

        def logits(params: PyTree, x: jax.Array) -> jax.Array:
            for layer in params[:-1]:
                x = activation(_dense(layer, x))
            return _dense(params[-1], x)

        return _classifier(logits), params, _images(keys[0], batch, sizes[:1])

    return build


def _convolutional(plan: Sequence[int | str], places: int) -> Callable:
    """Convolutions of 3 x 3 with elu, poolings, and one dense layer at the end."""

    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        channels = [3] + [-(-x // scale) for x in plan if x != "pool"]
        keys = jax.random.split(key, len(channels) + 1)
        convolutions = [
            _layer(k, 3, 3, *shape)
            for k, shape in zip(keys[2:], itertools.pairwise(channels), strict=True)
        ]
        output = _layer(keys[1], places * channels[-1], CLASSES)
        params = {"convolutions": convolutions, "output": output}

        def logits(params: PyTree, x: jax.Array) -> jax.Array:
            layers = iter(params["convolutions"])
            for step in plan:
                pooling = step == "pool"
                x = _pool(x) if pooling else jax.nn.elu(_conv(next(layers), x))
            return _dense(params["output"], x.reshape(len(x), -1))

        return _classifier(logits), params, _images(keys[0], batch, (32, 32, 3))

    return build


def _transformer(layers: int, *, scan: bool = False) -> Callable:
    """Pre-norm decoder; the embedding is also the output; no bias on q, k and v.

    Args:
      layers: how many blocks there are.
      scan: whether the blocks are stacked along a leading axis of each parameter and
        run by `lax.scan`, instead of a list of blocks and a Python loop.
    """

    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        width = WIDTH // scale
        data, embedding, position, *keys = jax.random.split(key, 3 + 4 * layers)
        blocks = [_block_params(width, *keys[4 * i : 4 * i + 4]) for i in range(layers)]
        params = {
            "embedding": embedding_init(embedding, (VOCABULARY, width)),
            "position": embedding_init(position, (TOKENS, width)),
            "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)
            if scan
            else blocks,
            "norm": _norm_params(width),
        }

        def loss(params: PyTree, batch: PyTree) -> jax.Array:
            x = params["embedding"][batch["tokens"][:, :-1]] + params["position"]
            if scan:
                x, _ = jax.lax.scan(
                    lambda x, block: (_block(block, x), None), x, params["blocks"]
                )
            else:
                for block in params["blocks"]:
                    x = _block(block, x)
            logits = _norm(params["norm"], x) @ params["embedding"].T
            return _cross_entropy(logits, batch["tokens"][:, 1:])

        tokens = jax.random.randint(data, (batch, TOKENS + 1), 0, VOCABULARY)
        return loss, params, {"tokens": tokens}

    return build


def _norm_params(width: int) -> PyTree:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _block_params(
    width: int, qkv: jax.Array, out: jax.Array, up: jax.Array, down: jax.Array
) -> PyTree:
    return {
        "norm1": _norm_params(width),
        "qkv": kernel_init(qkv, (width, 3 * width)),
        "out": _layer(out, width, width),
        "norm2": _norm_params(width),
        "up": _layer(up, width, 4 * width),
        "down": _layer(down, 4 * width, width),
    }


def _block(params: PyTree, x: jax.Array) -> jax.Array:
    """Causal attention and a perceptron, each with a norm before and a shortcut."""
    qkv = _norm(params["norm1"], x) @ params["qkv"]  # (batch, tokens, 3 width)
    q, k, v = (y.reshape(*y.shape[:-1], HEADS, -1) for y in jnp.split(qkv, 3, axis=-1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + _dense(params["out"], mixed.reshape(x.shape))
    hidden = jax.nn.gelu(_dense(params["up"], _norm(params["norm2"], x)))
    return x + _dense(params["down"], hidden)


class _ResidualBlock(nnx.Module):
    """Two convolutions around a shortcut, as in He et al., arXiv 1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        def conv(size: int, channels: int, strides: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                outputs,
                (size, size),
                strides=strides,
                use_bias=False,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.conv1 = conv(3, inputs, stride)
        self.norm1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = conv(3, outputs, 1)
        self.norm2 = nnx.BatchNorm(outputs, rngs=rngs)
        self.projects = stride > 1
        if self.projects:
            self.shortcut = conv(1, inputs, stride)
            self.norm3 = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (self.norm3(self.shortcut(x)) if self.projects else x))


class _ResNet(nnx.Module):
    """ResNet-18 for images of 32 x 32: a stem of 3 x 3 without pooling."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(widths[0], rngs=rngs)
        blocks, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            blocks.append(_ResidualBlock(inputs, width, 1 if stage == 0 else 2, rngs))
            blocks.append(_ResidualBlock(width, width, 1, rngs))
            inputs = width
        self.blocks = nnx.List(blocks)
        self.output = nnx.Linear(inputs, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean(axis=(1, 2)))


def _resnet18(key: jax.Array, batch: int, scale: int) -> tuple:
    """Batch norm normalises by the batch; its running averages are thrown away."""
    data, init = jax.random.split(key)
    model = _ResNet([width // scale for width in RESNET18], nnx.Rngs(init))
    return *_classifier_of(model), _images(data, batch, (32, 32, 3))


def _digits_cnn(key: jax.Array, batch: int, scale: int) -> tuple:
    """The network of ``python -m partnewton``; its widths are fixed."""
    del scale
    data, init = jax.random.split(key)
    model = demo.Convolutional((8, 8, 1), nnx.Rngs(init))
    return *_classifier_of(model), _images(data, batch, (8, 8, 1))


def _classifier_of(model: nnx.Module) -> tuple:
    """The loss of a module and its parameters; what else it keeps never changes."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    return _classifier(logits), params


def _lstm(key: jax.Array, batch: int, scale: int) -> tuple:
    """One layer by `lax.scan`; the last state is classified."""
    width = LSTM_WIDTH // scale
    data, inputs, recurrent, output = jax.random.split(key, 4)
    params = {
        "inputs": kernel_init(inputs, (LSTM_INPUTS, 4 * width)),
        "recurrent": jax.nn.initializers.orthogonal()(recurrent, (width, 4 * width)),
        "bias": jnp.zeros(4 * width),
        "output": _layer(output, width, CLASSES),
    }

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        def step(carry: tuple, x_t: jax.Array) -> tuple:
            h, c = carry
            gates = x_t @ params["inputs"] + h @ params["recurrent"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        start = jnp.zeros((len(x), width))
        (h, _), _ = jax.lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
        return _dense(params["output"], h)

    return (
        _classifier(logits),
        params,
        _images(data, batch, (LSTM_STEPS, LSTM_INPUTS)),
    )


def _after_each_pooling(channels: Sequence[int]) -> tuple:
    return tuple(step for width in channels for step in (width, "pool"))


NETWORKS = {
    "mlp_deep": Network(
        _perceptron(MLP_DEEP, jax.nn.elu), 100, 42, "MLP 3072-20x1024-10, elu"
    ),
    "mlp": Network(_perceptron(MLP, jnp.tanh), 100, 8, "MLP 784-1024-200-100-10, tanh"),
    "cnn": Network(
        _convolutional(_after_each_pooling(CNN), CNN_PLACES),
        100,
        8,
        "3 convolutions (16, 32, 64) with max-pool on 32x32, elu",
    ),
    "vgg11": Network(_convolutional(VGG11, 1), 16, 18, "VGG-11 on 32x32, elu"),
    "transformer": Network(
        _transformer(DEPTHS[0]),
        16,
        26,
        "2-layer transformer, d=128, T=64, tied embedding",
    ),
    "resnet18": Network(
        _resnet18, 16, 62, "ResNet-18 with batch norm on 32x32, relu, flax nnx"
    ),
    "lstm": Network(_lstm, 32, 5, "LSTM of width 128, 64 steps by scan"),
}

MORE = {
    "digits_cnn": Network(
        _digits_cnn, 64, 8, "2 convolutions, 2 dense layers on 8x8, tanh, flax nnx"
    ),
    **{
        f"transformer_{n}": Network(
            _transformer(n), 16, 11 * n + 4, f"the transformer with {n} layers"
        )
        for n in DEPTHS[1:]
    },
    **{
        f"transformer_{n}_scan": Network(
            _transformer(n, scan=True), 16, 15, f"the same, {n} layers by scan"
        )
        for n in DEPTHS
    },
}
