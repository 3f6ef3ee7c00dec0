"""The training benchmark at equal seconds: faster optimizers make more steps.

    python -m benchmarks.training_seconds --output training_results
    python -m benchmarks.training_seconds --problems spirals --seeds 1

Each problem has a process of its own, which computes in one thread, and all seconds are
CPU seconds. Results are stored, and an interrupted run is continued.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import problems, reporting
from benchmarks.training_loop import EVALUATIONS, seconds_per_step, train
from benchmarks.training_optimizers import OPTIMIZERS, TUNED
from benchmarks.training_report import FLOOR

__all__ = ["main", "table"]

REFERENCE = "partition_newton"  # the time of its steps is what all others have
OURS = (REFERENCE, "total_steps")
RIVALS = ("adam", "muon")

Row = dict[str, dict[str, Any]]  # of one problem: optimizer -> steps, losses, metrics


def main(argv: list[str] | None = None) -> None:
    options, command = reporting.started(_parser(), "benchmarks.training_seconds", argv)
    path = options.output / "training_seconds.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    reporting.use_one_thread()
    names = options.problems or (*problems.FIRST, *problems.SECOND)
    for name in tqdm(names, unit="problem", disable=None):
        if name not in rows:
            rows[name] = reporting.in_a_process(_measured, name, options.seeds)
            path.write_text(json.dumps(rows))
    text = "\n".join(table({name: rows[name] for name in names}))
    (options.output / "training_seconds.md").write_text(f"    {command}\n\n{text}\n")
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_seconds")
    known = [*problems.FIRST, *problems.SECOND, *problems.UNSEEN]
    parser.add_argument("--problems", nargs="+", choices=known, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("training_results"))
    return parser


def _measured(name: str, seeds: int) -> Row:
    """All optimizers on one problem, each for as long as the reference takes."""
    problem = problems.make(name)
    rates = {x: OPTIMIZERS[x].rates for x in OURS}
    schedules = {x: x for x in OURS}
    for rival in RIVALS:
        for x in TUNED[rival]:
            rates[x] = OPTIMIZERS[x].rates
            schedules[x] = TUNED[rival][-1]  # a constant rate takes no less time
    seconds = {
        x: seconds_per_step(problem, OPTIMIZERS[x].make, rates[x])
        for x in dict.fromkeys(schedules.values())
    }
    row = {}
    for x, timed in schedules.items():
        ratio = seconds[REFERENCE] / seconds[timed]
        steps = EVALUATIONS * max(round(problem.steps * ratio / EVALUATIONS), 1)
        longer = problem._replace(steps=problem.steps if x == REFERENCE else steps)
        curves = train(longer, OPTIMIZERS[x].make, rates[x], seeds)
        row[x] = {
            "steps": longer.steps,
            "seconds_per_step": seconds[timed],
            "rates": rates[x].tolist(),
            "train": curves.train_loss[:, :, -1].tolist(),
            "metric": curves.test_metric[:, :, -1].tolist(),
        }
    return row


# --- The table -----------------------------------------------------------------------


def table(rows: dict[str, Row]) -> list[str]:
    """Losses, test metrics and steps, and the ratios of ours to the better rival."""
    header = ["problem", *OURS, *RIVALS, "ratio", "ratio with total_steps"]
    lines, ratios = [], []
    for name, row in rows.items():
        entries = {x: _best(row, TUNED.get(x, (x,))) for x in (*OURS, *RIVALS)}
        rival = min(entries[x][0] for x in RIVALS)
        ratios.append([entries[x][0] / rival for x in OURS])
        cells = [f"{a:.3g} / {b:.3g} ({n})" for a, b, n in entries.values()]
        lines.append([f"`{name}`", *cells, *(f"{x:.2f}" for x in ratios[-1])])
    means = np.exp(np.mean(np.log(ratios), axis=0))
    blank = [""] * (len(OURS) + len(RIVALS))
    lines.append(["**geometric mean**", *blank, *(f"{x:.2f}" for x in means)])
    return reporting.markdown(header, lines)


def _best(row: Row, names: tuple[str, ...]) -> tuple[float, float, int]:
    """Loss, test metric and steps with the schedule and rate of the lowest loss."""
    found = []
    for name in names:
        losses = np.array(row[name]["train"], float)
        losses = np.where(np.isfinite(losses), np.clip(losses, FLOOR, 1e9), 1e9)
        losses = np.exp(np.log(losses).mean(1))
        rate = int(np.argmin(losses))
        metric = float(np.mean(row[name]["metric"][rate]))
        found.append((float(losses[rate]), metric, row[name]["steps"]))
    return min(found)


if __name__ == "__main__":
    main()
