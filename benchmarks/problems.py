"""Small problems to train on: data, a network, a loss and a metric.

Nothing is fetched: data are drawn, or come with scikit-learn or with Python itself. The
defaults of the library were chosen on both sets; `SECOND` was added to show what
`FIRST` does not: sparse rows, badly scaled inputs, regressions with many frequencies.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

from benchmarks import problems_models as models
from benchmarks.problems_text import windows

__all__ = ["FIRST", "SECOND", "Problem", "make"]

PyTree = Any
Data = tuple[np.ndarray, np.ndarray]


class Problem(NamedTuple):
    """What is trained, on what, and for how long.

    Attributes:
      name: as on the command line.
      init: from a key to parameters.
      loss: ``loss(params, x, y)``, a mean over the examples.
      metric: ``metric(params, x, y)``, what the test is about; smaller is better.
      train, test: inputs and targets.
      batch: the examples of a step; all of them for a full batch.
      steps: how many steps make a run.
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
        """Whether each step sees all of the data."""
        return self.batch == len(self.train[0])


def make(name: str) -> Problem:
    """The problem called `name`, one of `FIRST` or `SECOND`."""
    return (FIRST | SECOND)[name](name)


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


def _split(x: np.ndarray, y: np.ndarray) -> tuple[Data, Data]:
    x = np.asarray(x, np.float32)
    y = np.asarray(y, np.int32 if np.issubdtype(y.dtype, np.integer) else np.float32)
    a, b, c, d = train_test_split(x, y, test_size=0.2, random_state=0)
    return (a, c), (b, d)


def _standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def _digits() -> tuple[Data, Data]:
    x, y = datasets.load_digits(return_X_y=True)
    return _split(x / 16, y)


def _digits_themselves() -> tuple[Data, Data]:
    (x, _), (x_test, _) = _digits()
    return (x, x), (x_test, x_test)


def _noisy_digits() -> tuple[Data, Data]:
    """A fifth of the labels to train on are drawn at random."""
    (x, y), test = _digits()
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 10, len(y)).astype(y.dtype)
    return (x, np.where(rng.random(len(y)) < 0.2, drawn, y)), test


def _few_digits() -> tuple[Data, Data]:
    (x, y), test = _digits()
    return (x[:500], y[:500]), test


def _table(load: Callable, regression: bool = False) -> tuple[Data, Data]:
    x, y = load(return_X_y=True)
    x = _standardised(x)
    return _split(x, _standardised(y)[:, None] if regression else y)


# --- The problems ------------------------------------------------------------------


def _supervised(
    name: str,
    data: Callable[[], tuple[Data, Data]],
    network: models.Network,
    loss: Callable = cross_entropy,
    metric: Callable | None = None,
    batch: int | None = 64,
    steps: int = 1000,
) -> Problem:
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


def _problem(*args: Any, **kwargs: Any) -> Callable[[str], Problem]:
    named = dict(zip(_FIELDS, args, strict=False))
    return functools.partial(_supervised, **named, **kwargs)


_FIELDS = ("data", "network", "loss", "metric", "batch", "steps")
_tanh, _relu, _gelu = jnp.tanh, jax.nn.relu, jax.nn.gelu

