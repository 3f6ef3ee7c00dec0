"""The demonstration: small networks on small images, by three optimizers.

``python -m partnewton`` runs it. The same initial weights meet the same batches under
:func:`~partnewton.partition_newton`, Adam and SGD with momentum; then the partition
Hessian is measured early on the way of the first of them.
"""

import bisect
import dataclasses
import inspect
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import partnewton as pn
from partnewton import data, plot
from partnewton.transform import default_refreshes

__all__ = ["Config", "Experiment", "Results", "prepare", "report", "run", "write"]

BATCH = 64
EVALUATE_EVERY = 10  # steps
MOST_EVALUATED = 5000  # images of each split, for data sets larger than the digits
MEASURED_BATCHES = 16  # for the partition Hessian, and for timings
LOOK_AFTER = 0.1  # of the steps: later, what is left of the loss is a few images
ROUNDING = 1e-7  # a loss below it, in float32, is rounding

# As it is: the preset's own factor and intervals, nothing chosen for these networks.
_PRESET = inspect.signature(pn.partition_newton).parameters
FACTOR = _PRESET["learning_rate"].default
ADAM_RATE = 1e-3
SGD_RATE, SGD_MOMENTUM = 0.01, 0.9

PARTITION_NEWTON = "partition_newton"

PyTree = Any


# --- What is trained -------------------------------------------------------------


class Convolutional(nnx.Module):
    """Two convolutions and two dense layers: 8 tensors."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs):
        height, width, channels = image_shape
        features = -(-height // 4) * -(-width // 4) * 32  # after two strides of 2
        self.conv1 = nnx.Conv(channels, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(features, 64, rngs=rngs)
        self.output = nnx.Linear(64, data.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.conv2(jnp.tanh(self.conv1(x))))
        x = jnp.tanh(self.hidden(x.reshape(len(x), -1)))
        return self.output(x)


class Perceptron(nnx.Module):
    """Three dense layers: 6 tensors."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(int(np.prod(image_shape)), 64, rngs=rngs)
        self.hidden2 = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, data.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.hidden1(x.reshape(len(x), -1)))
        x = jnp.tanh(self.hidden2(x))
        return self.output(x)


MODELS = {"cnn": Convolutional, "mlp": Perceptron}


class Config(NamedTuple):
    """What is asked for.

    Attributes:
      model: "cnn" or "mlp".
      steps: how many steps each optimizer takes.
      seed: of the split of the digits, the initial weights and the order of batches.
      partition: "per_tensor", "whole", "weights_biases", "per_layer", "blocks:N" or
        "alternate:N".
      data_dir: a folder for :func:`partnewton.data.from_folder`, or None for the digits
        of scikit-learn.
      output: the folder that the pictures and the curves are written to.
    """

    model: str
    steps: int
    seed: int
    partition: str
    data_dir: Path | None
    output: Path


class Experiment(NamedTuple):
    """All that the optimizers share.

    Attributes:
      config: what was asked for.
      dataset: the images, as numpy arrays.
      batches: the places of the images of each step's batch, (steps, batch).
      params: the initial weights.
      logits_fn: ``logits_fn(params, images)``, a pure function.
      value_fn: the loss, ``value_fn(params, images, labels)``, a pure function.
      param_labels: the partition.
    """

    config: Config
    dataset: data.Dataset
    batches: np.ndarray
    params: PyTree
    logits_fn: Callable[[PyTree, jax.Array], jax.Array]
    value_fn: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    param_labels: Callable[[PyTree], PyTree]

    @property
    def refreshes(self) -> list[int]:
        """The steps at which `partition_newton` refreshes by default."""
        size = len(pn.subset_names(self.params, self.param_labels))
        return default_refreshes(self.config.steps, size)


