"""One compiled run of an optimizer on a problem, for many rates and seeds."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problems import Problem

__all__ = ["Curves", "batches", "seconds_a_step", "train"]

EVALUATIONS = 25
MOST_EVALUATED = 1500

MakeOptimizer = Callable[[jax.Array, int], optax.GradientTransformationExtraArgs]


class Curves(NamedTuple):
    """What is recorded before the first step and at `EVALUATIONS` places after it.

    Attributes:
      train_loss: on the data to train on, (rates, seeds, 1 + EVALUATIONS).
      test_loss: on the data to test on.
      test_metric: on the data to test on; smaller is better.
    """

    train_loss: np.ndarray
    test_loss: np.ndarray
    test_metric: np.ndarray


def train(
    problem: Problem, make: MakeOptimizer, rates: np.ndarray, seeds: int
) -> Curves:
    """Trains for each rate and each seed; the program is compiled once.

    Args:
      problem: what to train on.
      make: from a rate, traced, and the number of steps to an optimizer.
      rates: of which there are R.
      seeds: of the initial parameters and the order of the batches: 0, 1, ...

    Returns:
      Curves of shape (R, seeds, 1 + EVALUATIONS).
    """
    run = jax.jit(functools.partial(_run, problem, make))
    orders = [jnp.asarray(batches(problem, seed)) for seed in range(seeds)]
    curves = [
        run(jnp.float32(rate), seed, order)
        for rate in rates
        for seed, order in enumerate(orders)
    ]
    fields = (np.stack(jax.device_get(field)) for field in zip(*curves, strict=True))
    return Curves(*(x.reshape(len(rates), seeds, -1) for x in fields))


def batches(problem: Problem, seed: int) -> np.ndarray:
    """For each step the places of a batch; each epoch shuffles all examples anew."""
    rng = np.random.default_rng(seed)
    count = len(problem.train[0])
    a_epoch = count // problem.batch
    epochs = [
        rng.permutation(count)[: a_epoch * problem.batch].reshape(a_epoch, -1)
        for _ in range(-(-problem.steps // a_epoch))
    ]
    return np.concatenate(epochs)[: problem.steps].astype(np.int32)


def seconds_a_step(problem: Problem, make: MakeOptimizer, rate: float) -> float:
    """The time of a step, the best of 3 runs of some hundred without evaluation."""
    order = jnp.asarray(batches(problem, 0))[:200]
    params = problem.init(jax.random.key(0))

    @jax.jit
    def run(params: Any, order: jax.Array) -> Any:
        tx = optax.with_extra_args_support(make(jnp.float32(rate), problem.steps))
        step = _stepper(problem, tx)
        return jax.lax.scan(step, (params, tx.init(params)), order)[0]

    jax.block_until_ready(run(params, order))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(params, order))
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / len(order)


def _run(
    problem: Problem,
    make: MakeOptimizer,
    rate: jax.Array,
    seed: jax.Array,
    order: jax.Array,
) -> tuple[jax.Array, ...]:
    tx = optax.with_extra_args_support(make(rate, problem.steps))
    seen_x, seen_y = map(jnp.asarray, _spread(problem.train))
    test_x, test_y = map(jnp.asarray, _spread(problem.test))
    step = _stepper(problem, tx)

    def evaluate(params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (
            problem.loss(params, seen_x, seen_y),
            problem.loss(params, test_x, test_y),
            problem.metric(params, test_x, test_y),
        )

    def chunk(carry: Any, places: jax.Array) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, places)
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
    """A step for `scan`, from the places of a batch."""
    train_x, train_y = map(jnp.asarray, problem.train)

    def step(carry: Any, places: jax.Array) -> tuple[Any, None]:
        params, state = carry
        x, y = train_x[places], train_y[places]

        def value_fn(params: Any) -> jax.Array:
            return problem.loss(params, x, y)

        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return (optax.apply_updates(params, updates), state), None

    return step


def _spread(data: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """At most so many examples, evenly spread."""
    count = min(len(data[0]), MOST_EVALUATED)
    places = np.linspace(0, len(data[0]) - 1, count).astype(int)
    return data[0][places], data[1][places]
