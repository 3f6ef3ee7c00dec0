"""The best run of each optimizer in each comparison, and numbers from it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.ladder.optimizers import ENTRIES, FAMILIES, OURS, VARIANTS
from benchmarks.ladder.plan import (
    Records,
    Settings,
    best_rates,
    final,
    horizon,
    rates,
)
from benchmarks.ladder.run import Job
from benchmarks.training_report import FLOOR

__all__ = ["Result", "best_rival", "result", "seconds_of", "time_to"]


class Result(NamedTuple):
    """An optimizer in a comparison, with its best schedule and rate.

    Attributes:
      entry, rate, steps: of its runs.
      runs: one record for each seed.
      is_at_edge: whether the rate is the smallest or largest of several.
    """

    entry: str
    rate: float
    steps: int
    runs: Sequence[dict]
    is_at_edge: bool

    def mean(self, field: str) -> float:
        """Over the seeds: geometric for losses, arithmetic for the metric."""
        values = np.array([final(r, field) for r in self.runs])
        if not np.isfinite(values).all():
            return np.inf
        if field == "metric":
            return float(values.mean())
        return float(np.exp(np.log(np.maximum(values, FLOOR)).mean()))


def result(
    records: Records, settings: Settings, family: str, axis: str
) -> Result | None:
    """The result of one of `FAMILIES` by training loss; None without runs."""
    found = [
        x
        for entry in FAMILIES[family]
        if (x := _of_entry(records, settings, entry, axis)) is not None
    ]
    return min(found, key=lambda x: x.mean("train"), default=None)


def _of_entry(
    records: Records, settings: Settings, entry: str, axis: str
) -> Result | None:
    steps = horizon(records, settings, entry, axis)
    chosen = [] if steps is None else best_rates(records, settings, entry, steps)
    if not chosen:
        return None
    rate = chosen[0]
    jobs = [Job(entry, rate, seed, steps) for seed in range(settings.seeds)]
    grid = sorted(rates(entry, settings))
    return Result(
        entry,
        rate,
        steps,
        [records[job] for job in jobs if job in records],
        len(grid) > 1 and len(ENTRIES[entry].rates) > 1 and rate in (grid[0], grid[-1]),
    )


def best_rival(records: Records, settings: Settings, axis: str) -> str | None:
    """The family with the smallest training loss, ours left out."""
    found = {
        family: x.mean("train")
        for family in FAMILIES
        if family not in OURS | VARIANTS
        and (x := result(records, settings, family, axis)) is not None
    }
    finite = [family for family, loss in found.items() if np.isfinite(loss)]
    return min(finite, key=found.get, default=None)


def seconds_of(record: dict, gradient_seconds: float) -> np.ndarray:
    """The seconds at each evaluation on a machine with this time of a gradient."""
    return np.array(record["seconds"]) / record["gradient_seconds"] * gradient_seconds


def time_to(found: Result, loss: float) -> float | None:
    """Gradients until the mean training loss reaches a value; None if it does not.

    Between evaluations, the logarithm of the loss is interpolated.
    """
    if any("failure" in r or r["train"][-1] is None for r in found.runs):
        return None
    curves = np.array([r["train"] for r in found.runs], float)
    logs = np.log(np.maximum(curves, FLOOR)).mean(0)
    times = np.mean([seconds_of(r, 1.0) for r in found.runs], axis=0)
    reached = np.flatnonzero(logs <= np.log(max(loss, FLOOR)) + 1e-6)
    if not len(reached):
        return None
    n = reached[0]
    if n == 0:
        return 0.0
    part = (logs[n - 1] - np.log(max(loss, FLOOR))) / max(logs[n - 1] - logs[n], 1e-12)
    return float(times[n - 1] + min(part, 1.0) * (times[n] - times[n - 1]))
