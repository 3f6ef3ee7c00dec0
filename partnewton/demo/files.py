"""The results of the demonstration, as figures and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from partnewton import plot
from partnewton.demo.curves import Curves
from partnewton.demo.results import Results
from partnewton.demo.training import PARTITION_NEWTON

__all__ = ["saved", "write"]

LOSS_FLOOR = 1e-7  # smaller losses are rounding errors in float32
PROGRESS = 1e-4  # below this fraction of the first loss, lengths are not drawn


def write(results: Results) -> list[Path]:
    """Writes two figures and the curves to the output folder.

    Args:
      results: from :func:`run`.

    Returns:
      The paths of the files: losses.png, partition.png and curves.json.

    Raises:
      OSError: if a file cannot be written.
    """
    return saved(
        results.experiment.config.output,
        _loss_picture(results),
        _partition_picture(results),
        _as_json(results),
    )


def saved(
    folder: Path, losses: Figure, partition: Figure, content: dict[str, Any]
) -> list[Path]:
    """Writes losses.png, partition.png and curves.json, and returns their paths."""
    paths = [folder / x for x in ("losses.png", "partition.png", "curves.json")]
    losses.savefig(paths[0], dpi=130)
    partition.savefig(paths[1], dpi=130)
    text = json.dumps(finite(content), allow_nan=False, indent=1)
    paths[2].write_text(text + "\n", encoding="utf-8")
    return paths


def _loss_picture(results: Results) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_step, by_seconds), (accuracy, decreases) = figure.subplots(2, 2)
    curves = results.curves
    plot.losses({k: (c.steps, c.train_loss) for k, c in curves.items()}, by_step)
    by_step.set_title("Train loss versus steps")
    plot.losses({k: (c.seconds, c.train_loss) for k, c in curves.items()}, by_seconds)
    title = "Train loss versus training time"
    by_seconds.set(title=title, xlabel="seconds, without compiling")
    for ax in (by_step, by_seconds):
        if ax.get_ylim()[0] < LOSS_FLOOR:
            ax.set_ylim(bottom=LOSS_FLOOR)
            ax.set_ylabel(f"train loss (rounding error below {LOSS_FLOOR:g})")
    plot.losses(
        {k: (c.steps, c.test_accuracy) for k, c in curves.items()},
        accuracy,
        ylabel="test accuracy",
        log=False,
    )
    accuracy.set_title("Test accuracy versus steps")
    logged = curves[PARTITION_NEWTON].logged
    shown = slice(_refreshes_above_rounding(curves[PARTITION_NEWTON]))
    history = [logged[key][shown] for key in ("step", "predicted", "actual")]
    plot.predicted_vs_actual(tuple(history), decreases)
    decreases.set_title("Decrease of the batch's loss at each refresh")
    return figure


def _partition_picture(results: Results) -> Figure:
    figure = Figure(figsize=(14, 6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    matrix, rates = figure.subplots(1, 2, width_ratios=(1, 1.15))
    plot.hessian(results.summary, results.names, matrix)
    matrix.set_title(f"Interactions after {results.snapshot_step} steps")
    ours = results.curves[PARTITION_NEWTON]
    shown = slice(_refreshes_with_progress(ours))
    step_sizes = {name: values[shown] for name, values in ours.step_sizes.items()}
    plot.learning_rates((ours.logged["step"][shown], step_sizes), rates)
    rates.set(
        title="Step length of each subset", ylabel="RMS change of its entries per step"
    )
    if shown.stop < len(ours.logged["step"]):
        rates.set_xlabel(f"step, until the loss is 1/{1 / PROGRESS:.0f} of the first")
    return figure


def _refreshes_above_rounding(ours: Curves) -> int:
    """The number of refreshes before the loss was a rounding error."""
    above = [x > LOSS_FLOOR for x in ours.logged["loss"]]
    return above.index(False) if False in above else len(above)


def _refreshes_with_progress(ours: Curves) -> int:
    """The number of refreshes before there was hardly anything left to learn."""
    losses = ours.logged["loss"]
    above = [x > PROGRESS * losses[0] for x in losses]
    return above.index(False) + 1 if False in above else len(above)


def _as_json(results: Results) -> dict[str, Any]:
    config = results.experiment.config
    return {
        "problem": config.problem,
        "model": "transformer" if config.problem == "text" else config.model,
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
        "summary_after_steps": results.snapshot_step,
        "correlation": plot.correlation(results.summary.hessian).tolist(),
        "gradient_seconds": results.cost.gradient,
        "summary_seconds": results.cost.summary,
        "refresh_seconds": results.cost.refresh,
        "wall_seconds": results.wall_seconds,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def finite(value: Any) -> Any:
    """`value` with None instead of NaN and infinity, which JSON does not support."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
