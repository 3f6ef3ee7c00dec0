"""The networks of the demonstration."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from partnewton.demo import data

__all__ = ["MODELS", "Convolutional", "Perceptron", "as_function"]

PyTree = Any


class Convolutional(nnx.Module):
    """Two convolutions and two dense layers: 8 tensors."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs):
        height, width, channels = image_shape
        features = -(-height // 4) * -(-width // 4) * 32  # after two strides of 2
        self.conv1 = nnx.Conv(channels, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(features, 64, rngs=rngs)
        self.output = nnx.Linear(64, data.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.conv2(jnp.tanh(self.conv1(x))))
        x = jnp.tanh(self.hidden(x.reshape(len(x), -1)))
        return self.output(x)


class Perceptron(nnx.Module):
    """Three dense layers: 6 tensors."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(int(np.prod(image_shape)), 64, rngs=rngs)
        self.hidden2 = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, data.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.hidden1(x.reshape(len(x), -1)))
        x = jnp.tanh(self.hidden2(x))
        return self.output(x)


MODELS = {"cnn": Convolutional, "mlp": Perceptron}


def as_function(
    model: nnx.Module,
) -> tuple[PyTree, Callable[[PyTree, jax.Array], jax.Array]]:
    """The weights of a network, and the network as a pure function of them."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits_fn(params: PyTree, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    return params, logits_fn
