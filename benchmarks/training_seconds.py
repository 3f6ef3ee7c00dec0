"""The training benchmark at equal seconds: faster optimizers make more steps.

    python -m benchmarks.training_seconds --output training_results
    python -m benchmarks.training_seconds --problems spirals --seeds 1

Each problem has a process of its own, which computes in one thread, and all seconds are
CPU seconds. Results are stored, and an interrupted run is continued.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import problems, reporting
from benchmarks.training_loop import EVALUATIONS, timed_run, train
from benchmarks.training_optimizers import OPTIMIZERS
from benchmarks.training_report import best, final_losses

__all__ = ["conclusion", "main", "table"]

REFERENCE = "partition_newton"  # the time of its steps is what all others have
OURS = (REFERENCE, "total_steps")
TURNS = 25
RIVALS = ("adam_s", "muon_s")  # with the cosine schedule
COMPARED = (*OURS, *RIVALS)

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
    shown = {name: rows[name] for name in names}
    text = "\n".join([*table(shown), "", *(conclusion(shown, x) for x in OURS)])
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
    return _trained(name, seeds, _timed(name))


def _timed(name: str) -> dict[str, float]:
    """For each optimizer, the smallest time of a step, in seconds."""
    problem = problems.make(name)
    runs = {x: timed_run(problem, *OPTIMIZERS[x][:2]) for x in COMPARED}
    # In turns, so that other load on the machine meets all of them.
    turns = [{x: run() for x, run in runs.items()} for _ in range(TURNS)]
    return {x: min(turn[x] for turn in turns) for x in runs}


def _trained(name: str, seeds: int, seconds: dict[str, float]) -> Row:
    """As many steps of each optimizer as take the time of those of the reference."""
    problem = problems.make(name)
    row = {}
    for x in COMPARED:
        make, rates, _ = OPTIMIZERS[x]
        steps = problem.steps * seconds[REFERENCE] / seconds[x]
        steps = EVALUATIONS * max(round(steps / EVALUATIONS), 1)
        curves = train(problem._replace(steps=steps), make, rates, seeds)
        row[x] = {
            "steps": steps,
            "seconds_per_step": seconds[x],
            "rates": rates.tolist(),
            "train": curves.train_loss[:, :, -1:].tolist(),
            "metric": curves.test_metric[:, :, -1:].tolist(),
        }
    return row


# --- The table -----------------------------------------------------------------------


class _Final(NamedTuple):
    """What an optimizer reaches with the rate of the lowest training loss."""

    loss: float
    metrics: np.ndarray  # on the test data, of each seed
    steps: int


def table(rows: dict[str, Row]) -> list[str]:
    """Losses, test metrics and steps, and the ratios of ours to the better rival."""
    header = ["problem", *OURS, "adam", "muon", "ratio", "ratio with total_steps"]
    lines, ratios = [], []
    for name, row in rows.items():
        rival = _better_rival(row)
        finals = [_final(row, x) for x in COMPARED]
        ratios.append([_final(row, x).loss / rival.loss for x in OURS])
        cells = [f"{x.loss:.3g} / {np.mean(x.metrics):.3g} ({x.steps})" for x in finals]
        lines.append([f"`{name}`", *cells, *(f"{x:.2f}" for x in ratios[-1])])
    means = np.exp(np.mean(np.log(ratios), axis=0))
    blank = [""] * len(COMPARED)
    lines.append(["**geometric mean**", *blank, *(f"{x:.2f}" for x in means)])
    return reporting.markdown(header, lines)


def conclusion(rows: dict[str, Row], name: str) -> str:
    """On how many problems one of ours is as good as the better rival."""
    level = near = 0
    worse = []
    for problem, row in rows.items():
        ours, rival = _final(row, name), _better_rival(row)
        level += ours.loss <= 1.01 * rival.loss
        near += ours.loss <= 1.2 * rival.loss
        excess = np.mean(ours.metrics) - np.mean(rival.metrics)
        if not excess <= np.ptp(rival.metrics):  # or it is not a number
            worse.append(f"`{problem}`")
    return (
        f"- `{name}`: at or below the better rival, or within 1 %, on {level} of "
        f"{len(rows)} problems; within 20 % on {near}; its test metric exceeds that of "
        f"this rival by more than the range of its seeds on {len(worse)}: "
        f"{', '.join(worse) or 'none'}."
    )


def _better_rival(row: Row) -> _Final:
    return min((_final(row, x) for x in RIVALS), key=lambda final: final.loss)


def _final(row: Row, name: str) -> _Final:
    entry, rate = best(row, name)
    results = row[entry]
    metrics = np.array(results["metric"], float)[rate, :, -1]
    return _Final(final_losses(results)[rate], metrics, results["steps"])


if __name__ == "__main__":
    main()
