"""The configuration, data, network and batches that all optimizers share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import partnewton as pn
from partnewton.demo import data
from partnewton.demo.models import MODELS, as_function
from partnewton.demo.text import Transformer, standard_library

__all__ = ["BATCH", "Config", "Experiment", "labels_of", "make_writable", "prepare"]

BATCH = 64

PyTree = Any


class Config(NamedTuple):
    """The options of the command line.

    Attributes:
      model: "cnn" or "mlp", for images.
      steps: the number of steps of each optimizer.
      seed: of the split of the digits, the initial weights and the order of batches.
      partition: "per_tensor", "whole", "weights_biases", "per_layer", "blocks:N" or
        "alternate:N".
      data_dir: a folder for :func:`partnewton.demo.data.from_folder`, or None for the
        digits of scikit-learn.
      output: the folder for the figures and the curves.
      problem: "images", "text" for the next character of Python source, or "pinn" for
        :mod:`partnewton.demo.pinn`.
    """

    model: str
    steps: int
    seed: int
    partition: str
    data_dir: Path | None
    output: Path
    problem: str = "images"


class Experiment(NamedTuple):
    """The problem that all optimizers solve.

    Attributes:
      config: the options.
      dataset: the images, or windows of text, as numpy arrays.
      batches: for each step the indices of the images of its batch, (steps, batch).
      params: the initial weights.
      logits_fn: ``logits_fn(params, images)``, a pure function.
      value_fn: the loss, ``value_fn(params, images, labels)``, a pure function.
      param_labels: the partition.
    """

    config: Config
    dataset: data.Dataset
    batches: np.ndarray
    params: PyTree
    logits_fn: Callable[[PyTree, jax.Array], jax.Array]
    value_fn: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    param_labels: Callable[[PyTree], PyTree]


def prepare(config: Config) -> Experiment:
    """Reads the data, builds the network and creates the output folder.

    All errors of a configuration are raised here, before training starts.

    Args:
      config: the options.

    Returns:
      An :class:`Experiment`.

    Raises:
      ValueError, OSError: if the configuration or a file that it names is invalid; the
        message is one line.
      ImportError: if a package that the demonstration needs is missing.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> experiment = prepare(Config("mlp", 5, 0, "whole", None, folder))
      >>> experiment.batches.shape
      (5, 64)
    """
    dataset, model = _dataset_and_model(config)
    params, logits_fn = as_function(model)

    def value_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    param_labels = labels_of(config.partition, params)
    make_writable(config.output)
    batches = batch_indices(len(dataset.train_images), config.steps, config.seed)
    return Experiment(
        config, dataset, batches, params, logits_fn, value_fn, param_labels
    )


def _dataset_and_model(config: Config) -> tuple[data.Dataset, nnx.Module]:
    rngs = nnx.Rngs(config.seed)
    if config.problem == "text":
        if config.data_dir is not None:
            raise ValueError("--data-dir: the text is that of Python's own modules.")
        dataset = standard_library(config.seed)
        return dataset, Transformer(int(dataset.train_labels.max()) + 1, rngs)
    if config.data_dir is None:
        dataset = data.digits(config.seed)
    else:
        dataset = data.from_folder(config.data_dir)
    return dataset, MODELS[config.model](dataset.train_images.shape[1:], rngs)


def labels_of(name: str, params: PyTree) -> Callable[[PyTree], PyTree]:
    """The partition of this name, if these parameters can be divided in this way."""
    kind, colon, count = name.partition(":")
    partition = getattr(pn.partitions, kind)
    param_labels = partition(int(count)) if colon else partition
    try:
        pn.subset_names(params, param_labels)
    except ValueError as error:
        raise ValueError(f"--partition {name}: {error}") from error
    return param_labels


def make_writable(folder: Path) -> None:
    """Creates the output folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {folder}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output {folder}: the folder cannot be written to.")


def batch_indices(count: int, steps: int, seed: int) -> np.ndarray:
    """The indices of the batch of each step; the images are shuffled every epoch."""
    rng = np.random.default_rng(seed)
    size = min(BATCH, count)
    per_epoch = count // size
    epochs = [
        rng.permutation(count)[: per_epoch * size].reshape(per_epoch, size)
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)
