"""Small training problems: data, a network, a loss and a metric.

Nothing is downloaded: data are random, or part of scikit-learn or Python. The defaults
of the library were tuned on `FIRST` and `SECOND`; the latter contains sparse rows,
badly scaled inputs, and regressions with several frequencies. No default was tuned on
`UNSEEN`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from benchmarks import networks
from benchmarks.problems_base import (
    Data,
    Problem,
    digits,
    huber,
    one_hot_squared,
    problem,
    split,
    squared,
    standardised,
)
from benchmarks.problems_text import windows
from benchmarks.problems_unseen import UNSEEN

__all__ = ["FIRST", "SECOND", "UNSEEN", "Problem", "make"]


def make(name: str) -> Problem:
    """The problem with this name, of `FIRST`, `SECOND` or `UNSEEN`."""
    return (FIRST | SECOND | UNSEEN)[name](name)


# --- Data --------------------------------------------------------------------------


def _digits_as_targets() -> tuple[Data, Data]:
    (x, _), (x_test, _) = digits()
    return (x, x), (x_test, x_test)


def _noisy_digits() -> tuple[Data, Data]:
    """A fifth of the training labels are random."""
    (x, y), test = digits()
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 10, len(y)).astype(y.dtype)
    return (x, np.where(rng.random(len(y)) < 0.2, drawn, y)), test


def _few_digits() -> tuple[Data, Data]:
    (x, y), test = digits()
    return (x[:500], y[:500]), test


def _table(load: Callable, regression: bool = False) -> tuple[Data, Data]:
    x, y = load(return_X_y=True)
    x = standardised(x)
    return split(x, standardised(y)[:, None] if regression else y)


# --- The problems ------------------------------------------------------------------


_tanh, _relu, _gelu = jnp.tanh, jax.nn.relu, jax.nn.gelu

FIRST: dict[str, Callable[[str], Problem]] = {
    "digits_tanh": problem(digits, networks.mlp([64, 64, 64, 10], _tanh)),
    "digits_relu": problem(digits, networks.mlp([64, 128, 128, 10], _relu)),
    "ten_layers": problem(digits, networks.mlp([64] + [32] * 9 + [10], _tanh)),
    "cnn": problem(digits, networks.cnn(8, [12, 24], 10), steps=600),
    "autoencoder": problem(
        _digits_as_targets, networks.mlp([64, 48, 12, 48, 64], _tanh), squared
    ),
    "relu_squared": problem(
        digits, networks.mlp([64, 64, 64, 10], _relu), one_hot_squared
    ),
    "full_batch": problem(
        _few_digits, networks.mlp([64, 32, 32, 10], _tanh), batch=None, steps=300
    ),
    "label_noise": problem(
        _noisy_digits, networks.mlp([64, 64, 64, 10], _tanh), batch=16
    ),
    "breast_cancer": problem(
        functools.partial(_table, datasets.load_breast_cancer),
        networks.mlp([30, 32, 32, 2], _relu),
        batch=32,
    ),
    "diabetes": problem(
        functools.partial(_table, datasets.load_diabetes, regression=True),
        networks.mlp([10, 32, 32, 1], _tanh),
        squared,
        batch=32,
    ),
    "transformer": problem(
        functools.partial(windows, length=24, count=512),
        networks.transformer(vocabulary=64, width=32, heads=2, layers=1, length=24),
        batch=16,
        steps=400,
    ),
    "lstm": problem(
        functools.partial(windows, length=24, count=4096),
        networks.lstm(vocabulary=64, width=48),
        batch=32,
        steps=600,
    ),
}


def _spirals() -> tuple[Data, Data]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 1200)
    t = 3 * np.pi * np.sqrt(rng.random(1200)) + 0.3
    x = np.stack([np.cos(t + np.pi * y), np.sin(t + np.pi * y)], 1) * t[:, None] / 5
    return split(x + 0.03 * rng.normal(size=x.shape), y)


def _raw_table() -> tuple[Data, Data]:
    """Features of very different scales, not standardised."""
    x, y = datasets.load_wine(return_X_y=True)
    return split(x / 10, y)


def _ratings() -> tuple[Data, Data]:
    rng = np.random.default_rng(2)
    rows, columns = rng.normal(size=(80, 4)), rng.normal(size=(60, 4))
    x = np.stack([rng.integers(0, 80, 4000), rng.integers(0, 60, 4000)], 1)
    y = np.sum(rows[x[:, 0]] * columns[x[:, 1]], 1) / 2 + 0.1 * rng.normal(size=4000)
    (a, c), (b, d) = split(x, y)
    return (a.astype(np.int32), c), (b.astype(np.int32), d)


def _outliers() -> tuple[Data, Data]:
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (2000, 4))
    y = np.sin(3 * x[:, :1]) * x[:, 1:2] + np.abs(x[:, 2:3])
    y = y + np.where(rng.random((2000, 1)) < 0.05, 5 * rng.normal(size=(2000, 1)), 0)
    return split(x, y)


def _blobs() -> tuple[Data, Data]:
    """Classes that are not linearly separable, with badly conditioned features."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3000, 40)) * np.geomspace(0.01, 3, 40)
    y = (x @ rng.normal(size=(40, 5)) / np.geomspace(0.05, 3, 40).mean()).argmax(1)
    y = np.where(rng.random(3000) < 0.1, rng.integers(0, 5, 3000), y)
    return split(x, y)


def _curve() -> tuple[Data, Data]:
    x = np.random.default_rng(5).uniform(-1, 1, (800, 1))
    return split(x, np.sin(8 * x) + 0.5 * np.sin(25 * x))


SECOND: dict[str, Callable[[str], Problem]] = {
    "logistic": problem(_blobs, networks.mlp([40, 5], _tanh)),
    "spirals": problem(_spirals, networks.mlp([2, 32, 32, 2], _tanh)),
    "raw_wine": problem(_raw_table, networks.mlp([13, 32, 3], _relu), batch=32),
    "ratings": problem(_ratings, networks.factors(80, 60, 4), squared),
    "outliers": problem(_outliers, networks.mlp([4, 48, 48, 1], _gelu), huber),
    "residual": problem(digits, networks.residual(64, 48, 4, 10), steps=600),
    "wide": problem(digits, networks.mlp([64, 512, 10], _relu), steps=600),
    "curve": problem(
        _curve, networks.mlp([1, 48, 48, 48, 1], _tanh), squared, batch=128
    ),
    "full_batch_regression": problem(
        functools.partial(_table, datasets.load_diabetes, regression=True),
        networks.mlp([10, 16, 16, 1], _tanh),
        squared,
        batch=None,
        steps=300,
    ),
}
