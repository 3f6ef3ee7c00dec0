"""The type of a rung: a network with its data, its loss, and the length of a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks

__all__ = ["Batch", "Module", "Rung", "stateless", "supervised"]

PyTree = Any
Batch = tuple[jax.Array, ...]  # inputs, possibly several arrays, and targets


class Module(NamedTuple):
    """A network whose layers may have running statistics.

    Attributes:
      init: ``init(key) -> (params, stats)``.
      apply: ``apply(params, stats, x, training) -> (outputs, stats)``; in training,
        batch norm uses the statistics of the batch and returns new running ones.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]


class Rung(NamedTuple):
    """A network, a loss and data.

    Attributes:
      init: ``init(key) -> (params, stats)``.
      loss: ``loss(params, stats, batch, training) -> (value, stats)``, a mean over the
        examples of the batch.
      metric: ``metric(params, stats, batch)``; smaller is better.
      metric_name: for the header of a table.
      train, test: arrays with one leading axis, the examples.
      batch: the batch size.
      steps: the number of steps of a run.
      augment: ``augment(key, batch) -> batch``, applied to batches of training.
      evaluated: how many training and how many test examples are evaluated.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[..., tuple[jax.Array, PyTree]]
    metric: Callable[..., jax.Array]
    metric_name: str
    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    batch: int
    steps: int
    augment: Callable[[jax.Array, Batch], Batch] | None = None
    evaluated: int = 1024


def stateless(network: networks.Network) -> Module:
    """A network without running statistics."""
    return Module(
        lambda key: (network.init(key), {}),
        lambda params, stats, x, training: (network.apply(params, x), stats),
    )


def supervised(
    module: Module | networks.Network,
    train: tuple[np.ndarray, ...],
    test: tuple[np.ndarray, ...],
    criterion: Callable[[jax.Array, jax.Array], jax.Array],
    metric: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    metric_name: str,
    batch: int,
    steps: int,
    dtype: Any = None,
    **options: Any,
) -> Rung:
    """A rung whose loss and metric are functions of the outputs and the targets.

    Args:
      module: the network; it receives all arrays of a batch but the last, which is the
        target, as a tuple if there are several.
      train, test: arrays with one leading axis, the examples.
      criterion, metric: of float32 outputs and targets.
      metric_name, batch, steps: as in :class:`Rung`.
      dtype: of parameters and inputs in the network, bfloat16 for example; the
        parameters that are trained stay float32.
      **options: further attributes of :class:`Rung`.
    """
    kernel = isinstance(module, networks.Network)
    module = stateless(module) if kernel else module

    def apply(params: PyTree, stats: PyTree, batch: Batch, training: bool) -> tuple:
        x = batch[0] if len(batch) == 2 else batch[:-1]
        if dtype is None:
            return module.apply(params, stats, x, training)
        params, x = _cast((params, x), dtype)
        outputs, stats = module.apply(params, stats, x, training)
        return outputs.astype(jnp.float32), stats

    def loss(params: PyTree, stats: PyTree, batch: Batch, training: bool) -> tuple:
        outputs, stats = apply(params, stats, batch, training)
        return criterion(outputs, batch[-1]), stats

    def measure(params: PyTree, stats: PyTree, batch: Batch) -> jax.Array:
        return metric(apply(params, stats, batch, False)[0], batch[-1])

    return Rung(
        module.init, loss, measure, metric_name, train, test, batch, steps, **options
    )


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)
