"""Training with each optimizer, from the same weights and with the same batches."""

import dataclasses
import inspect
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import partnewton as pn
from partnewton.demo.curves import Curves
from partnewton.demo.evaluation import compiled
from partnewton.demo.experiment import Experiment

__all__ = [
    "PARTITION_NEWTON",
    "ImageCurves",
    "Optimizer",
    "Training",
    "optimizers",
    "train",
]

EVALUATIONS = 25  # maximal number per optimizer
EVALUATE_EVERY = 10  # minimal number of steps between two evaluations
SNAPSHOT_AFTER = 0.1  # fraction of the steps; later a few images dominate the loss

# The default, not tuned for these networks.
FACTOR = inspect.signature(pn.partition_newton).parameters["learning_rate"].default
ADAM_RATE = 1e-3
SGD_RATE, SGD_MOMENTUM = 0.01, 0.9

PARTITION_NEWTON = "partition_newton"

PyTree = Any
Images = tuple[jax.Array, jax.Array]


class Optimizer(NamedTuple):
    """An optimizer and its description.

    Attributes:
      tx: the transformation.
      settings: its hyperparameters, as text for a table.
      compile_ratio: the approximate compile time of its training step, relative to that
        of the gradient of the loss; for the estimate in the progress bar.
    """

    tx: optax.GradientTransformationExtraArgs
    settings: str
    compile_ratio: float


def optimizers(experiment: Experiment) -> dict[str, Optimizer]:
    """The optimizers to compare."""
    ours = pn.partition_newton(param_labels=experiment.param_labels)
    adam = optax.with_extra_args_support(optax.adam(ADAM_RATE))
    sgd = optax.with_extra_args_support(optax.sgd(SGD_RATE, SGD_MOMENTUM))
    return {
        PARTITION_NEWTON: Optimizer(ours, "no arguments", 10.0),
        "adam": Optimizer(adam, f"learning rate {ADAM_RATE:g}", 1.5),
        "sgd": Optimizer(
            sgd, f"learning rate {SGD_RATE:g}, momentum {SGD_MOMENTUM:g}", 1.2
        ),
    }


@dataclasses.dataclass
class ImageCurves(Curves):
    """The curves of a classification.

    What is logged, of `partition_newton`, is after each refresh, with "step", the
    number of steps before it, and "predicted" and "actual", the decrease of the loss of
    the batch for the step that was made, according to the quadratic model of its
    summary and as measured.

    Attributes:
      test_accuracy: the fraction of test images that are classified correctly.
      gradient_equivalents: the work of the steps, in gradients of a batch.
    """

    test_accuracy: list[float] = dataclasses.field(default_factory=list)
    gradient_equivalents: list[float] = dataclasses.field(default_factory=list)


class Training(NamedTuple):
    """The result of a training run.

    Attributes:
      curves: its curves.
      snapshot_step: the number of steps before `params` were copied.
      params: the weights after these steps.
      step: the compiled step, ``step(i, state, images, batches)``; the buffers of
        `state`, which consists of the parameters and the optimizer state, are donated.
    """

    curves: ImageCurves
    snapshot_step: int
    params: PyTree
    step: Callable[..., PyTree]


