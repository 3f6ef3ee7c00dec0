"""Tables and pictures of the runs."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import reporting
from benchmarks.full_batch.optimizers import OPTIMIZERS, OURS, SCIPY, TUNED
from benchmarks.full_batch.problems import PROBLEMS

__all__ = ["AXES", "markdown", "picture", "seconds_to_target", "value_at_end"]

FLOOR = 1e-16
"""Smaller differences from the minimum are replaced by this value."""

TARGET = 1e-6
"""Of the first loss less its minimum, to which seconds are reported."""

GRADIENT_SHARE = 0.25
"""The table at equal gradients is at this part of the gradients of the budget."""

Record = dict[str, Any]
Score = Callable[[Record], float]  # smaller is better
Axis = Callable[[Record], tuple[np.ndarray, float]]


def _seconds(record: Record) -> tuple[np.ndarray, float]:
    return np.array(record["seconds"]), record["budget"]


def _seconds_with_compiling(record: Record) -> tuple[np.ndarray, float]:
    return np.array(record["seconds"]) + record["compile_seconds"], record["budget"]


def _gradients(record: Record) -> tuple[np.ndarray, float]:
    """Counted if the method's cost is countable, else from the seconds."""
    end = GRADIENT_SHARE * record["budget"] / record["gradient_seconds"]
    if record["evaluations"] is None:
        return np.array(record["seconds"]) / record["gradient_seconds"], end
    return np.array(record["evaluations"], float), end


AXES: dict[str, tuple[str, Axis]] = {
    "seconds": ("At equal seconds, without compiling.", _seconds),
    "compiling": ("At equal seconds, compiling included.", _seconds_with_compiling),
    "gradients": (
        "At equal gradient-equivalents: a quarter of those of the budget. Values with "
        "gradients are counted for AdamW, L-BFGS and BFGS (other work is free); for "
        "all others, seconds are divided by those of one value with gradient.",
        _gradients,
    ),
}


def markdown(records: Sequence[Record]) -> str:
    """The tables of all dtypes in the records."""
    failed = [r for r in records if "failure" in r]
    runs = [r for r in records if "failure" not in r]
    parts = [
        "Loss less its minimum (or lower bound), evaluated in float64, geometric mean "
        f"over seeds; at least {FLOOR:g}. AdamW with the best of its rates. In "
        "brackets: the largest over the smallest of the seeds. The last column is "
        f"the first of {', '.join(list(OURS)[:2])} in the table over the best of the "
        "others on this problem: below 1, it is better than all of them."
    ]
    for dtype in sorted({r["dtype"] for r in runs}):
        chosen = [r for r in runs if r["dtype"] == dtype]
        for title, axis in AXES.values():
            parts += [f"### {dtype}\n\n{title}", _table(chosen, _at_end(axis))]
        parts += [
            f"### {dtype}\n\nSeconds, without compiling, until the difference "
            f"from the minimum is {TARGET:g} times the first one.",
            _table(chosen, seconds_to_target),
            f"### {dtype}\n\nRelative error of the solution at equal seconds.",
            _table([r for r in chosen if r["error"]], _at_end(_seconds, "error")),
            f"### {dtype}\n\nMilliseconds of a gradient, and seconds of compiling.",
            _costs(chosen),
        ]
    if failed:
        parts += ["### Failed runs", *(_failure_line(r) for r in failed)]
    return "\n\n".join(parts) + "\n"


def _failure_line(record: Record) -> str:
    names = [str(record[k]) for k in ("problem", "optimizer", "dtype", "seed")]
    return f"- {' '.join(names)}: {record['failure']}"


def value_at_end(record: Record, axis: Axis, field: str = "loss") -> float:
    """The last recorded value within the budget of an axis."""
    where, end = axis(record)
    index = int(np.searchsorted(where, end * (1 + 1e-9), side="right")) - 1
    # A point that is recorded just after the end counts as the end.
    if index + 1 < len(where) and where[index + 1] <= 1.05 * end:
        index += 1
    return float(_values(record, field)[max(index, 0)])


def _at_end(axis: Axis, field: str = "loss") -> Score:
    return functools.partial(value_at_end, axis=axis, field=field)


def seconds_to_target(record: Record) -> float:
    """The seconds until `TARGET` is reached; infinite if it is not."""
    values = _values(record, "loss")
    reached = np.flatnonzero(values <= TARGET * values[0])
    return record["seconds"][reached[0]] if len(reached) else np.inf


def _values(record: Record, field: str) -> np.ndarray:
    """Losses less their minimum, or errors; infinite where not finite."""
    values = np.array([np.inf if x is None else x for x in record[field]])
    if field == "loss":
        values = values - record["minimum"]
    return np.maximum(values, FLOOR)


def _summarised(
    records: Sequence[Record], entry: str, score: Score
) -> tuple[float, float] | None:
    """The geometric mean over seeds, and the largest over the smallest value."""
    values = np.array([score(r) for r in records if r["optimizer"] == entry])
    if not len(values):
        return None
    if not np.isfinite(values).all():
        return np.inf, np.inf
    return float(np.exp(np.log(values).mean())), float(values.max() / values.min())