def prepare(config: Config) -> Experiment:
    """Reads the data, builds the network and makes the output folder.

    Whatever can be wrong with a configuration is found here, before anything is
    trained.

    Args:
      config: what is asked for.

    Returns:
      What the optimizers share.

    Raises:
      ValueError, OSError: something is wrong with the configuration or with the files
        that it names; the message is one line for a person to read.
      ImportError: a package that the demonstration needs is missing.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> experiment = prepare(Config("mlp", 5, 0, "whole", None, folder))
      >>> experiment.batches.shape
      (5, 64)
    """
    if config.data_dir is None:
        dataset = data.digits(config.seed)
    else:
        dataset = data.from_folder(config.data_dir)
    image_shape = dataset.train_images.shape[1:]
    model = MODELS[config.model](image_shape, nnx.Rngs(config.seed))
    params, logits_fn = _functional(model)

    def value_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    param_labels = _partition(config.partition)
    try:
        pn.subset_names(params, param_labels)
    except ValueError as error:
        raise ValueError(f"--partition {config.partition}: {error}") from error
    _make_writable(config.output)
    batches = _batches(len(dataset.train_images), config.steps, config.seed)
    return Experiment(
        config, dataset, batches, params, logits_fn, value_fn, param_labels
    )


def _functional(
    model: nnx.Module,
) -> tuple[PyTree, Callable[[PyTree, jax.Array], jax.Array]]:
    """The weights of a network, and the network as a pure function of them."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits_fn(params: PyTree, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    return params, logits_fn


def _partition(name: str) -> Callable[[PyTree], PyTree]:
    kind, colon, count = name.partition(":")
    partition = getattr(pn.partitions, kind)
    return partition(int(count)) if colon else partition


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {folder}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output {folder}: the folder cannot be written to.")


def _batches(count: int, steps: int, seed: int) -> np.ndarray:
    """For each step the places of a batch; each epoch shuffles all images anew."""
    rng = np.random.default_rng(seed)
    size = min(BATCH, count)
    a_epoch = count // size
    epochs = [
        rng.permutation(count)[: a_epoch * size].reshape(a_epoch, size)
        for _ in range(-(-steps // a_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


# --- Training --------------------------------------------------------------------


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

    @property
    def lengths(self) -> dict[str, list[float]]:
        """Of `logged`, how far each subset was moved: rates, with all factors."""
        prefix, factor = "learning_rate/", self.logged["factor"]
        return {
            name.removeprefix(prefix): [
                FACTOR * x * y for x, y in zip(factor, values, strict=True)
            ]
            for name, values in self.logged.items()
            if name.startswith(prefix)
        }


class Cost(NamedTuple):
    """What is done for one batch, in seconds.

    Attributes:
      gradient: one gradient.
      summary: one summary.
      refresh: by how much longer an update takes that refreshes the learning rates: the
        summary, the averages, the rule and the check of the loss.
    """

    gradient: float
    summary: float
    refresh: float


class Results(NamedTuple):
    """What the demonstration found.

    Attributes:
      experiment: what was run.
      curves: for each optimizer its curves.
      summary: the mean summary over some batches, along their mean gradient, at the
        weights that `partition_newton` had after `looked_after` steps.
      looked_after: see there.
      names: the names of the subsets.
      cost: the price of a gradient, of a summary and of a refresh.
      wall_seconds: the time that all of it took.
    """

    experiment: Experiment
    curves: dict[str, Curves]
    summary: pn.Summary
    looked_after: int
    names: tuple[str, ...]
    cost: Cost
    wall_seconds: float


def run(experiment: Experiment) -> Results:
    """Trains with each optimizer, then measures the partition Hessian.

    Args:
      experiment: from :func:`prepare`.

    Returns:
      The results, for :func:`report` and :func:`write`.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> experiment = prepare(Config("mlp", 2, 0, "whole", None, folder))
      >>> run(experiment).curves["adam"].steps
      [0, 2]
    """
    start = time.perf_counter()
    evaluate = _evaluation(experiment)
    curves, looks = {}, {}
    optimizers = _optimizers(experiment)
    for name, (tx, settings) in optimizers.items():
        curves[name], looks[name] = _train(experiment, evaluate, name, tx, settings)
    looked_after, params = looks[PARTITION_NEWTON]
    ours, _ = optimizers[PARTITION_NEWTON]
    summary, cost = _measure(experiment, ours, params)
    refreshes = experiment.refreshes
    for name, curve in curves.items():
        refresh = cost.refresh / cost.gradient if name == PARTITION_NEWTON else 0.0
        curve.gradient_equivalents = [
            step + refresh * bisect.bisect_left(refreshes, step) for step in curve.steps
        ]
    names = pn.subset_names(experiment.params, experiment.param_labels)
    wall_seconds = time.perf_counter() - start
    return Results(experiment, curves, summary, looked_after, names, cost, wall_seconds)


def _optimizers(
    experiment: Experiment,
) -> dict[str, tuple[optax.GradientTransformationExtraArgs, str]]:
    ours = pn.partition_newton(param_labels=experiment.param_labels)
    adam = optax.with_extra_args_support(optax.adam(ADAM_RATE))
    sgd = optax.with_extra_args_support(optax.sgd(SGD_RATE, SGD_MOMENTUM))
    return {
        PARTITION_NEWTON: (ours, f"no argument; {len(experiment.refreshes)} refreshes"),
        "adam": (adam, f"learning rate {ADAM_RATE:g}"),
        "sgd": (sgd, f"learning rate {SGD_RATE:g}, momentum {SGD_MOMENTUM:g}"),
    }


def _train(
    experiment: Experiment,
    evaluate: Callable[[PyTree], tuple[float, float]],
    name: str,
    tx: optax.GradientTransformationExtraArgs,
    settings: str,
) -> tuple[Curves, tuple[int, PyTree]]:
    """Trains from the initial weights.

    Returns:
      The curves; and the weights on the way, with the number of steps up to there.
    """
    curves = Curves(settings)
    dataset, steps = experiment.dataset, experiment.config.steps
    train = jax.device_put((dataset.train_images, dataset.train_labels))
    batches = jnp.asarray(experiment.batches)
    state = experiment.params, tx.init(experiment.params)
    ours, look = name == PARTITION_NEWTON, None
    refreshes = set(experiment.refreshes)

    with tqdm(total=steps, desc=f"{name:16}", unit="step", mininterval=0.5) as bar:
        bar.set_postfix_str("compiling")
        begin = time.perf_counter()
        # Bounds that are arguments: a last, shorter run of steps compiles nothing anew.
        advance = _compiled(_advance(experiment, tx), 0, 0, state, train, batches)
        curves.compile_seconds = time.perf_counter() - begin
        log = _logging(experiment, state, train, batches) if ours else None

        _append(curves, 0, evaluate(state[0]), 0.0)
        for first in range(0, steps, EVALUATE_EVERY):
            last = min(first + EVALUATE_EVERY, steps)
            seconds = 0.0
            # All optimizers halt where ours refreshes.
            for start, stop in itertools.pairwise(_halts(first, last, refreshes)):
                begin = time.perf_counter()
                state = advance(start, stop, state, train, batches)
                jax.block_until_ready(state)
                seconds += time.perf_counter() - begin
                if log is not None and start in refreshes:
                    for key, value in log(start, state, train, batches).items():
                        curves.logged.setdefault(key, []).append(float(value))
            _append(curves, last, evaluate(state[0]), seconds)
            if look is None and last >= LOOK_AFTER * steps:
                look = last, state[0]
            bar.set_postfix_str(f"train loss {curves.train_loss[-1]:.3g}")
            bar.update(last - first)
    return curves, look


def _halts(first: int, last: int, refreshes: set[int]) -> list[int]:
    """`first`, `last`, and in between the steps right after a refresh, and before."""
    inside = [i for i in range(first, last) if i in refreshes]
    return sorted({first, last, *inside, *(i + 1 for i in inside)})


def _logging(experiment: Experiment, *arguments: Any) -> Callable[..., dict[str, Any]]:
    """What is told of the step `i` that has refreshed, from the state after it."""

    def log(
        i: jax.Array, state: PyTree, train: Any, batches: jax.Array
    ) -> dict[str, jax.Array]:
        params, opt_state = state
        found = pn.metrics(opt_state, params)
        links = [x for x in opt_state if isinstance(x, pn.ScaleByPartitionNewtonState)]
        summary = links[0].summary
        rates = jnp.stack(list(pn.learning_rates(opt_state).values()))
        eta = FACTOR * found["factor"] * rates
        images, labels = (x[batches[i]] for x in train)
        return found | {
            "step": i,
            "predicted": eta @ summary.gradient - eta @ summary.hessian @ eta / 2,
            "actual": summary.value - experiment.value_fn(params, images, labels),
        }

    compiled = _compiled(log, 0, *arguments)
    return lambda *arguments: jax.device_get(compiled(*arguments))


def _advance(experiment: Experiment, tx: optax.GradientTransformationExtraArgs) -> Any:
    """Some steps of an optimizer in one call."""
    value_fn = experiment.value_fn

    def advance(
        first: jax.Array, last: jax.Array, state: PyTree, train: Any, batches: jax.Array
    ) -> PyTree:
        def step(i: jax.Array, state: PyTree) -> PyTree:
            params, opt_state = state
            images, labels = (x[batches[i]] for x in train)
            grads = jax.grad(value_fn)(params, images, labels)
            updates, opt_state = tx.update(
                grads,
                opt_state,
                params,
                value_fn=value_fn,
                images=images,
                labels=labels,
            )
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(first, last, step, state)

    return advance


def _evaluation(experiment: Experiment) -> Callable[[PyTree], tuple[float, float]]:
    """The function from weights to train loss and test accuracy, compiled."""
    dataset = experiment.dataset
    train, test = jax.device_put(
        (
            _spread(dataset.train_images, dataset.train_labels),
            _spread(dataset.test_images, dataset.test_labels),
        )
    )

    def evaluate(params: PyTree, train: Any, test: Any) -> tuple[jax.Array, jax.Array]:
        def loss(example: Any) -> jax.Array:
            image, label = example
            return experiment.value_fn(params, image[None], label[None])

        def is_right(example: Any) -> jax.Array:
            image, label = example
            return jnp.argmax(experiment.logits_fn(params, image[None])) == label

        return (
            jnp.mean(jax.lax.map(loss, train, batch_size=500)),
            jnp.mean(jax.lax.map(is_right, test, batch_size=500)),
        )

    compiled = _compiled(evaluate, experiment.params, train, test)

    def call(params: PyTree) -> tuple[float, float]:
        loss, accuracy = compiled(params, train, test)
        return float(loss), float(accuracy)

    return call


def _spread(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many images, evenly spread over the set."""
    count = min(len(images), MOST_EVALUATED)
    places = np.linspace(0, len(images) - 1, count).astype(int)
    return images[places], labels[places]


