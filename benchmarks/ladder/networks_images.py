"""Convolutional networks for images of one channel, and a vision transformer."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from benchmarks import networks, resnet
from benchmarks.ladder.rung import Module
from benchmarks.networks import Network, affine, conv, dense_params

__all__ = ["lenet", "normalised_cnn", "plain_cnn", "resnet18", "unet", "vit"]

PyTree = Any
CLASSES = 10
MOMENTUM = 0.9  # of running statistics
he_normal = jax.nn.initializers.he_normal()


def lenet(scale: int = 1) -> Network:
    """LeNet for 28 x 28: convolutions of 6 and 16, dense layers of 120 and 84, tanh."""
    first, second, third, fourth = (-(-x // scale) for x in (6, 16, 120, 84))

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 5)
        return {
            "conv_0": dense_params(keys[0], 5, 5, 1, first),
            "conv_1": dense_params(keys[1], 5, 5, first, second),
            "dense_0": dense_params(keys[2], 7 * 7 * second, third),
            "dense_1": dense_params(keys[3], third, fourth),
            "dense_2": dense_params(keys[4], fourth, CLASSES),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for name in ("conv_0", "conv_1"):
            x = linen.max_pool(jnp.tanh(conv(params[name], x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for name in ("dense_0", "dense_1"):
            x = jnp.tanh(affine(params[name], x))
        return affine(params["dense_2"], x)

    return Network(init, apply)


def plain_cnn(plan: Sequence[int | str], places: int) -> Network:
    """3 x 3 convolutions with elu and poolings, as in VGG, and one dense layer.

    Args:
      plan: the channels of a convolution, or "pool", in order.
      places: the number of pixels that are left at the end.
    """
    channels = [1] + [x for x in plan if x != "pool"]

    def init(key: jax.Array) -> PyTree:
        output, *keys = jax.random.split(key, len(channels))
        shapes = itertools.pairwise(channels)
        layers = [
            dense_params(k, 3, 3, *shape, kernel_init=he_normal)
            for k, shape in zip(keys, shapes, strict=True)
        ]
        return {
            "convolutions": layers,
            "output": dense_params(output, places * channels[-1], CLASSES),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        layers = iter(params["convolutions"])
        for step in plan:
            if step == "pool":
                x = linen.max_pool(x, (2, 2), (2, 2))
            else:
                x = jax.nn.elu(conv(next(layers), x))
        return affine(params["output"], x.reshape(len(x), -1))

    return Network(init, apply)


def batch_norm(
    layer: PyTree, stats: PyTree, x: jax.Array, training: bool
) -> tuple[jax.Array, PyTree]:
    """Batch norm over all axes but the last, and new running statistics."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if training:
        axes = tuple(range(x.ndim - 1))
        now = {"mean": wide.mean(axes), "var": wide.var(axes)}
        new = jax.tree.map(lambda a, b: MOMENTUM * a + (1 - MOMENTUM) * b, stats, now)
    else:
        now = new = stats
    normed = (wide - now["mean"]) * jax.lax.rsqrt(now["var"] + 1e-5)
    return (normed * layer["scale"] + layer["bias"]).astype(x.dtype), new


def normalised_cnn(channels: Sequence[int], strides: Sequence[int]) -> Module:
    """3 x 3 convolutions with batch norm and relu, a mean of pixels, a dense layer."""

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        output, *keys = jax.random.split(key, len(channels) + 1)
        shapes = itertools.pairwise((1, *channels))
        params: PyTree = {"output": dense_params(output, channels[-1], CLASSES)}
        stats: PyTree = {}
        for n, (k, shape) in enumerate(zip(keys, shapes, strict=True)):
            params[f"conv_{n}"] = he_normal(k, (3, 3, *shape))
            params[f"norm_{n}"] = networks.norm_params(shape[1])
            stats[f"norm_{n}"] = {
                "mean": jnp.zeros(shape[1]),
                "var": jnp.ones(shape[1]),
            }
        return params, stats

    def apply(params: PyTree, stats: PyTree, x: jax.Array, training: bool) -> tuple:
        new: PyTree = {}
        for n, stride in enumerate(strides):
            # A bias before batch norm would have no effect.
            x = conv({"kernel": params[f"conv_{n}"], "bias": 0}, x, stride)
            name = f"norm_{n}"
            x, new[name] = batch_norm(params[name], stats[name], x, training)
            x = jax.nn.relu(x)
        return affine(params["output"], x.mean((1, 2))), new

    return Module(init, apply)


