"""The results as figures and as JSON."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from partnewton import plot
from partnewton.demo.files import saved
from partnewton.demo.pinn.problem import true
from partnewton.demo.pinn.run import SUBSPACE_NEWTON, Results

__all__ = ["write"]


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
        results.problem.config.output,
        _loss_picture(results),
        _partition_picture(results),
        _as_json(results),
    )


def _loss_picture(results: Results) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_seconds, by_step), (error, solution) = figure.subplots(2, 2)
    curves = results.curves
    plot.losses({k: (c.seconds, c.train_loss) for k, c in curves.items()}, by_seconds)
    by_seconds.set(title="Loss versus seconds", xlabel="seconds, without compiling")
    most = max(curves[SUBSPACE_NEWTON].steps)
    plot.losses({k: (c.steps, c.train_loss) for k, c in curves.items()}, by_step)
    by_step.set(title="Loss versus steps", xlim=(-0.03 * most, 1.5 * most))
    plot.losses(
        {k: (c.seconds, c.error) for k, c in curves.items()},
        error,
        ylabel="relative L2 error",
    )
    error.set(title="Error of the solution", xlabel="seconds, without compiling")
    x = np.linspace(0, 1, 501)
    plot.losses(_errors(results, x), solution, ylabel="absolute error")
    solution.set(title="Error of the last solution", xlabel="x")
    return figure


def _errors(
    results: Results, x: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The absolute error of each solution at x, without the ends, where it is zero."""
    with jax.enable_x64(True):
        x = jnp.asarray(x[1:-1])
        return {
            name: (x, np.abs(results.problem.solution(params, x) - true(x)))
            for name, params in results.params.items()
        }


def _partition_picture(results: Results) -> Figure:
    figure = Figure(figsize=(14, 6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    matrix, rates = figure.subplots(1, 2, width_ratios=(1, 1.15))
    plot.hessian(results.summary, results.names, matrix)
    matrix.set_title(f"Interactions after {results.snapshot_step} steps")
    ours = results.curves[SUBSPACE_NEWTON]
    plot.learning_rates((ours.steps[1:], ours.step_sizes), rates)
    rates.set(title="Step length of each subset", ylabel="RMS change of its entries")
    return figure


def _as_json(results: Results) -> dict[str, Any]:
    config = results.problem.config
    return {
        "problem": config.problem,
        "model": "mlp",
        "steps": config.steps,
        "seed": config.seed,
        "partition": config.partition,
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
        "wall_seconds": results.wall_seconds,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
