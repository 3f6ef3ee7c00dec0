"""Runs the demonstration: training, then the partition Hessian and timings."""

import bisect
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import partnewton as pn
from partnewton.demo.evaluation import compiled, evaluation
from partnewton.demo.experiment import Experiment
from partnewton.demo.training import (
    PARTITION_NEWTON,
    ImageCurves,
    Images,
    Optimizer,
    Training,
    initial_params_and_state,
    optimizers,
    train,
)

__all__ = ["MEASURED_BATCHES", "Cost", "Results", "run"]

MEASURED_BATCHES = 16  # for the partition Hessian and the timings

PyTree = Any


class Cost(NamedTuple):
    """Times of the computations for one batch, in seconds.

    Attributes:
      gradient: one gradient.
      summary: one summary.
      refresh: the additional time of an update with a refresh: the summary, the
        averages, the rule and the backtracking.
    """

    gradient: float
    summary: float
    refresh: float


class Results(NamedTuple):
    """The results of the demonstration.

    Attributes:
      experiment: the problem.
      curves: the curves of each optimizer.
      summary: the mean summary over some batches, along their mean gradient, at the
        weights of `partition_newton` after `snapshot_step` steps.
      snapshot_step: the number of steps before that snapshot.
      names: the names of the subsets.
      cost: the times of a gradient, of a summary and of a refresh.
      wall_seconds: the total time.
    """

    experiment: Experiment
    curves: dict[str, ImageCurves]
    summary: pn.Summary
    snapshot_step: int
    names: tuple[str, ...]
    cost: Cost
    wall_seconds: float


def run(experiment: Experiment) -> Results:
    """Trains with each optimizer, then computes the partition Hessian.

    Args:
      experiment: from :func:`prepare`.

    Returns:
      The results, for :func:`report` and :func:`write`.

    Example:
      >>> import pathlib, tempfile
      >>> from partnewton.demo import Config, prepare
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> experiment = prepare(Config("mlp", 2, 0, "whole", None, folder))
      >>> run(experiment).curves["adam"].steps
      [0, 2]
    """
    start = time.perf_counter()
    images = jax.device_put(experiment.dataset[:2])
    evaluate = evaluation(experiment)
    begin = time.perf_counter()
    gradient = compiled(
        jax.grad(experiment.value_fn), experiment.params, *_batch(experiment, 0)
    )
    compile_seconds = time.perf_counter() - begin
    chosen = optimizers(experiment)
    trained = {
        name: train(experiment, images, evaluate, name, optimizer, compile_seconds)
        for name, optimizer in chosen.items()
    }
    ours, optimizer = trained[PARTITION_NEWTON], chosen[PARTITION_NEWTON]
    begin = time.perf_counter()
    summary, cost = _measure(experiment, images, gradient, ours, optimizer)
    seconds = time.perf_counter() - begin
    phase = f"{'measuring':16}  partition Hessian and timings in {seconds:.2f} s"
    print(phase, file=sys.stderr, flush=True)
    curves = {name: training.curves for name, training in trained.items()}
    for curve in curves.values():
        refreshes = curve.logged.get("step", [])
        curve.gradient_equivalents = [
            step + cost.refresh / cost.gradient * bisect.bisect_left(refreshes, step)
            for step in curve.steps
        ]
    names = pn.subset_names(experiment.params, experiment.param_labels)
    wall_seconds = time.perf_counter() - start
    return Results(
        experiment, curves, summary, ours.snapshot_step, names, cost, wall_seconds
    )


def _batch(experiment: Experiment, i: int) -> tuple[jax.Array, ...]:
    indices = experiment.batches[i]
    return tuple(jnp.asarray(x[indices]) for x in experiment.dataset[:2])


def _measure(
    experiment: Experiment,
    images: Images,
    gradient: Callable[..., PyTree],
    ours: Training,
    optimizer: Optimizer,
) -> tuple[pn.Summary, Cost]:
    """The mean summary of some batches along their mean gradient, and timings."""
    count = min(MEASURED_BATCHES, len(experiment.batches))
    batches = [_batch(experiment, i) for i in range(count)]
    params = ours.params

    def summarize(params: PyTree, direction: PyTree, *batch: jax.Array) -> pn.Summary:
        return pn.summarize(
            lambda x: experiment.value_fn(x, *batch),
            params,
            direction,
            param_labels=experiment.param_labels,
        )

    direction = _mean([gradient(params, *batch) for batch in batches])
    summary = compiled(summarize, params, direction, *batches[0])
    mean = _mean([summary(params, direction, *batch) for batch in batches])
    # Interleaved, so that other load affects all measurements equally.
    seconds = np.array(
        [
            (
                _seconds(gradient, params, *batch),
                _seconds(summary, params, direction, *batch),
                *_seconds_of_steps(experiment, images, ours, optimizer),
            )
            for batch in batches
        ]
    )
    one_gradient, one_summary, with_refresh, without = np.median(seconds, axis=0)
    return mean, Cost(one_gradient, one_summary, with_refresh - without)


def _seconds_of_steps(
    experiment: Experiment, images: Images, ours: Training, optimizer: Optimizer
) -> tuple[float, float]:
    """The times of the first step, with a refresh, and of the second, without."""
    batches, seconds = jnp.asarray(experiment.batches), []
    state = jax.block_until_ready(initial_params_and_state(experiment, optimizer))
    for i in (0, 1):  # out of range, with only one batch, it is clipped
        begin = time.perf_counter()
        state = ours.step(i, state, images, batches)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return seconds[0], seconds[1]


def _mean(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def _seconds(call: Callable[..., PyTree], *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - begin