def resnet18(widths: Sequence[int]) -> Module:
    """ResNet-18 for 32 x 32, of :mod:`benchmarks.resnet`, in Flax NNX."""

    def make(key: jax.Array) -> tuple[Any, PyTree, PyTree, PyTree]:
        model = resnet.ResNet(widths, CLASSES, nnx.Rngs(key), inputs=1)
        return nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, stats, _ = make(key)
        return params, stats

    graphdef, _, _, rest = make(jax.random.key(0))

    def apply(params: PyTree, stats: PyTree, x: jax.Array, training: bool) -> tuple:
        model = nnx.merge(graphdef, params, stats, rest, copy=True)
        model.set_attributes(use_running_average=not training, raise_if_not_found=False)
        outputs = model(x)
        return outputs, nnx.state(model, nnx.BatchStat)

    return Module(init, apply)


def unet(channels: Sequence[int]) -> Network:
    """Two convolutions per resolution; strides down, repetition up; with skips."""

    def init(key: jax.Array) -> PyTree:
        keys = iter(jax.random.split(key, 4 * len(channels) + 2))

        def pair(inputs: int, outputs: int) -> PyTree:
            return [
                dense_params(next(keys), 3, 3, inputs, outputs, kernel_init=he_normal),
                dense_params(next(keys), 3, 3, outputs, outputs, kernel_init=he_normal),
            ]

        levels = list(itertools.pairwise((1, *channels)))
        ups = list(itertools.pairwise(channels))[::-1]
        return {
            "down": [pair(*shape) for shape in levels],
            "up": [pair(low + high, low) for low, high in ups],
            "output": dense_params(next(keys), 1, 1, channels[0], 1),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        skips = []
        for level, (a, b) in enumerate(params["down"]):
            x = jax.nn.relu(conv(a, x, stride=1 if level == 0 else 2))
            x = jax.nn.relu(conv(b, x))
            skips.append(x)
        for (a, b), skip in zip(params["up"], skips[-2::-1], strict=True):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = jnp.concatenate([x, skip], -1)
            x = jax.nn.relu(conv(b, jax.nn.relu(conv(a, x))))
        return conv(params["output"], x)

    return Network(init, apply)


def vit(size: int, patch: int, width: int, heads: int, layers: int) -> Network:
    """A vision transformer: patches, blocks, a mean over the patches, a dense layer."""
    side = size // patch

    def init(key: jax.Array) -> PyTree:
        patches, position, head, *keys = jax.random.split(key, 4 * layers + 3)
        return {
            "patches": dense_params(patches, patch * patch, width),
            "position": 0.1 * jax.random.normal(position, (side * side, width)),
            "blocks": [
                networks.attention_block_params(keys[4 * i : 4 * i + 4], width, 4)
                for i in range(layers)
            ],
            "norm": networks.norm_params(width),
            "head": dense_params(head, width, CLASSES),
        }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), side, patch, side, patch)
        x = x.swapaxes(2, 3).reshape(len(x), side * side, patch * patch)
        x = affine(params["patches"], x) + params["position"]
        for block in params["blocks"]:
            x = networks.attention_block(block, x, heads, is_causal=False)
        x = networks.layer_norm(params["norm"], x)
        return affine(params["head"], x.mean(1))

    return Network(init, apply)