FIRST: dict[str, Callable[[str], Problem]] = {
    "digits_tanh": _problem(_digits, models.mlp([64, 64, 64, 10], _tanh)),
    "digits_relu": _problem(_digits, models.mlp([64, 128, 128, 10], _relu)),
    "ten_layers": _problem(_digits, models.mlp([64] + [32] * 9 + [10], _tanh)),
    "cnn": _problem(_digits, models.cnn(8, [12, 24], 10), steps=600),
    "autoencoder": _problem(
        _digits_themselves, models.mlp([64, 48, 12, 48, 64], _tanh), squared
    ),
    "relu_squared": _problem(
        _digits, models.mlp([64, 64, 64, 10], _relu), one_hot_squared
    ),
    "full_batch": _problem(
        _few_digits, models.mlp([64, 32, 32, 10], _tanh), batch=None, steps=300
    ),
    "label_noise": _problem(
        _noisy_digits, models.mlp([64, 64, 64, 10], _tanh), batch=16
    ),
    "breast_cancer": _problem(
        functools.partial(_table, datasets.load_breast_cancer),
        models.mlp([30, 32, 32, 2], _relu),
        batch=32,
    ),
    "diabetes": _problem(
        functools.partial(_table, datasets.load_diabetes, regression=True),
        models.mlp([10, 32, 32, 1], _tanh),
        squared,
        batch=32,
    ),
    "transformer": _problem(
        functools.partial(windows, length=24, count=512),
        models.transformer(vocabulary=64, width=32, heads=2, layers=1, length=24),
        batch=16,
        steps=400,
    ),
    "lstm": _problem(
        functools.partial(windows, length=24, count=4096),
        models.lstm(vocabulary=64, width=48),
        batch=32,
        steps=600,
    ),
}


def _spirals() -> tuple[Data, Data]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 1200)
    t = 3 * np.pi * np.sqrt(rng.random(1200)) + 0.3
    x = np.stack([np.cos(t + np.pi * y), np.sin(t + np.pi * y)], 1) * t[:, None] / 5
    return _split(x + 0.03 * rng.normal(size=x.shape), y)


def _raw_table() -> tuple[Data, Data]:
    """Features of very different size, as they come."""
    x, y = datasets.load_wine(return_X_y=True)
    return _split(x / 10, y)


def _ratings() -> tuple[Data, Data]:
    rng = np.random.default_rng(2)
    rows, columns = rng.normal(size=(80, 4)), rng.normal(size=(60, 4))
    x = np.stack([rng.integers(0, 80, 4000), rng.integers(0, 60, 4000)], 1)
    y = np.sum(rows[x[:, 0]] * columns[x[:, 1]], 1) / 2 + 0.1 * rng.normal(size=4000)
    (a, c), (b, d) = _split(x, y)
    return (a.astype(np.int32), c), (b.astype(np.int32), d)


def _outliers() -> tuple[Data, Data]:
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (2000, 4))
    y = np.sin(3 * x[:, :1]) * x[:, 1:2] + np.abs(x[:, 2:3])
    y = y + np.where(rng.random((2000, 1)) < 0.05, 5 * rng.normal(size=(2000, 1)), 0)
    return _split(x, y)


def _blobs() -> tuple[Data, Data]:
    """Linearly inseparable, badly conditioned: for logistic regression."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3000, 40)) * np.geomspace(0.01, 3, 40)
    y = (x @ rng.normal(size=(40, 5)) / np.geomspace(0.05, 3, 40).mean()).argmax(1)
    y = np.where(rng.random(3000) < 0.1, rng.integers(0, 5, 3000), y)
    return _split(x, y)


def _curve() -> tuple[Data, Data]:
    x = np.random.default_rng(5).uniform(-1, 1, (800, 1))
    return _split(x, np.sin(8 * x) + 0.5 * np.sin(25 * x))


SECOND: dict[str, Callable[[str], Problem]] = {
    "logistic": _problem(_blobs, models.mlp([40, 5], _tanh)),
    "spirals": _problem(_spirals, models.mlp([2, 32, 32, 2], _tanh)),
    "raw_wine": _problem(_raw_table, models.mlp([13, 32, 3], _relu), batch=32),
    "ratings": _problem(_ratings, models.factors(80, 60, 4), squared),
    "outliers": _problem(_outliers, models.mlp([4, 48, 48, 1], _gelu), huber),
    "residual": _problem(_digits, models.residual(64, 48, 4, 10), steps=600),
    "wide": _problem(_digits, models.mlp([64, 512, 10], _relu), steps=600),
    "curve": _problem(
        _curve, models.mlp([1, 48, 48, 48, 1], _tanh), squared, batch=128
    ),
    "full_batch_regression": _problem(
        functools.partial(_table, datasets.load_diabetes, regression=True),
        models.mlp([10, 16, 16, 1], _tanh),
        squared,
        batch=None,
        steps=300,
    ),
}
