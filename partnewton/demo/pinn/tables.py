"""The results as tables for a terminal."""

import textwrap

import jax

from partnewton.demo.pinn.run import SUBSPACE_NEWTON, Results
from partnewton.demo.tables import WIDTH, seconds_to, table

__all__ = ["report"]


def report(results: Results) -> str:
    """The results as tables for a terminal.

    Args:
      results: from :func:`run`.

    Returns:
      Lines of text.
    """
    config = results.problem.config
    count = sum(x.size for x in jax.tree.leaves(results.problem.params))
    description = (
        "u'' = f on [0, 1], u = sin(2 pi x) + 0.1 sin(10 pi x), in float64\n"
        f"mlp: {count} parameters, partition {config.partition} with "
        f"{len(results.names)} subsets; {config.steps} steps of {SUBSPACE_NEWTON}, "
        f"seed {config.seed}"
    )
    settings = "\n".join(f"{k}: {c.settings}" for k, c in results.curves.items())
    notes = (
        "All have the same initial weights and the same number of seconds, which do "
        "not include compiling. The loss is relative to that of u = 0, and the error "
        "is the relative L2 error of the solution. Seconds to L-BFGS's loss are those "
        "until the first evaluation with at most its last one. "
    ) + _counts(results)
    filled = textwrap.fill(notes, WIDTH, break_on_hyphens=False)
    return "\n\n".join((description, _optimizer_table(results), settings, filled))


def _optimizer_table(results: Results) -> str:
    target = results.curves["lbfgs"].train_loss[-1]
    header = (
        "optimizer",
        "train loss",
        "error",
        "steps",
        "seconds",
        "seconds to L-BFGS's loss",
        "compiling",
    )
    rows = [
        (
            name,
            f"{curves.train_loss[-1]:.3g}",
            f"{curves.error[-1]:.3g}",
            f"{curves.steps[-1]}",
            f"{curves.seconds[-1]:.2f}",
            seconds_to(curves, target),
            f"{curves.compile_seconds:.2f}",
        )
        for name, curves in results.curves.items()
    ]
    return table(header, rows, left=(0,))


def _counts(results: Results) -> str:
    logged = results.curves[SUBSPACE_NEWTON].logged
    count, used, refused = (
        int(logged[name][-1]) for name in ("count", "summary_count", "refused_count")
    )
    return (
        f"Of the {count} steps of {SUBSPACE_NEWTON}, {used} were in the subspace and "
        f"{count - used} along the quasi-Newton direction; {refused} were refused."
    )
