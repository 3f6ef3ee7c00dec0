"""One run of one optimizer on one rung: losses over steps and over seconds."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.ladder import rungs, text
from benchmarks.ladder.optimizers import ENTRIES
from benchmarks.ladder.rung import Batch, Rung
from benchmarks.reporting import temp_bytes
from benchmarks.training_loop import batches, evenly_spaced
from benchmarks.training_step import training_step

__all__ = ["CLOCKS", "Job", "run"]

PyTree = Any
EVALUATIONS = 10
REESTIMATED = 30  # batches for new running statistics
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Job(NamedTuple):
    """What distinguishes a run from others on its rung.

    Attributes:
      entry: a key of `ENTRIES`.
      rate: of the grid.
      seed: of the parameters and of the order of the data.
      steps: the number of steps, which is the horizon of the schedule.
    """

    entry: str
    rate: float
    seed: int
    steps: int


class Carry(NamedTuple):
    """What changes in a step."""

    params: PyTree
    stats: PyTree
    state: PyTree


def run(rung: str, job: Job, *, clock: str, scale: int) -> dict[str, Any]:
    """The record of a run, ready for JSON.

    - ``at``: the numbers of steps after which the losses ``train`` and ``test`` and the
      metric are evaluated, and ``seconds`` until then, without compiling and without
      evaluations;
    - ``gradient_seconds``: the mean time of one value with gradient, measured between
      the parts of the run, so that other load on the machine affects both;
    - ``compile_seconds``: of the initialisation and the step, tracing included;
    - ``temp_bytes``: the memory that the step needs beside its arguments and results.

    Losses that are not finite are None, and end the run.
    """
    program = _compiled(rung, job.entry, clock, scale)
    problem, timer = program.rung, CLOCKS[clock]
    order = batches(problem._replace(steps=job.steps), job.seed)
    at = np.unique(np.linspace(0, job.steps, EVALUATIONS + 1).round().astype(int))
    evaluate = _evaluation(rung, scale)
    carry = program.start(job)
    curves = [evaluate(*program.evaluated(carry))]
    seconds, gradients, calls = [0.0], 0.0, 0
    for first, last in itertools.pairwise(at):
        begin = timer()
        for number in range(first, last):
            carry = program.step(carry, order[number], number, job)
        jax.block_until_ready(carry)
        seconds.append(seconds[-1] + timer() - begin)
        count = max(2, int(last - first) // 20)
        gradients += _gradient_seconds(
            rung, scale, carry, order[last - 1], count, timer
        )
        calls += count
        curves.append(evaluate(*program.evaluated(carry)))
        if not np.isfinite(curves[-1][0]):
            break
    train, test, metric = zip(*curves, strict=True)
    leaves = jax.tree.leaves(carry.params)
    return {
        "rung": rung,
        **job._asdict(),
        "clock": clock,
        "scale": scale,
        "parameters": sum(x.size for x in leaves),
        "tensors": len(leaves),
        "compile_seconds": program.compile_seconds,
        "temp_bytes": program.temp_bytes,
        "gradient_seconds": gradients / calls,
        "at": at[: len(curves)].tolist(),
        "seconds": seconds,
        "train": [_finite(x) for x in train],
        "test": [_finite(x) for x in test],
        "metric": [_finite(x) for x in metric],
        "metric_name": problem.metric_name,
        "text": text.checksum() if rung in rungs.TEXT else None,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


@functools.lru_cache(1)
def _rung(name: str, scale: int) -> tuple[Rung, Batch]:
    """The rung, and its training data on the device."""
    rung = rungs.make(name, scale)
    return rung, tuple(map(jnp.asarray, rung.train))


@functools.cache
def _compiled(rung: str, entry: str, clock: str, scale: int) -> "CompiledOptimizer":
    """Caches are cleared, so that each optimizer compiles without those before it."""
    jax.clear_caches()
    return CompiledOptimizer(*_rung(rung, scale), entry, CLOCKS[clock])


class CompiledOptimizer:
    """An optimizer on a rung, compiled once for all rates, seeds and horizons."""

    def __init__(self, rung: Rung, data: Batch, entry: str, timer: Callable[[], float]):
        self.rung, self._data, self._entry = rung, data, ENTRIES[entry]
        one = jnp.float32(1), jnp.int32(1)
        indices = np.zeros(rung.batch, np.int32)
        begin = timer()
        self._start = jax.jit(self._init).lower(jnp.int32(0), *one).compile()
        carry = jax.eval_shape(self._init, jnp.int32(0), *one)
        step = jax.jit(self._advance, donate_argnums=0)
        self._step = step.lower(carry, data, indices, *2 * one[1:], *one).compile()
        self.compile_seconds = timer() - begin
        self.temp_bytes = temp_bytes(self._step)
        self._estimate = jax.jit(self._statistics)

    def start(self, job: Job) -> Carry:
        """Before the first step."""
        rate, steps = jnp.float32(job.rate), jnp.int32(job.steps)
        return self._start(jnp.int32(job.seed), rate, steps)

    def step(self, carry: Carry, indices: np.ndarray, number: int, job: Job) -> Carry:
        """After a step on the examples with these indices."""
        seed, number = np.int32(job.seed), np.int32(number)
        rate, steps = np.float32(job.rate), np.int32(job.steps)
        return self._step(carry, self._data, indices, seed, number, rate, steps)

    def evaluated(self, carry: Carry) -> tuple[PyTree, PyTree]:
        """Parameters and statistics whose loss counts."""
        params = self._entry.evaluated(carry.state, carry.params)
        if self._entry.moves_evaluated and jax.tree.leaves(carry.stats):
            return params, self._estimate(params, carry.stats, self._data)
        return params, carry.stats

    def _init(self, seed: jax.Array, rate: jax.Array, steps: jax.Array) -> Carry:
        params, stats = self.rung.init(jax.random.key(seed))
        return Carry(params, stats, self._entry.make(rate, steps).init(params))

    def _advance(
        self,
        carry: Carry,
        data: Batch,
        indices: jax.Array,
        seed: jax.Array,
        number: jax.Array,
        rate: jax.Array,
        steps: jax.Array,
    ) -> Carry:
        batch = tuple(x[indices] for x in data)
        if self.rung.augment is not None:
            key = jax.random.fold_in(jax.random.key(seed), number)
            batch = self.rung.augment(key, batch)

        def loss(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
            return self.rung.loss(params, carry.stats, batch, True)

        tx = optax.with_extra_args_support(self._entry.make(rate, steps))
        step = training_step(loss, tx, has_aux=True)
        params, state, (_, stats) = step(carry.params, carry.state, batch)
        return Carry(params, stats, state)

    def _statistics(self, params: PyTree, stats: PyTree, data: Batch) -> PyTree:
        """Running statistics of batch norm at parameters that were not trained."""
        for n in range(REESTIMATED):
            batch = tuple(
                x[n * self.rung.batch : (n + 1) * self.rung.batch] for x in data
            )
            stats = self.rung.loss(params, stats, batch, True)[1]
        return stats


@functools.lru_cache(1)
def _evaluation(
    rung: str, scale: int
) -> Callable[[PyTree, PyTree], tuple[float, float, float]]:
    """Training loss, test loss and test metric, on fixed parts of the data."""
    problem, _ = _rung(rung, scale)

    def evaluate(params: PyTree, stats: PyTree, batch: Batch) -> tuple:
        loss, _ = problem.loss(params, stats, batch, False)
        return loss, problem.metric(params, stats, batch)

    some = [evenly_spaced(x, problem.evaluated) for x in (problem.train, problem.test)]
    size = min(problem.batch, *(len(x[0]) for x in some))
    train, test = ([_batch(x, n, size) for n in _starts(x, size)] for x in some)
    compiled = jax.jit(evaluate).lower(*_shapes(problem), train[0]).compile()

    def means(params: PyTree, stats: PyTree, batches: list[Batch]) -> np.ndarray:
        return np.mean([compiled(params, stats, x) for x in batches], axis=0)

    def curves(params: PyTree, stats: PyTree) -> tuple[float, float, float]:
        return means(params, stats, train)[0], *means(params, stats, test)

    return curves


def _batch(data: Sequence[np.ndarray], start: int, size: int) -> Batch:
    return tuple(jnp.asarray(x[start : start + size]) for x in data)


def _starts(data: Sequence[np.ndarray], size: int) -> range:
    return range(0, len(data[0]) - size + 1, size)


def _shapes(problem: Rung) -> tuple[PyTree, PyTree]:
    """Of parameters and statistics, to compile what is kept if caches are cleared."""
    return jax.eval_shape(problem.init, jax.random.key(0))


def _gradient_seconds(
    rung: str,
    scale: int,
    carry: Carry,
    indices: np.ndarray,
    count: int,
    timer: Callable[[], float],
) -> float:
    """The time of so many values with gradients, without an optimizer."""
    gradient = _gradient(rung, scale)
    data = _rung(rung, scale)[1]
    jax.block_until_ready(gradient(carry.params, carry.stats, data, indices))
    begin = timer()
    for _ in range(count):
        found = gradient(carry.params, carry.stats, data, indices)
    jax.block_until_ready(found)
    return timer() - begin


@functools.lru_cache(1)
def _gradient(rung: str, scale: int) -> Callable:
    problem, data = _rung(rung, scale)

    def gradient(params: PyTree, stats: PyTree, data: Batch, indices: jax.Array) -> Any:
        batch = tuple(x[indices] for x in data)

        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            return problem.loss(params, stats, batch, True)

        return jax.value_and_grad(loss, has_aux=True)(params)

    indices = np.zeros(problem.batch, np.int32)
    return jax.jit(gradient).lower(*_shapes(problem), data, indices).compile()
