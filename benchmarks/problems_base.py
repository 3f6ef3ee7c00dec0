"""The type of a problem, and losses, metrics and data that several problems use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

from benchmarks import networks

__all__ = [
    "Data",
    "Problem",
    "cross_entropy",
    "digits",
    "error_rate",
    "huber",
    "one_hot_squared",
    "problem",
    "split",
    "squared",
    "standardised",
    "supervised",
]

PyTree = Any
Data = tuple[np.ndarray, np.ndarray]


class Problem(NamedTuple):
    """A network, a loss, data, and the length of a run.

    Attributes:
      name: as on the command line.
      init: a function from a key to parameters.
      loss: ``loss(params, x, y)``, a mean over the examples.
      metric: ``metric(params, x, y)``, evaluated on the test data; smaller is better.
      train, test: inputs and targets.
      batch: the batch size.
      steps: the number of steps of a run.
    """

    name: str
    init: Callable[[jax.Array], PyTree]
    loss: Callable[..., jax.Array]
    metric: Callable[..., jax.Array]
    train: Data
    test: Data
    batch: int
    steps: int

    @property
    def is_full_batch(self) -> bool:
        """Whether each step uses all of the training data."""
        return self.batch == len(self.train[0])


# --- Losses and metrics, from the outputs of a network -----------------------------


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def error_rate(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(outputs, -1) != y)


def squared(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


def huber(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.huber_loss(outputs, y).mean()


def one_hot_squared(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return squared(outputs, jax.nn.one_hot(y, outputs.shape[-1]))


# --- Data --------------------------------------------------------------------------


def split(x: np.ndarray, y: np.ndarray) -> tuple[Data, Data]:
    x = np.asarray(x, np.float32)
    y = np.asarray(y, np.int32 if np.issubdtype(y.dtype, np.integer) else np.float32)
    a, b, c, d = train_test_split(x, y, test_size=0.2, random_state=0)
    return (a, c), (b, d)


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def digits() -> tuple[Data, Data]:
    """8 x 8 images as rows of 64 numbers between 0 and 1."""
    x, y = datasets.load_digits(return_X_y=True)
    return split(x / 16, y)


# --- Problems ----------------------------------------------------------------------


def supervised(
    name: str,
    data: Callable[[], tuple[Data, Data]],
    network: networks.Network,
    loss: Callable = cross_entropy,
    metric: Callable | None = None,
    batch: int | None = 64,
    steps: int = 1000,
) -> Problem:
    """A problem whose loss and metric are functions of outputs and targets."""
    train, test = data()
    metric = metric or (
        error_rate if loss in (cross_entropy, one_hot_squared) else loss
    )
    return Problem(
        name,
        network.init,
        lambda params, x, y: loss(network.apply(params, x), y),
        lambda params, x, y: metric(network.apply(params, x), y),
        train,
        test,
        len(train[0]) if batch is None else batch,
        steps,
    )


def problem(*args: Any, **kwargs: Any) -> Callable[[str], Problem]:
    """:func:`supervised` without its first argument, the name."""

    def make(name: str) -> Problem:
        return supervised(name, *args, **kwargs)

    return make