def train(
    experiment: Experiment,
    images: Images,
    evaluate: Callable[[PyTree], tuple[float, float]],
    name: str,
    optimizer: Optimizer,
    gradient_compile_seconds: float,
) -> Training:
    """Trains from the initial weights."""
    curves = ImageCurves(optimizer.settings, FACTOR)
    steps, batches = experiment.config.steps, jnp.asarray(experiment.batches)
    state = initial_params_and_state(experiment, optimizer)
    snapshot_step, params, next_refresh = 0, None, 0

    # No bar if the output is not a terminal, but one line at the end.
    options = {"unit": "step", "mininterval": 0.5, "disable": None}
    with tqdm(total=steps, desc=f"{name:16}", **options) as bar:
        estimate = optimizer.compile_ratio * gradient_compile_seconds
        bar.set_postfix_str(f"compiling, about {max(estimate, 1):.0f} s")
        begin = time.perf_counter()
        step = _step(experiment, optimizer.tx)
        step = compiled(step, 0, state, images, batches, donate=(1,))
        curves.compile_seconds = time.perf_counter() - begin
        log = None
        if name == PARTITION_NEWTON:
            log = _logging(experiment, state, images, batches)

        def evaluate_after(step: int, seconds: float) -> None:
            loss, accuracy = evaluate(state[0])
            curves.append(step, seconds, train_loss=loss, test_accuracy=accuracy)

        evaluate_after(0, 0.0)
        for first, last in itertools.pairwise(_evaluated_steps(steps)):
            seconds, begin = 0.0, time.perf_counter()
            for i in range(first, last):
                state = step(i, state, images, batches)
                if log is not None and i == next_refresh:
                    jax.block_until_ready(state)
                    seconds += time.perf_counter() - begin
                    curves.log(log(i, state, images, batches))
                    next_refresh = curves.logged["next_refresh"][-1]
                    begin = time.perf_counter()
            jax.block_until_ready(state)
            seconds += time.perf_counter() - begin
            evaluate_after(last, seconds)
            if params is None and last >= SNAPSHOT_AFTER * steps:
                snapshot_step, params = last, jax.tree.map(jnp.copy, state[0])
            bar.set_postfix_str(f"train loss {curves.train_loss[-1]:.3g}")
            bar.update(last - first)
    if log is not None:
        curves.settings += f"; {len(curves.logged['step'])} refreshes"
    if bar.disable:
        print(curves.line(name), file=sys.stderr, flush=True)
    return Training(curves, snapshot_step, params, step)


def initial_params_and_state(experiment: Experiment, optimizer: Optimizer) -> PyTree:
    """Copies of the initial parameters, and the initial state of the optimizer."""
    params = jax.tree.map(jnp.copy, experiment.params)
    return params, optimizer.tx.init(params)


def _evaluated_steps(steps: int) -> list[int]:
    every = max(EVALUATE_EVERY, -(-steps // EVALUATIONS))
    return [*range(0, steps, every), steps]


def _logging(experiment: Experiment, *arguments: Any) -> Callable[..., dict[str, Any]]:
    """A function that computes the log of step `i`, a refresh, from the state after."""

    def log(
        i: jax.Array, state: PyTree, images: Images, batches: jax.Array
    ) -> dict[str, jax.Array]:
        params, opt_state = state
        found = pn.metrics(opt_state, params)
        summary = pn.newton_state(opt_state).summary
        rates = jnp.stack(list(pn.learning_rates(opt_state).values()))
        eta = FACTOR * found["factor"] * rates
        batch = (x[batches[i]] for x in images)
        return found | {
            "step": i,
            "predicted": eta @ summary.gradient - eta @ summary.hessian @ eta / 2,
            "actual": summary.value - experiment.value_fn(params, *batch),
        }

    program = compiled(log, 0, *arguments)
    return lambda *arguments: jax.device_get(program(*arguments))


def _step(experiment: Experiment, tx: optax.GradientTransformationExtraArgs) -> Any:
    """A training step.

    Several steps in one `lax.fori_loop` would save some dispatch, but XLA's CPU backend
    computes convolutions inside of a loop several times slower.
    """
    value_fn = experiment.value_fn

    def step(i: jax.Array, state: PyTree, images: Images, batches: jax.Array) -> PyTree:
        params, opt_state = state
        x, y = (array[batches[i]] for array in images)
        grads = jax.grad(value_fn)(params, x, y)
        updates, opt_state = tx.update(
            grads, opt_state, params, value_fn=value_fn, images=x, labels=y
        )
        return optax.apply_updates(params, updates), opt_state

    return step
