"""ResNet-18 for small images, in Flax NNX."""

from collections.abc import Sequence

import jax
from flax import nnx

__all__ = ["ResNet"]

_kernel_init = jax.nn.initializers.he_normal()


class ResidualBlock(nnx.Module):
    """Two convolutions around a shortcut, as in He et al., arXiv 1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        def conv(size: int, channels: int, strides: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                outputs,
                (size, size),
                strides=strides,
                use_bias=False,
                kernel_init=_kernel_init,
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


class ResNet(nnx.Module):
    """ResNet-18 for images of 32 x 32: the first layer is 3 x 3, without pooling."""

    def __init__(
        self, widths: Sequence[int], classes: int, rngs: nnx.Rngs, inputs: int = 3
    ):
        self.conv = nnx.Conv(inputs, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(widths[0], rngs=rngs)
        blocks, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            blocks.append(ResidualBlock(inputs, width, 1 if stage == 0 else 2, rngs))
            blocks.append(ResidualBlock(width, width, 1, rngs))
            inputs = width
        self.blocks = nnx.List(blocks)
        self.output = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean(axis=(1, 2)))