def _append(
    curves: Curves, step: int, evaluation: tuple[float, float], seconds: float
) -> None:
    curves.steps.append(step)
    curves.train_loss.append(evaluation[0])
    curves.test_accuracy.append(evaluation[1])
    curves.seconds.append(seconds + sum(curves.seconds[-1:]))


def _measure(
    experiment: Experiment,
    tx: optax.GradientTransformationExtraArgs,
    params: PyTree,
) -> tuple[pn.Summary, Cost]:
    """The mean summary of some batches along their mean gradient, and timings."""
    train = experiment.dataset[:2]
    places = experiment.batches[:MEASURED_BATCHES]
    batches = [tuple(jnp.asarray(x[place]) for x in train) for place in places]
    gradient = _compiled(jax.grad(experiment.value_fn), params, *batches[0])

    def summarize(params: PyTree, direction: PyTree, *batch: jax.Array) -> pn.Summary:
        return pn.summarize(
            lambda x: experiment.value_fn(x, *batch),
            params,
            direction,
            param_labels=experiment.param_labels,
        )

    def update(
        grads: PyTree, state: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[PyTree, PyTree]:
        more = {"value_fn": experiment.value_fn, "images": images, "labels": labels}
        return tx.update(grads, state, params, **more)

    direction = _mean([gradient(params, *batch) for batch in batches])
    summary = _compiled(summarize, params, direction, *batches[0])
    mean = _mean([summary(params, direction, *batch) for batch in batches])
    # The first update refreshes the rates, the second one, of the same program, not.
    before = tx.init(params)
    updated = _compiled(update, direction, before, *batches[0])
    _, after = updated(direction, before, *batches[0])
    calls = (
        lambda batch: gradient(params, *batch),
        lambda batch: summary(params, direction, *batch),
        lambda batch: updated(direction, before, *batch),
        lambda batch: updated(direction, after, *batch),
    )
    # In turns: what else the machine does slows all of them alike.
    seconds = np.array([[_seconds(call, batch) for call in calls] for batch in batches])
    one_gradient, one_summary, with_refresh, without = np.median(seconds, axis=0)
    return mean, Cost(one_gradient, one_summary, with_refresh - without)


def _mean(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def _seconds(call: Callable[[Any], PyTree], argument: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call(argument))
    return time.perf_counter() - begin


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return jax.jit(function).lower(*arguments).compile()


# --- What is told and kept -------------------------------------------------------


def report(results: Results) -> str:
    """The results as tables for a terminal.

    Args:
      results: from :func:`run`.

    Returns:
      Some lines of text.
    """
    parts = (_describe(results), _optimizer_table(results), _rate_table(results))
    return "\n\n".join(parts)


def _describe(results: Results) -> str:
    experiment = results.experiment
    dataset, config = experiment.dataset, experiment.config
    shape = " x ".join(map(str, dataset.train_images.shape[1:]))
    count = sum(x.size for x in jax.tree.leaves(experiment.params))
    return (
        f"{dataset.name}: {len(dataset.train_images)} images of {shape} to train on, "
        f"{len(dataset.test_images)} to test on\n"
        f"{config.model}: {count} parameters, partition {config.partition} with "
        f"{len(results.names)} subsets; {config.steps} steps of "
        f"{experiment.batches.shape[1]} images, seed {config.seed}"
    )


def _optimizer_table(results: Results) -> str:
    header = (
        "optimizer",
        "train loss",
        "test accuracy",
        "seconds",
        "compiling",
        "gradient-equivalents",
        "settings",
    )
    rows = [
        (
            name,
            f"{curves.train_loss[-1]:.4g}",
            f"{100 * curves.test_accuracy[-1]:.2f} %",
            f"{curves.seconds[-1]:.2f}",
            f"{curves.compile_seconds:.2f}",
            f"{curves.gradient_equivalents[-1]:.0f}",
            curves.settings,
        )
        for name, curves in results.curves.items()
    ]
    cost, dataset = results.cost, results.experiment.dataset
    notes = (
        "Seconds are those of the steps; compiling comes on top. A gradient-equivalent "
        "is the time of\n"
        f"one gradient of a batch, {1e3 * cost.gradient:.2f} ms: one a step, and for "
        f"partition_newton {cost.refresh / cost.gradient:.1f} more at each refresh\n"
        f"(a summary alone is {cost.summary / cost.gradient:.1f}; medians of "
        f"{min(MEASURED_BATCHES, len(results.experiment.batches))}). What a direction "
        "costs, such as the moments of\nAdam or an orthogonalisation, is in the "
        "seconds alone."
    )
    if max(len(dataset.train_images), len(dataset.test_images)) > MOST_EVALUATED:
        notes += f"\nEvaluated on at most {MOST_EVALUATED} images of each split."
    return f"{_table(header, rows, left=(0, 6))}\n\n{notes}"


def _rate_table(results: Results) -> str:
    lengths = results.curves[PARTITION_NEWTON].lengths
    rows = [
        (
            name,
            f"{values[0]:.3g}",
            f"{statistics.median(values):.3g}",
            f"{values[-1]:.3g}",
            f"{sum(x == 0 for x in values)} of {len(values)}",
        )
        for name, values in lengths.items()
    ]
    header = ("subset", "first step", "median", "last", "zero")
    return (
        f"{_table(header, rows, left=(0,))}\n\n"
        "By so much does a step move the entries of each subset."
    )


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]
) -> str:
    """Columns that are as wide as they need; those in `left` start at the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(results: Results) -> list[Path]:
    """Writes two pictures and the curves to the output folder.

    Args:
      results: from :func:`run`.

    Returns:
      The paths of the files: losses.png, partition.png and curves.json.

    Raises:
      OSError: a file cannot be written.
    """
    folder = results.experiment.config.output
    paths = [folder / x for x in ("losses.png", "partition.png", "curves.json")]
    _loss_picture(results).savefig(paths[0], dpi=130)
    _partition_picture(results).savefig(paths[1], dpi=130)
    content = json.dumps(_finite(_as_json(results)), allow_nan=False, indent=1)
    paths[2].write_text(content + "\n", encoding="utf-8")
    return paths


def _loss_picture(results: Results) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_step, by_work), (accuracy, promises) = figure.subplots(2, 2)
    curves = results.curves
    plot.losses({k: (c.steps, c.train_loss) for k, c in curves.items()}, by_step)
    by_step.set_title("Train loss by step")
    by_gradients = {
        k: (c.gradient_equivalents, c.train_loss) for k, c in curves.items()
    }
    plot.losses(by_gradients, by_work)
    by_work.set(title="Train loss by work done", xlabel="gradient-equivalents")
    for ax in (by_step, by_work):
        if ax.get_ylim()[0] < ROUNDING:
            ax.set_ylim(bottom=ROUNDING)
            ax.set_ylabel(f"train loss (below {ROUNDING:g} is rounding)")
    plot.losses(
        {k: (c.steps, c.test_accuracy) for k, c in curves.items()},
        accuracy,
        ylabel="test accuracy",
        log=False,
    )
    accuracy.set_title("Test accuracy by step")
    logged = curves[PARTITION_NEWTON].logged
    shown = slice(_refreshes_above_rounding(curves[PARTITION_NEWTON]))
    history = [logged[key][shown] for key in ("step", "predicted", "actual")]
    plot.predicted_vs_actual(tuple(history), promises)
    promises.set_title("Decrease of a batch's loss at each refresh")
    return figure


def _partition_picture(results: Results) -> Figure:
    figure = Figure(figsize=(14, 6), layout="constrained")
    matrix, rates = figure.subplots(1, 2, width_ratios=(1, 1.15))
    plot.hessian(results.summary, results.names, matrix)
    matrix.set_title(
        f"Partition Hessian after {results.looked_after} steps, as a correlation"
    )
    ours = results.curves[PARTITION_NEWTON]
    shown = slice(_refreshes_above_rounding(ours))
    lengths = {name: values[shown] for name, values in ours.lengths.items()}
    plot.learning_rates((ours.logged["step"][shown], lengths), rates)
    rates.set_title("How far a step moves the entries of each subset")
    return figure


def _refreshes_above_rounding(ours: Curves) -> int:
    """How many refreshes there were before nothing but rounding was left of a loss."""
    above = [x > ROUNDING for x in ours.logged["loss"]]
    return above.index(False) if False in above else len(above)


def _as_json(results: Results) -> dict[str, Any]:
    config = results.experiment.config
    return {
        "model": config.model,
        "steps": config.steps,
        "seed": config.seed,
        "partition": config.partition,
        "dataset": results.experiment.dataset.name,
        "optimizers": {
            name: dataclasses.asdict(curves) for name, curves in results.curves.items()
        },
        "subsets": results.names,
        "summary": {
            name: np.asarray(x).tolist()
            for name, x in results.summary._asdict().items()
        },
        "summary_after_steps": results.looked_after,
        "correlation": plot.correlation(results.summary.hessian).tolist(),
        "gradient_seconds": results.cost.gradient,
        "summary_seconds": results.cost.summary,
        "refresh_seconds": results.cost.refresh,
        "wall_seconds": results.wall_seconds,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def _finite(value: Any) -> Any:
    """The same value for JSON, which knows no NaN: None in their place."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
