"""The results of the demonstration, as tables for a terminal."""

import statistics
import textwrap
from collections.abc import Sequence

import jax

from partnewton.demo.curves import Curves
from partnewton.demo.evaluation import MOST_EVALUATED
from partnewton.demo.results import MEASURED_BATCHES, Results
from partnewton.demo.training import PARTITION_NEWTON

__all__ = ["WIDTH", "report", "seconds_to", "table"]

WIDTH = 100  # of the tables, in characters


def report(results: Results) -> str:
    """The results as tables for a terminal.

    Args:
      results: from :func:`run`.

    Returns:
      Lines of text.
    """
    parts = (_describe(results), _optimizer_table(results), _rate_table(results))
    return "\n\n".join(parts)


def _describe(results: Results) -> str:
    experiment = results.experiment
    dataset, config = experiment.dataset, experiment.config
    shape = " x ".join(map(str, dataset.train_images.shape[1:]))
    what, model = f"images of {shape}", config.model
    if config.problem == "text":
        what, model = f"windows of {shape} characters", "transformer"
    count = sum(x.size for x in jax.tree.leaves(experiment.params))
    return (
        f"{dataset.name}: {len(dataset.train_images)} for training, "
        f"{len(dataset.test_images)} for testing, {what}\n"
        f"{model}: {count} parameters, partition {config.partition} with "
        f"{len(results.names)} subsets; {config.steps} steps of "
        f"{experiment.batches.shape[1]}, seed {config.seed}"
    )


def _optimizer_table(results: Results) -> str:
    header = (
        "optimizer",
        "train loss",
        "test accuracy",
        "seconds",
        "seconds to Adam's loss",
        "compiling",
        "gradients",
    )
    target = results.curves["adam"].train_loss[-1]
    rows = [
        (
            name,
            f"{curves.train_loss[-1]:.4g}",
            f"{100 * curves.test_accuracy[-1]:.2f} %",
            f"{curves.seconds[-1]:.2f}",
            seconds_to(curves, target),
            f"{curves.compile_seconds:.2f}",
            f"{curves.gradient_equivalents[-1]:.0f}",
        )
        for name, curves in results.curves.items()
    ]
    cost, dataset = results.cost, results.experiment.dataset
    settings = "\n".join(f"{k}: {c.settings}" for k, c in results.curves.items())
    measured = min(MEASURED_BATCHES, len(results.experiment.batches))
    notes = (
        "Seconds do not include compiling. Those to Adam's loss are the seconds until "
        "the first evaluation with a train loss of at most Adam's last one. A "
        "gradient-equivalent is the time of one gradient of a batch, "
        f"{1e3 * cost.gradient:.2f} ms. Each step takes one, and a refresh of "
        f"partition_newton {cost.refresh / cost.gradient:.1f} more (the summary "
        f"{cost.summary / cost.gradient:.1f}; medians over {measured} batches). "
        "The cost of the direction, such as Adam's moments or an orthogonalisation, is "
        "only in the seconds."
    )
    if max(len(dataset.train_images), len(dataset.test_images)) > MOST_EVALUATED:
        notes += f" Evaluated on at most {MOST_EVALUATED} examples of each split."
    notes = f"{settings}\n\n{textwrap.fill(notes, WIDTH, break_on_hyphens=False)}"
    return f"{table(header, rows, left=(0,))}\n\n{notes}"


def seconds_to(curves: Curves, loss: float) -> str:
    """The seconds until the first evaluation with at most this loss."""
    points = zip(curves.seconds, curves.train_loss, strict=True)
    reached = [seconds for seconds, found in points if found <= loss]
    return f"{reached[0]:.2f}" if reached else "never"


def _rate_table(results: Results) -> str:
    step_sizes = results.curves[PARTITION_NEWTON].step_sizes
    rows = [
        (
            name,
            f"{values[0]:.3g}",
            f"{statistics.median(values):.3g}",
            f"{values[-1]:.3g}",
            f"{sum(x == 0 for x in values)} of {len(values)}",
        )
        for name, values in step_sizes.items()
    ]
    header = ("subset", "first step", "median", "last", "zero")
    return (
        f"{table(header, rows, left=(0,))}\n\n"
        "RMS change of the entries of each subset per step, at the refreshes."
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]
) -> str:
    """A text table whose columns are aligned right, and left for those in `left`."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
