"""Results of the training benchmark as Markdown and figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.training_optimizers import OURS, SWEEPS, TUNED, UNTUNED, VARIANTS

__all__ = ["FLOOR", "final_losses", "markdown", "picture"]

FLOOR = 1e-6
"""Smaller losses are replaced by this value: in float32 they are rounding error."""

Results = dict[str, Any]  # of one problem: optimizer -> rates and curves


def markdown(results: dict[str, Results]) -> str:
    """Tables of losses, test metrics and times."""
    parts = [
        "Final training loss, geometric mean over seeds; tuned optimizers with their "
        "best rate and schedule.",
        _table(results, _loss, "{:.3g}"),
        "The same, divided by the loss of the best tuned Adam.",
        _table(results, _ratio, "{:.3g}", geometric_mean=True),
        "Test metric: error rate, or loss for regressions; mean over seeds, tuned "
        "optimizers with the rate of the best training loss.",
        _table(results, _metric, "{:.3g}"),
        "Fraction of the steps until the final loss of the best tuned Adam is reached.",
        _table(results, _fraction, "{:.2f}"),
        "Number of diverged runs (a final loss that is not finite, or more than 3 "
        "times the first one) of all seeds; tuned optimizers with their best rate.",
        _table(results, _divergences, "{:d}"),
    ]
    for sweep in SWEEPS:
        if any(sweep in row for row in results.values()):
            parts += [f"Final training loss for different values of `{sweep}`."]
            parts += [_sweep(results, sweep)]
    if any(name in row for row in results.values() for name in VARIANTS):
        parts += [
            "`partition_newton` with one default changed: ratios of final training "
            "losses to those of the best tuned Adam, and to those with all defaults.",
            _variants(results),
        ]
    if all("seconds" in row for row in results.values()):
        parts += ["Milliseconds per step, without evaluation.", _times(results)]
        parts += [
            "Training loss after the time that Adam needs for all of its steps, over "
            "the final loss of the best tuned Adam; logarithmic interpolation between "
            "evaluations.",
            _table(results, _ratio_at_equal_seconds, "{:.3g}", geometric_mean=True),
            "Gradient-equivalents per step: 1 plus the additional time of "
            "partition_newton compared with its direction, divided by the time of a "
            "step of gradient descent.",
            _equivalents_table(results),
            "Training loss after as many gradient-equivalents as Adam makes steps.",
            _table(results, _ratio_at_equal_gradients, "{:.3g}", geometric_mean=True),
        ]
    return "\n\n".join(parts) + "\n"


def best(row: Results, name: str) -> tuple[str, int] | None:
    """The entry and the index of the rate with the smallest final training loss."""
    entries = [x for x in TUNED.get(name, (name,)) if x in row]
    found = [(final_losses(row[x]), x) for x in entries]
    if not found:
        return None
    losses, entry = min(found, key=lambda pair: np.min(pair[0]))
    return entry, int(np.argmin(losses))


def final_losses(entry: Results) -> np.ndarray:
    """For each rate, the geometric mean over seeds of the final training loss."""
    final = np.array(entry["train"], float)[:, :, -1]
    final = np.where(np.isfinite(final), np.clip(final, FLOOR, 1e9), 1e9)
    return np.exp(np.log(final).mean(1))


def _curves(row: Results, name: str, field: str) -> np.ndarray | None:
    """The curves (seeds, 1 + evaluations) of an optimizer with its best rate."""
    place = best(row, name)
    return None if place is None else np.array(row[place[0]][field], float)[place[1]]


def _loss(row: Results, name: str) -> float | None:
    place = best(row, name)
    return None if place is None else float(final_losses(row[place[0]])[place[1]])


def _ratio(row: Results, name: str) -> float | None:
    ours, adam = _loss(row, name), _loss(row, "adam")
    return None if ours is None or adam is None else ours / adam


def _metric(row: Results, name: str) -> float | None:
    curves = _curves(row, name, "metric")
    return None if curves is None else float(curves[:, -1].mean())


def _fraction(row: Results, name: str) -> float | None:
    curves, adam = _curves(row, name, "train"), _loss(row, "adam")
    if curves is None or adam is None:
        return None
    mean = np.exp(np.log(np.maximum(curves, FLOOR)).mean(0))
    reached = np.flatnonzero(mean <= adam * 1.001)
    return reached[0] / (len(mean) - 1) if len(reached) else None


def _ratio_at_equal_seconds(row: Results, name: str) -> float | None:
    a_step = row["seconds"].get(TUNED.get(name, (name,))[0])
    if a_step is None:
        return None
    return _ratio_at(row, name, min(row["seconds"]["adam_c"] / a_step, 1))


def _ratio_at_equal_gradients(row: Results, name: str) -> float | None:
    if name in TUNED:
        return _ratio_at(row, name, 1)
    if name == "partition_newton":
        return _ratio_at(row, name, 1 / _equivalents(row))
    return None


def _equivalents(row: Results) -> float:
    """The cost of a step of partition_newton without its direction, in gradients."""
    seconds = row["seconds"]
    more = seconds["partition_newton"] - seconds["muon_c"]
    return 1 + max(more, 0) / seconds["gradient"]


def _ratio_at(row: Results, name: str, fraction: float) -> float | None:
    """The loss after a fraction of the steps, over the final one of the best Adam."""
    curves, adam = _curves(row, name, "train"), _loss(row, "adam")
    if curves is None or adam is None:
        return None
    steps = np.linspace(0, 1, curves.shape[1])
    logs = np.log(np.where(np.isfinite(curves), np.clip(curves, FLOOR, 1e9), 1e9))
    return float(np.exp(np.interp(fraction, steps, logs.mean(0))) / adam)


def _divergences(row: Results, name: str) -> int | None:
    curves = _curves(row, name, "train")
    if curves is None:
        return None
    return int(np.sum(~(curves[:, -1] <= 3 * curves[:, 0])))


def _table(
    results: dict[str, Results], cell: Any, form: str, geometric_mean: bool = False
) -> str:
    columns = [
        name
        for name in (*OURS, *TUNED, *UNTUNED)
        if any(cell(row, name) is not None for row in results.values())
    ]
    values = {p: [cell(row, name) for name in columns] for p, row in results.items()}
    lines = [
        f"| problem | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for problem, row in values.items():
        cells = ["" if x is None else form.format(x) for x in row]
        lines.append(f"| {problem} | {' | '.join(cells)} |")
    if geometric_mean:
        means = [
            np.exp(np.mean([np.log(x) for x in column if x is not None]))
            for column in zip(*values.values(), strict=True)
        ]
        cells = [form.format(x) for x in means]
        lines.append(f"| **geometric mean** | {' | '.join(cells)} |")
    return "\n".join(lines)


def _equivalents_table(results: dict[str, Results]) -> str:
    lines = ["| problem | gradient-equivalents |", "| --- | --- |"]
    lines += [f"| {name} | {_equivalents(row):.2f} |" for name, row in results.items()]
    return "\n".join(lines)


def _sweep(results: dict[str, Results], sweep: str) -> str:
    rates = list(SWEEPS[sweep].rates)
    header = " | ".join(f"{rate:g}" for rate in rates)
    lines = [
        f"| problem | {header} | adam, tuned |",
        "| --- " * (len(rates) + 2) + "|",
    ]
    for problem, row in results.items():
        if sweep in row:
            cells = [f"{x:.3g}" for x in final_losses(row[sweep])]
            adam = _loss(row, "adam")
            cells.append("" if adam is None else f"{adam:.3g}")
            lines.append(f"| {problem} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _variants(results: dict[str, Results]) -> str:
    columns = "ratio to adam | at or below adam | largest ratio to defaults | smallest"
    lines = [f"| variant | {columns} |", "| --- " * 5 + "|"]
    for name in ("partition_newton", *VARIANTS):
        rows = {p: row for p, row in results.items() if name in row}
        ratios = [x for row in rows.values() if (x := _ratio(row, name)) is not None]
        changes = {
            p: _loss(row, name) / _loss(row, "partition_newton")
            for p, row in rows.items()
            if "partition_newton" in row
        }
        if not ratios or not changes:
            continue
        most, least = max(changes, key=changes.get), min(changes, key=changes.get)
        cells = [
            f"{np.exp(np.mean(np.log(ratios))):.3g}",
            f"{sum(x <= 1.001 for x in ratios)} of {len(ratios)}",
            f"{changes[most]:.3g} ({most})",
            f"{changes[least]:.3g} ({least})",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(results: dict[str, Results]) -> str:
    columns = list(next(iter(results.values()))["seconds"])
    lines = [
        f"| problem | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for problem, row in results.items():
        cells = [f"{1e3 * row['seconds'][x]:.3g}" for x in columns]
        lines.append(f"| {problem} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(name: str, row: Results) -> Figure:
    """The training losses of all optimizers with their best rates."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for optimizer in (*UNTUNED, *TUNED, *OURS):
        curves = _curves(row, optimizer, "train")
        if curves is not None:
            mean = np.exp(np.log(np.clip(curves, FLOOR, 1e9)).mean(0))
            ax.plot(
                np.linspace(0, 1, len(mean)),
                mean,
                label=optimizer,
                linewidth=2.2 if optimizer in OURS else 0.9,
                linestyle="--" if optimizer in UNTUNED else "-",
            )
    top = np.array(next(iter(row.values()))["train"], float)[0, :, 0].mean()
    ax.set(
        yscale="log", xlabel="fraction of the steps", ylabel="training loss", title=name
    )
    ax.set_ylim(top=3 * top)
    ax.legend(fontsize=6, ncols=2)
    return figure
