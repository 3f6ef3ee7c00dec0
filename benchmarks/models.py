"""The networks whose summaries and training steps are timed.

`NETWORKS` are those of :mod:`benchmarks.summary`, one of each kind. `MORE` are for
:mod:`benchmarks.cost`: a transformer at several depths, and the network of the
demonstration. The data are random, since only time and memory are measured. The weights
are initialised as for training.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from benchmarks import networks, resnet
from partnewton.demo.models import Convolutional

__all__ = ["MORE", "NETWORKS", "MeasuredLoss", "NetworkSpec", "make"]

PyTree = Any
CLASSES = 10
MLP_DEEP, MLP = (3072, *20 * [1024]), (784, 1024, 200, 100)
CNN, CNN_PLACES = (16, 32, 64), 4 * 4  # channels; pixels of the last feature map
VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
VOCABULARY, TOKENS, WIDTH, HEADS = 256, 64, 128, 4
DEPTHS = (2, 6, 12, 24)  # layers of the transformers
RESNET18 = (64, 128, 256, 512)  # two blocks each
LSTM_STEPS, LSTM_INPUTS, LSTM_WIDTH = 64, 64, 128

kernel_init = jax.nn.initializers.he_normal()
embedding_init = jax.nn.initializers.normal(0.02)


class MeasuredLoss(NamedTuple):
    """A loss, and the arguments that it is measured with.

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
class NetworkSpec:
    """An entry of `NETWORKS` or `MORE`.

    Attributes:
      build: a function of a key, a batch size and a divisor of all widths; it returns
        the loss, the parameters and a batch.
      batch: the default batch size.
      tensors: the number of leaves of the parameters: S with one subset per tensor.
      description: a line for a table.
    """

    build: Callable[[jax.Array, int, int], tuple[Callable, PyTree, PyTree]]
    batch: int
    tensors: int
    description: str


def make(
    name: str, batch: int | None = None, *, scale: int = 1, seed: int = 0
) -> MeasuredLoss:
    """The model called `name`.

    Args:
      name: a key of `NETWORKS` or `MORE`.
      batch: the batch size; by default that of the network.
      scale: a divisor of all widths; the number of tensors is unchanged.
      seed: the seed of weights and data.

    Returns:
      The loss, its parameters and a batch.

    Raises:
      KeyError: an unknown name.
    """
    network = (NETWORKS | MORE)[name]
    size = network.batch if batch is None else batch
    return MeasuredLoss(name, *network.build(jax.random.key(seed), size, scale))


# --- Losses and data -----------------------------------------------------------


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


def _pool(x: jax.Array) -> jax.Array:
    return linen.max_pool(x, (2, 2), (2, 2))


# --- The networks ----------------------------------------------------------------


