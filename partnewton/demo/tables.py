"""The results of the demonstration, as tables for a terminal."""

import statistics
from collections.abc import Sequence

import jax

from partnewton.demo.evaluation import MOST_EVALUATED
from partnewton.demo.results import MEASURED_BATCHES, Results
from partnewton.demo.training import PARTITION_NEWTON

__all__ = ["report"]


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
    count = sum(x.size for x in jax.tree.leaves(experiment.params))
    return (
        f"{dataset.name}: {len(dataset.train_images)} training images of {shape}, "
        f"{len(dataset.test_images)} test images\n"
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
        "Seconds do not include compiling. A gradient-equivalent is the time of one "
        "gradient of a batch,\n"
        f"{1e3 * cost.gradient:.2f} ms. Each step takes one, and a refresh of "
        f"partition_newton {cost.refresh / cost.gradient:.1f} more (the summary "
        f"{cost.summary / cost.gradient:.1f};\nmedians over "
        f"{min(MEASURED_BATCHES, len(results.experiment.batches))} batches). The cost "
        "of the direction, such as Adam's moments or an\northogonalisation, is only in "
        "the seconds."
    )
    if max(len(dataset.train_images), len(dataset.test_images)) > MOST_EVALUATED:
        notes += f"\nEvaluated on at most {MOST_EVALUATED} images of each split."
    return f"{_table(header, rows, left=(0, 6))}\n\n{notes}"


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
        f"{_table(header, rows, left=(0,))}\n\n"
        "RMS change of the entries of each subset per step, at the refreshes."
    )


def _table(
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