def columns(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """The names of columns, and their entries, of which the best one is shown."""
    found = {r["optimizer"] for r in records}
    tuned = {x for entries in TUNED.values() for x in entries}
    single = {x: (x,) for x in (*OPTIMIZERS, SCIPY) if x not in tuned}
    return {
        name: entries
        for name, entries in (TUNED | single).items()
        if found & set(entries)
    }


def _table(records: Sequence[Record], score: Score) -> str:
    names = columns(records)
    rivals = [x for x in names if x not in OURS]
    rows, ratios = [], []
    for problem in (p for p in PROBLEMS if any(r["problem"] == p for r in records)):
        chosen = [r for r in records if r["problem"] == problem]
        cells = {}
        for name, entries in names.items():
            found = [_summarised(chosen, entry, score) for entry in entries]
            cells[name] = min((x for x in found if x is not None), default=None)
        rival = _best(cells, rivals)
        mine = next((x for x in OURS if x in names and cells[x] is not None), None)
        ratio = cells[mine][0] / cells[rival][0] if rival and mine else None
        if ratio is not None and np.isfinite(ratio):
            ratios.append(ratio)
        rows.append(
            [
                problem,
                *(_cell(cells[name]) for name in names),
                rival or "-",
                "-" if ratio is None else f"{ratio:.2g}",
            ]
        )
    if ratios:
        mean = f"{np.exp(np.mean(np.log(ratios))):.2g}"
        rows.append(["geometric mean", *[""] * (len(names) + 1), mean])
    header = ["problem", *names, "best rival", "ratio"]
    return "\n".join(reporting.markdown(header, rows))


def _best(cells: dict[str, Any], group: Sequence[str]) -> str | None:
    finite = [x for x in group if cells[x] is not None and np.isfinite(cells[x][0])]
    return min(finite, key=lambda x: cells[x][0], default=None)


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    mean, spread = value
    if not np.isfinite(mean):
        return "inf"
    return f"{mean:.2g}" if spread == 1 else f"{mean:.2g} ({spread:.2g})"


def _costs(records: Sequence[Record]) -> str:
    names = columns(records)
    rows = []
    for problem in (p for p in PROBLEMS if any(r["problem"] == p for r in records)):
        chosen = [r for r in records if r["problem"] == problem]
        gradient = np.median([r["gradient_seconds"] for r in chosen]) * 1e3
        row = [problem, str(chosen[0]["parameters"]), f"{gradient:.3g}"]
        for entries in names.values():
            found = [r["compile_seconds"] for r in chosen if r["optimizer"] in entries]
            row.append(f"{np.median(found):.1f}" if found else "-")
        rows.append(row)
    header = ["problem", "parameters", "gradient ms", *names]
    return "\n".join(reporting.markdown(header, rows))


def picture(problem: str, records: Sequence[Record], path: Path) -> None:
    """Losses and errors over seconds; a column of panels per dtype."""
    runs = [r for r in records if r["problem"] == problem and "failure" not in r]
    if not runs:
        return
    dtypes = sorted({r["dtype"] for r in runs})
    fields = ["loss", "error"] if any(r["error"] for r in runs) else ["loss"]
    names = columns(runs)
    figure = Figure((5 * len(dtypes), 3.4 * len(fields)), layout="constrained")
    axes = figure.subplots(len(fields), len(dtypes), squeeze=False, sharey="row")
    for i, field in enumerate(fields):
        for j, dtype in enumerate(dtypes):
            chosen = [r for r in runs if r["dtype"] == dtype]
            for color, (name, entries) in enumerate(names.items()):
                _draw(axes[i, j], chosen, name, entries, field, f"C{color % 10}")
            label = "loss - minimum" if field == "loss" else "relative error"
            axes[i, j].set(title=f"{problem}, {dtype}", xlabel="seconds", ylabel=label)
            axes[i, j].loglog()
            axes[i, j].grid(alpha=0.3)
    drawn = [ax.get_legend_handles_labels() for ax in axes.flat]
    labelled = {x: line for pair in drawn for line, x in zip(*pair, strict=True)}
    figure.legend(
        labelled.values(), labelled, loc="outside right upper", fontsize="small"
    )
    figure.savefig(path, dpi=110)


def _draw(
    axes: Any,
    records: Sequence[Record],
    name: str,
    entries: Sequence[str],
    field: str,
    color: str,
) -> None:
    """All seeds of the best entry."""
    finals = {
        entry: found[0]
        for entry in entries
        if (found := _summarised(records, entry, _at_end(_seconds))) is not None
    }
    if not finals:
        return
    entry = min(finals, key=finals.get)
    width = 2.2 if name in OURS else 1.2
    label = name
    for record in (r for r in records if r["optimizer"] == entry and r[field]):
        axes.plot(
            record["seconds"][1:],
            _values(record, field)[1:],
            color=color,
            linewidth=width,
            label=label,
        )
        label = None
