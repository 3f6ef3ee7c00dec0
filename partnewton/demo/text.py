"""Text of Python's standard library, and a small transformer that predicts it.

The text is the source of modules that are part of every Python; nothing is downloaded.
"""

import argparse
import difflib
import inspect
import json.decoder
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from partnewton.demo.data import Dataset

__all__ = ["LENGTH", "Transformer", "standard_library"]

LENGTH = 32
"""The number of characters of a window."""

MODULES = (argparse, textwrap, json.decoder, difflib)
TEST_FRACTION = 0.1


def standard_library(seed: int = 0) -> Dataset:
    """Windows of source code; the labels are the characters one position later.

    Args:
      seed: the seed of the order of the training windows. The test windows are those at
        the end of the text.

    Returns:
      A :class:`~partnewton.demo.data.Dataset`, whose images are windows of character
      codes, (N, LENGTH), int32, and whose labels have the same shape.

    Raises:
      OSError: the source of the modules is not installed.

    Example:
      >>> windows, following = standard_library()[:2]
      >>> windows.shape[1], bool(np.all(windows[:, 1:] == following[:, :-1]))
      (32, True)
    """
    text = "".join(map(inspect.getsource, MODULES))
    codes = np.unique(list(text), return_inverse=True)[1].astype(np.int32)
    count = (len(codes) - 1) // LENGTH
    inputs = codes[: count * LENGTH].reshape(count, LENGTH)
    labels = codes[1 : count * LENGTH + 1].reshape(count, LENGTH)
    split = count - int(TEST_FRACTION * count)
    order = np.random.default_rng(seed).permutation(split)
    return Dataset(
        inputs[:split][order],
        labels[:split][order],
        inputs[split:],
        labels[split:],
        "source of Python's standard library",
    )


class Transformer(nnx.Module):
    """One block of attention and a perceptron: 16 tensors."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs, width: int = 32):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(LENGTH, width, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, width, use_bias=False, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.output = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x) + self.position(jnp.arange(x.shape[-1]))
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.output(x)
