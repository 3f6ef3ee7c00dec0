"""Which runs a comparison needs, from the runs that are there.

The plan depends on nothing but stored runs and settings, so that an interrupted
benchmark goes on where it stopped. Three comparisons are made, the keys of `AXES`:

- "steps": each optimizer makes the N steps of the rung, with all rates of its grid;
- "seconds": each makes as many steps as take the time that the reference needs for N;
- "compiling": the same, where the times include compiling.

The horizon of a schedule is always the number of steps of the run. Runs of "seconds"
and "compiling" are made with the rates that were best at N steps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ladder.optimizers import ENTRIES, OURS
from benchmarks.ladder.run import Job

__all__ = [
    "AXES",
    "REFERENCE",
    "Records",
    "Settings",
    "best_rates",
    "cost",
    "final",
    "horizon",
    "missing",
    "rates",
    "seeds",
]

Record = dict[str, Any]
Records = Mapping[Job, Record]  # of one rung

REFERENCE = "partition_newton"
AXES = ("steps", "seconds", "compiling")
PARTS = 20  # of N, to which horizons are rounded: times are no more precise
LONG_RUN = 60.0  # seconds from which there is one seed


class Settings(NamedTuple):
    """What is compared on a rung.

    Attributes:
      steps: N.
      entries: keys of `ENTRIES`.
      seeds: how many, if a run of the reference takes less than a minute.
      rates: how many of each grid, those in the middle; all if None.
      carried: how many, the best ones at N steps, are tried with other horizons.
      reference: the entry whose N steps are the budget of time.
    """

    steps: int
    entries: Sequence[str]
    seeds: int = 3
    rates: int | None = None
    carried: int = 2
    reference: str = REFERENCE


def missing(records: Records, settings: Settings) -> list[Job]:
    """Runs that can start now; more may follow from their results; [] at the end."""
    first = [
        Job(entry, rate, 0, settings.steps)
        for entry in settings.entries
        for rate in rates(entry, settings)
    ]
    stages = (lambda: first, lambda: _stretched(records, settings))
    for stage in (*stages, lambda: _repeated(records, settings)):
        jobs = [job for job in dict.fromkeys(stage()) if job not in records]
        if jobs:
            return jobs
    return []


def _stretched(records: Records, settings: Settings) -> Iterable[Job]:
    """With the horizons of the other comparisons."""
    for entry in settings.entries:
        chosen = best_rates(records, settings, entry, settings.steps)
        for axis in AXES[1:]:
            steps = horizon(records, settings, entry, axis)
            if steps is not None:
                for rate in chosen[: settings.carried]:
                    yield Job(entry, rate, 0, steps)


def _repeated(records: Records, settings: Settings) -> Iterable[Job]:
    """Further seeds, with the rate that is the best with the first one."""
    for entry in settings.entries:
        for axis in AXES:
            steps = horizon(records, settings, entry, axis)
            if steps is not None:
                for rate in best_rates(records, settings, entry, steps)[:1]:
                    for seed in seeds(records, settings)[1:]:
                        yield Job(entry, rate, seed, steps)


def rates(entry: str, settings: Settings) -> Sequence[float]:
    """The rates of the grid that are tried."""
    grid = ENTRIES[entry].rates
    if settings.rates is None or len(grid) <= settings.rates:
        return grid
    first = (len(grid) - settings.rates) // 2
    return grid[first : first + settings.rates]


def seeds(records: Records, settings: Settings) -> range:
    """One seed if the reference takes a minute or more for N steps."""
    record = _of(records, settings.reference, settings.steps)
    is_long = bool(record) and record[0]["seconds"][-1] >= LONG_RUN
    return range(1 if is_long else settings.seeds)


def best_rates(
    records: Records, settings: Settings, entry: str, steps: int
) -> list[float]:
    """Rates by the final training loss with the first seed, the best one first."""
    found = {
        job.rate: final(record)
        for job, record in records.items()
        if (job.entry, job.seed, job.steps) == (entry, 0, steps)
        and job.rate in rates(entry, settings)
    }
    return sorted(found, key=found.get)


def final(record: Record, field: str = "train") -> float:
    """The last value of a curve; infinite if the run failed or diverged."""
    if "failure" in record or record["train"][-1] is None:
        return math.inf
    value = record[field][-1]
    return math.inf if value is None else value


def horizon(records: Records, settings: Settings, entry: str, axis: str) -> int | None:
    """The steps of an optimizer in a comparison; None if it cannot be told.

    Times are divided by that of a gradient in the same run. Steps are rounded to N and
    multiples of a twentieth of N. Compile times of `OURS` count as equal.
    """
    if axis == "steps":
        return settings.steps
    found = cost(records, settings, entry), cost(records, settings, settings.reference)
    if None in found:
        return None
    (own, own_compiling), (reference, reference_compiling) = found
    gradients = settings.steps * reference
    if axis == "compiling" and entry not in OURS:
        gradients += reference_compiling - own_compiling
    unit = max(1, settings.steps // PARTS)
    more = round((gradients / own - settings.steps) / unit)
    return max(unit, settings.steps + more * unit)


def cost(
    records: Records, settings: Settings, entry: str
) -> tuple[float, float] | None:
    """A step and the compilation of an optimizer, in gradients, from N steps.

    Medians over the rates; the compilation is divided by the gradient's time in runs of
    the reference.
    """
    runs = _of(records, entry, settings.steps)
    reference = _of(records, settings.reference, settings.steps)
    if not runs or not reference:
        return None
    step = np.median(
        [r["seconds"][-1] / r["at"][-1] / r["gradient_seconds"] for r in runs]
    )
    compiling = np.median([r["compile_seconds"] for r in runs])
    unit = np.median([r["gradient_seconds"] for r in reference])
    return float(step), float(compiling / unit)


def _of(records: Records, entry: str, steps: int) -> list[Record]:
    """Runs of an optimizer with the first seed that did not fail."""
    return [
        record
        for job, record in records.items()
        if (job.entry, job.seed, job.steps) == (entry, 0, steps)
        and "failure" not in record
        and record["at"][-1] > 0
    ]
