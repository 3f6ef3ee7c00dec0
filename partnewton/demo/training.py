"""Each optimizer, from the same weights and through the same batches."""

import dataclasses
import inspect
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import partnewton as pn
from partnewton.demo.evaluation import compiled
from partnewton.demo.experiment import Experiment

__all__ = [
    "PARTITION_NEWTON",
    "Curves",
    "Optimizer",
    "Training",
    "optimizers",
    "train",
]

EVALUATIONS = 25  # of each optimizer, at most
EVALUATE_EVERY = 10  # steps, at least
LOOK_AFTER = 0.1  # of the steps: later, what is left of the loss is a few images

# The preset as it is: nothing was chosen for these networks.
FACTOR = inspect.signature(pn.partition_newton).parameters["learning_rate"].default
ADAM_RATE = 1e-3
SGD_RATE, SGD_MOMENTUM = 0.01, 0.9

PARTITION_NEWTON = "partition_newton"

PyTree = Any
Images = tuple[jax.Array, jax.Array]


class Optimizer(NamedTuple):
    """What is trained with.

    Attributes:
      tx: the transformation.
      settings: its hyperparameters, as a person reads them.
      compile_ratio: about how long its training step compiles, relative to the gradient
        of the loss; for an estimate.
    """

    tx: optax.GradientTransformationExtraArgs
    settings: str
    compile_ratio: float


def optimizers(experiment: Experiment) -> dict[str, Optimizer]:
    """What is compared."""
    ours = pn.partition_newton(param_labels=experiment.param_labels)
    adam = optax.with_extra_args_support(optax.adam(ADAM_RATE))
    sgd = optax.with_extra_args_support(optax.sgd(SGD_RATE, SGD_MOMENTUM))
    refreshes = len(experiment.refreshes)
    return {
        PARTITION_NEWTON: Optimizer(ours, f"no argument; {refreshes} refreshes", 10.0),
        "adam": Optimizer(adam, f"learning rate {ADAM_RATE:g}", 1.5),
        "sgd": Optimizer(
            sgd, f"learning rate {SGD_RATE:g}, momentum {SGD_MOMENTUM:g}", 1.2
        ),
    }


@dataclasses.dataclass
class Curves:
    """What is recorded of one optimizer, before the first step and after every few.

    Attributes:
      settings: its hyperparameters, as a person reads them.
      steps: after how many steps.
      train_loss: the loss on the images to train on.
      test_accuracy: the share of the images to test on that is classified rightly.
      seconds: the time spent in steps so far.
      compile_seconds: the time that compiling took, which `seconds` leave out.
      gradient_equivalents: the work done so far, in gradients of a batch.
      logged: of `partition_newton`, what :func:`partnewton.metrics` tells after each
        refresh, under the same names, and with it "step", how many steps were made
        before, and "predicted" and "actual": by how much the loss of the batch should
        fall, by the quadratic model of its summary for the step that was taken, and by
        how much it fell. Empty for the other optimizers.
    """

    settings: str
    steps: list[int] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    gradient_equivalents: list[float] = dataclasses.field(default_factory=list)
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def append(self, step: int, evaluated: tuple[float, float], seconds: float) -> None:
        """Adds an evaluation, and the seconds of the steps since the last one."""
        self.steps.append(step)
        self.train_loss.append(evaluated[0])
        self.test_accuracy.append(evaluated[1])
        self.seconds.append(seconds + sum(self.seconds[-1:]))

    @property
    def step_sizes(self) -> dict[str, list[float]]:
        """Of `logged`, the RMS change of the entries of each subset in a step."""
        prefix, factor = "learning_rate/", self.logged["factor"]
        return {
            name.removeprefix(prefix): [
                FACTOR * x * y for x, y in zip(factor, values, strict=True)
            ]
            for name, values in self.logged.items()
            if name.startswith(prefix)
        }


class Training(NamedTuple):
    """What is left of a training run.

    Attributes:
      curves: what was recorded.
      looked_after: the number of steps after which `params` were kept.
      params: the weights at that time.
      step: the compiled step, ``step(i, state, images, batches)``; it takes the buffers
        of `state`, the parameters and the state of the optimizer.
    """

    curves: Curves
    looked_after: int
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
    curves = Curves(optimizer.settings)
    steps, batches = experiment.config.steps, jnp.asarray(experiment.batches)
    state = initial_state(experiment, optimizer)
    refreshes = set(experiment.refreshes)
    looked_after, params = 0, None

    with tqdm(total=steps, desc=f"{name:16}", unit="step", mininterval=0.5) as bar:
        estimate = optimizer.compile_ratio * gradient_compile_seconds
        bar.set_postfix_str(f"compiling, about {max(estimate, 1):.0f} s")
        begin = time.perf_counter()
        step = _step(experiment, optimizer.tx)
        step = compiled(step, 0, state, images, batches, donate=(1,))
        curves.compile_seconds = time.perf_counter() - begin
        log = None
        if name == PARTITION_NEWTON:
            log = _logging(experiment, state, images, batches)

        curves.append(0, evaluate(state[0]), 0.0)
        for first, last in itertools.pairwise(_evaluated_steps(steps)):
            seconds, begin = 0.0, time.perf_counter()
            for i in range(first, last):
                state = step(i, state, images, batches)
                if log is not None and i in refreshes:
                    jax.block_until_ready(state)
                    seconds += time.perf_counter() - begin
                    for key, value in log(i, state, images, batches).items():
                        curves.logged.setdefault(key, []).append(float(value))
                    begin = time.perf_counter()
            jax.block_until_ready(state)
            seconds += time.perf_counter() - begin
            curves.append(last, evaluate(state[0]), seconds)
            if params is None and last >= LOOK_AFTER * steps:
                looked_after, params = last, jax.tree.map(jnp.copy, state[0])
            bar.set_postfix_str(f"train loss {curves.train_loss[-1]:.3g}")
            bar.update(last - first)
    return Training(curves, looked_after, params, step)


def initial_state(experiment: Experiment, optimizer: Optimizer) -> PyTree:
    """Parameters and optimizer state before the first step, in buffers of their own."""
    params = jax.tree.map(jnp.copy, experiment.params)
    return params, optimizer.tx.init(params)


def _evaluated_steps(steps: int) -> list[int]:
    every = max(EVALUATE_EVERY, -(-steps // EVALUATIONS))
    return [*range(0, steps, every), steps]


def _logging(experiment: Experiment, *arguments: Any) -> Callable[..., dict[str, Any]]:
    """What is logged of the step `i` that has refreshed, from the state after it."""

    def log(
        i: jax.Array, state: PyTree, images: Images, batches: jax.Array
    ) -> dict[str, jax.Array]:
        params, opt_state = state
        found = pn.metrics(opt_state, params)
        is_ours = pn.ScaleByPartitionNewtonState
        summary = next(x for x in opt_state if isinstance(x, is_ours)).summary
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