def _perceptron(widths: Sequence[int], activation: Callable) -> Callable:
    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        sizes = [-(-width // scale) for width in widths] + [CLASSES]
        data, init = jax.random.split(key)
        network = networks.mlp(sizes, activation, kernel_init)
        return (
            _classifier(network.apply),
            network.init(init),
            _images(data, batch, sizes[:1]),
        )

    return build


def _convolutional(plan: Sequence[int | str], places: int) -> Callable:
    """3 x 3 convolutions with elu, max-pooling, and a dense layer."""

    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        channels = [3] + [-(-x // scale) for x in plan if x != "pool"]
        keys = jax.random.split(key, len(channels) + 1)
        convolutions = [
            networks.dense_params(k, 3, 3, *shape, kernel_init=kernel_init)
            for k, shape in zip(keys[2:], itertools.pairwise(channels), strict=True)
        ]
        output = networks.dense_params(
            keys[1], places * channels[-1], CLASSES, kernel_init=kernel_init
        )
        params = {"convolutions": convolutions, "output": output}

        def logits(params: PyTree, x: jax.Array) -> jax.Array:
            layers = iter(params["convolutions"])
            for step in plan:
                if step == "pool":
                    x = _pool(x)
                else:
                    x = jax.nn.elu(networks.conv(next(layers), x))
            return networks.affine(params["output"], x.reshape(len(x), -1))

        return _classifier(logits), params, _images(keys[0], batch, (32, 32, 3))

    return build


def _transformer(layers: int, *, scan: bool = False) -> Callable:
    """With a tied embedding, and without biases of queries, keys and values."""

    def build(key: jax.Array, batch: int, scale: int) -> tuple:
        data, init = jax.random.split(key)
        network = networks.transformer(
            VOCABULARY,
            WIDTH // scale,
            HEADS,
            layers,
            TOKENS,
            hidden=4,
            tied=True,
            qkv_bias=False,
            scan=scan,
            kernel_init=kernel_init,
            embedding_init=embedding_init,
        )

        def loss(params: PyTree, batch: PyTree) -> jax.Array:
            logits = network.apply(params, batch["tokens"][:, :-1])
            return _cross_entropy(logits, batch["tokens"][:, 1:])

        tokens = jax.random.randint(data, (batch, TOKENS + 1), 0, VOCABULARY)
        return loss, network.init(init), {"tokens": tokens}

    return build


def _resnet18(key: jax.Array, batch: int, scale: int) -> tuple:
    """Batch norm uses the statistics of the batch; running averages are discarded."""
    data, init = jax.random.split(key)
    model = resnet.ResNet(
        [width // scale for width in RESNET18], CLASSES, nnx.Rngs(init)
    )
    return *_classifier_of(model), _images(data, batch, (32, 32, 3))


def _digits_cnn(key: jax.Array, batch: int, scale: int) -> tuple:
    """The network of ``python -m partnewton``; its widths are fixed."""
    del scale
    data, init = jax.random.split(key)
    model = Convolutional((8, 8, 1), nnx.Rngs(init))
    return *_classifier_of(model), _images(data, batch, (8, 8, 1))


def _classifier_of(model: nnx.Module) -> tuple:
    """The loss of a module, and its parameters; its other variables are constant."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    return _classifier(logits), params


def _lstm(key: jax.Array, batch: int, scale: int) -> tuple:
    """One layer by `lax.scan`, and a classifier of its last state."""
    width = LSTM_WIDTH // scale
    data, inputs, recurrent, output = jax.random.split(key, 4)
    params = {
        "inputs": kernel_init(inputs, (LSTM_INPUTS, 4 * width)),
        "recurrent": jax.nn.initializers.orthogonal()(recurrent, (width, 4 * width)),
        "bias": jnp.zeros(4 * width),
        "output": networks.dense_params(
            output, width, CLASSES, kernel_init=kernel_init
        ),
    }

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        def step(carry: tuple, x_t: jax.Array) -> tuple:
            h, c = carry
            gates = x_t @ params["inputs"] + h @ params["recurrent"] + params["bias"]
            return networks.lstm_cell(c, gates), None

        start = jnp.zeros((len(x), width))
        (h, _), _ = jax.lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
        return networks.affine(params["output"], h)

    return (
        _classifier(logits),
        params,
        _images(data, batch, (LSTM_STEPS, LSTM_INPUTS)),
    )


def _after_each_pooling(channels: Sequence[int]) -> tuple:
    return tuple(step for width in channels for step in (width, "pool"))


NETWORKS = {
    "mlp_deep": NetworkSpec(
        _perceptron(MLP_DEEP, jax.nn.elu), 100, 42, "MLP 3072-20x1024-10, elu"
    ),
    "mlp": NetworkSpec(
        _perceptron(MLP, jnp.tanh), 100, 8, "MLP 784-1024-200-100-10, tanh"
    ),
    "cnn": NetworkSpec(
        _convolutional(_after_each_pooling(CNN), CNN_PLACES),
        100,
        8,
        "3 convolutions (16, 32, 64) with max-pool on 32x32, elu",
    ),
    "vgg11": NetworkSpec(_convolutional(VGG11, 1), 16, 18, "VGG-11 on 32x32, elu"),
    "transformer": NetworkSpec(
        _transformer(DEPTHS[0]),
        16,
        26,
        "2-layer transformer, d=128, T=64, tied embedding",
    ),
    "resnet18": NetworkSpec(
        _resnet18, 16, 62, "ResNet-18 with batch norm on 32x32, relu, flax nnx"
    ),
    "lstm": NetworkSpec(_lstm, 32, 5, "LSTM of width 128, 64 steps by scan"),
}

MORE = {
    "digits_cnn": NetworkSpec(
        _digits_cnn, 64, 8, "2 convolutions, 2 dense layers on 8x8, tanh, flax nnx"
    ),
    **{
        f"transformer_{n}": NetworkSpec(
            _transformer(n), 16, 11 * n + 4, f"the transformer with {n} layers"
        )
        for n in DEPTHS[1:]
    },
    **{
        f"transformer_{n}_scan": NetworkSpec(
            _transformer(n, scan=True), 16, 15, f"the same, {n} layers by scan"
        )
        for n in DEPTHS
    },
}
