"""Tables and pictures of the comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import reporting
from benchmarks.ladder.optimizers import ENTRIES, FAMILIES, OURS, VARIANTS
from benchmarks.ladder.plan import AXES, Records, Settings, cost
from benchmarks.ladder.results import (
    Result,
    best_rival,
    result,
    seconds_of,
    time_to,
)

__all__ = ["details", "picture", "summary"]

TITLES = {
    "steps": "equal steps",
    "seconds": "equal seconds",
    "compiling": "equal seconds with compiling",
}


def summary(rungs: Mapping[str, tuple[Records, Settings]]) -> str:
    """One row per rung: ours over the best rival, in all comparisons."""
    lines = [
        "Final training losses of ours over that of the best rival (below 1: ours is "
        "better), test metrics at equal seconds, and the part of the seconds after "
        "which the best rival's final training loss is reached."
    ]
    ours = [x for x in OURS if any(_has(*pair, x) for pair in rungs.values())]
    header = ["rung", "parameters", "tensors", "steps", "seconds", "seeds"]
    for axis in AXES:
        header += [f"{TITLES[axis]}: best rival", *ours]
    header += ["metric", "best rival", *ours, *(f"time of {x}" for x in ours)]
    rows, ratios = [], {(axis, x): [] for axis in AXES for x in ours}
    for name, (records, settings) in rungs.items():
        reference = result(records, settings, settings.reference, "steps")
        if reference is None or "failure" in reference.runs[0]:
            continue
        rows.append(_summary_row(name, records, settings, ours, reference, ratios))
    if rows:
        rows.append(_means(ours, ratios, len(header)))
    return "\n".join([*lines, "", *reporting.markdown(header, rows)])


def _summary_row(
    name: str,
    records: Records,
    settings: Settings,
    ours: Sequence[str],
    reference: Result,
    ratios: dict[tuple[str, str], list[float]],
) -> list[str]:
    record = reference.runs[0]
    row = [name, str(record["parameters"]), str(record["tensors"])]
    row += [str(settings.steps), f"{record['seconds'][-1]:.3g}"]
    row.append(str(len(reference.runs)))
    for axis in AXES:
        rival = best_rival(records, settings, axis)
        loss = rival and result(records, settings, rival, axis).mean("train")
        row.append(f"{rival} {loss:.3g}" if rival else "-")
        for x in ours:
            found = result(records, settings, x, axis)
            if rival is None or found is None:
                row.append("-")
                continue
            ratio = found.mean("train") / loss
            row.append(f"{ratio:.3g}")
            ratios[axis, x].append(ratio)
    rival = best_rival(records, settings, "seconds")
    row.append(record["metric_name"])
    row += [_mean(records, settings, x, "seconds", "metric") for x in (rival, *ours)]
    return row + [_time(records, settings, x) for x in ours]


def _means(
    ours: Sequence[str], ratios: dict[tuple[str, str], list[float]], columns: int
) -> list[str]:
    row = ["geometric mean (below 1)", *[""] * 5]
    for axis in AXES:
        row.append("")
        for x in ours:
            values = np.array(ratios[axis, x])
            with np.errstate(divide="ignore"):
                mean = np.exp(np.log(values).mean()) if len(values) else np.nan
            row.append(f"{mean:.3g} ({np.sum(values < 0.999)} of {len(values)})")
    return row + [""] * (columns - len(row))


def details(name: str, records: Records, settings: Settings) -> str:
    """One row per optimizer: training loss / test metric (steps) per comparison."""
    header = ["optimizer", "entry, rate", *(TITLES[axis] for axis in AXES)]
    header += [_target(records, settings), "time taken"]
    header += ["step / gradient", "compiling s"]
    rows = []
    for family in FAMILIES:
        found = {axis: result(records, settings, family, axis) for axis in AXES}
        shown = found["seconds"] or found["steps"]
        if shown is None:
            continue
        if all("failure" in r for r in shown.runs):
            rows.append([family, shown.runs[0]["failure"], *[""] * (len(header) - 2)])
            continue
        edge = ", at the edge" if shown.is_at_edge else ""
        row = [family, f"{_named(shown)}{edge}"]
        row += [_cell(found[axis]) for axis in AXES]
        row += [_seconds_to(records, settings, family)]
        row += [_taken(records, settings, found["seconds"])]
        own = cost(records, settings, shown.entry)
        compiling = np.median([r["compile_seconds"] for r in shown.runs if "at" in r])
        row += ["-" if own is None else f"{own[0]:.2f}", f"{compiling:.1f}"]
        rows.append(row)
    counts = {len(x.runs) for f in OURS if (x := result(records, settings, f, "steps"))}
    seeds = "/".join(map(str, sorted(counts))) or "no"
    metric = _metric_name(records)
    told = f"{seeds} seed(s). Training loss / {metric} on test data (steps)."
    lines = [f"### {name}", "", told, "", *reporting.markdown(header, rows)]
    return "\n".join(lines)


def picture(name: str, records: Records, settings: Settings, path: Path) -> None:
    """Training and test losses over seconds, of the runs of equal seconds."""
    figure = Figure((11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    unit = result(records, settings, settings.reference, "steps")
    if unit is None or "failure" in unit.runs[0]:
        return
    gradient_seconds = unit.runs[0]["gradient_seconds"]
    for number, family in enumerate(FAMILIES):
        found = result(records, settings, family, "seconds")
        if found is None:
            continue
        is_ours = family in OURS | VARIANTS
        for record in (r for r in found.runs[:1] if "failure" not in r):
            for ax, field in zip(axes, ("train", "test"), strict=True):
                values = [np.nan if x is None else x for x in record[field]]
                ax.plot(
                    seconds_of(record, gradient_seconds),
                    values,
                    label=_named(found),
                    color=f"C{number % 10}",
                    linewidth=2.2 if is_ours else 1.1,
                    linestyle="-" if is_ours or number < 10 else "--",
                )
    for ax, field in zip(axes, ("training", "test"), strict=True):
        ax.set(
            xlabel="seconds, without compiling", ylabel=f"{field} loss", yscale="log"
        )
        ax.grid(alpha=0.3)
    top = max(max(r["train"][0] for r in unit.runs), 1e-12)
    axes[0].set_ylim(top=2 * top)
    axes[1].set_ylim(top=2 * top)
    figure.suptitle(name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=110)


def _has(records: Records, settings: Settings, family: str) -> bool:
    return result(records, settings, family, "steps") is not None


def _metric_name(records: Records) -> str:
    return next((r["metric_name"] for r in records.values() if "at" in r), "-")


def _mean(
    records: Records, settings: Settings, family: str | None, axis: str, field: str
) -> str:
    found = family and result(records, settings, family, axis)
    return f"{found.mean(field):.3g}" if found else "-"


def _named(found: Result) -> str:
    """The schedule and the rate, if there is one to tune."""
    is_tuned = len(ENTRIES[found.entry].rates) > 1
    return f"{found.entry}, {found.rate:g}" if is_tuned else found.entry


def _cell(found: Result | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean('train'):.3g} / {found.mean('metric'):.3g} ({found.steps})"


def _taken(records: Records, settings: Settings, found: Result | None) -> str:
    """The time of the runs of equal seconds over the budget, which they should take."""
    reference = cost(records, settings, settings.reference)
    if found is None or reference is None:
        return "-"
    gradients = [seconds_of(r, 1.0)[-1] for r in found.runs if "at" in r]
    return f"{np.mean(gradients) / (reference[0] * settings.steps):.2f}"


def _time(records: Records, settings: Settings, family: str) -> str:
    part = _part(records, settings, family)
    return "-" if part is None else f"{part:.2f}"


def _seconds_to(records: Records, settings: Settings, family: str) -> str:
    """The same in seconds of the first run of the reference, and as a part."""
    part = _part(records, settings, family)
    if part is None:
        return "-"
    reference = result(records, settings, settings.reference, "steps")
    return f"{part * reference.runs[0]['seconds'][-1]:.3g} ({part:.2f})"


def _target(records: Records, settings: Settings) -> str:
    rival = best_rival(records, settings, "seconds")
    if rival is None:
        return "seconds to best rival"
    loss = result(records, settings, rival, "seconds").mean("train")
    return f"seconds to {loss:.3g} (part of all)"


def _part(records: Records, settings: Settings, family: str) -> float | None:
    """Of the reference's time, until the best rival's final loss at equal seconds."""
    rival = best_rival(records, settings, "seconds")
    found = result(records, settings, family, "seconds")
    reference = cost(records, settings, settings.reference)
    if rival is None or found is None or reference is None:
        return None
    target = result(records, settings, rival, "seconds").mean("train")
    gradients = time_to(found, target)
    return None if gradients is None else gradients / (reference[0] * settings.steps)
