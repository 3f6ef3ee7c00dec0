"""A compiled training run of an optimizer on a problem, for all rates and seeds."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problems_base import Problem
from benchmarks.training_step import training_step

__all__ = ["TrainingCurves", "batches", "evenly_spaced", "timed_run", "train"]

EVALUATIONS = 25
MAX_EVALUATED = 1500

MakeOptimizer = Callable[[jax.Array, int], optax.GradientTransformationExtraArgs]


class TrainingCurves(NamedTuple):
    """Losses before the first step and at `EVALUATIONS` later steps.

    Attributes:
      train_loss: on the training data, (rates, seeds, 1 + EVALUATIONS).
      test_loss: on the test data, of the same shape.
      test_metric: on the test data, of the same shape; smaller is better.
    """

    train_loss: np.ndarray
    test_loss: np.ndarray
    test_metric: np.ndarray


def train(
    problem: Problem, make: MakeOptimizer, rates: np.ndarray, seeds: int
) -> TrainingCurves:
    """Train for each rate and each seed; the program is compiled once.

    Args:
      problem: the problem.
      make: a function of a traced rate and the number of steps that returns an
        optimizer.
      rates: the R rates.
      seeds: the number of seeds, 0, 1, ..., of the initial parameters and of the
        batches.

    Returns:
      TrainingCurves of shape (R, seeds, 1 + EVALUATIONS).
    """
    run = jax.jit(functools.partial(_run, problem, make))
    orders = [jnp.asarray(batches(problem, seed)) for seed in range(seeds)]
    curves = [
        run(jnp.float32(rate), seed, order)
        for rate in rates
        for seed, order in enumerate(orders)
    ]
    fields = (np.stack(jax.device_get(field)) for field in zip(*curves, strict=True))
    return TrainingCurves(*(x.reshape(len(rates), seeds, -1) for x in fields))


def batches(problem: Problem, seed: int) -> np.ndarray:
    """The indices of the examples of each batch; each epoch is a new permutation."""
    rng = np.random.default_rng(seed)
    count = len(problem.train[0])
    per_epoch = count // problem.batch
    epochs = [
        rng.permutation(count)[: per_epoch * problem.batch].reshape(per_epoch, -1)
        for _ in range(-(-problem.steps // per_epoch))
    ]
    return np.concatenate(epochs)[: problem.steps].astype(np.int32)


def timed_run(
    problem: Problem,
    make: MakeOptimizer,
    rates: np.ndarray,
    *,
    steps: int | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Callable[[], float]:
    """A function that runs all steps, without evaluation, and returns the time of one.

    It is compiled here. The rate is the one in the middle of the grid.
    """
    rate = np.sort(rates)[len(rates) // 2]
    order = jnp.asarray(batches(problem, 0))[:steps]
    params = problem.init(jax.random.key(0))

    @jax.jit
    def run(params: Any, order: jax.Array) -> Any:
        tx = optax.with_extra_args_support(make(jnp.float32(rate), problem.steps))
        step = _stepper(problem, tx)
        return jax.lax.scan(step, (params, tx.init(params)), order)[0]

    def seconds_per_step() -> float:
        begin = clock()
        jax.block_until_ready(run(params, order))
        return (clock() - begin) / len(order)

    seconds_per_step()
    return seconds_per_step


def _run(
    problem: Problem,
    make: MakeOptimizer,
    rate: jax.Array,
    seed: jax.Array,
    order: jax.Array,
) -> tuple[jax.Array, ...]:
    tx = optax.with_extra_args_support(make(rate, problem.steps))
    train_x, train_y = map(jnp.asarray, evenly_spaced(problem.train))
    test_x, test_y = map(jnp.asarray, evenly_spaced(problem.test))
    step = _stepper(problem, tx)

    def evaluate(params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (
            problem.loss(params, train_x, train_y),
            problem.loss(params, test_x, test_y),
            problem.metric(params, test_x, test_y),
        )

    def chunk(carry: Any, indices: jax.Array) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, indices)
        return carry, evaluate(carry[0])

    params = problem.init(jax.random.key(seed))
    length = problem.steps // EVALUATIONS
    order = order[: length * EVALUATIONS].reshape(EVALUATIONS, length, -1)
    _, curves = jax.lax.scan(chunk, (params, tx.init(params)), order)
    first = evaluate(params)
    return tuple(
        jnp.concatenate([a[None], b]) for a, b in zip(first, curves, strict=True)
    )


def _stepper(
    problem: Problem, tx: optax.GradientTransformationExtraArgs
) -> Callable[[Any, jax.Array], tuple[Any, None]]:
    """A training step for `scan`, which receives the indices of a batch."""
    train_x, train_y = map(jnp.asarray, problem.train)
    step = training_step(lambda params, batch: problem.loss(params, *batch), tx)

    def scan_step(carry: Any, indices: jax.Array) -> tuple[Any, None]:
        params, state, _ = step(*carry, (train_x[indices], train_y[indices]))
        return (params, state), None

    return scan_step


def evenly_spaced(
    data: tuple[np.ndarray, ...], limit: int = MAX_EVALUATED
) -> tuple[np.ndarray, ...]:
    """At most `limit` examples, evenly spaced."""
    count = min(len(data[0]), limit)
    indices = np.linspace(0, len(data[0]) - 1, count).astype(int)
    return tuple(x[indices] for x in data)
