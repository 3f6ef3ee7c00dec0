"""What :mod:`benchmarks.cost` measured, as a table of ratios to Muon's cost."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.reporting import facts, markdown, number

__all__ = ["LONG_RUN", "REFERENCE", "Row", "report", "table"]

REFERENCE = "muon"
LONG_RUN = 1000  # steps, over which refreshes are averaged


@dataclasses.dataclass
class Row:
    """The training step of one optimizer on one network, measured.

    Attributes:
      network: a key of `benchmarks.cost_cases.NETWORKS`.
      optimizer: as on the command line.
      subsets: S, of the default partition of `partition_newton`.
      parameters: the number of their entries.
      init_seconds: CPU seconds of ``tx.init``, outside of jit.
      trace_seconds: CPU seconds of tracing and lowering the step.
      compile_seconds: CPU seconds of tracing, lowering and compiling the step.
      state_bytes: the size of the optimizer's state.
      temp_bytes: the memory that the executable needs beside arguments and results.
      refreshes: the steps of a turn that refresh the learning rates.
      long_run_refreshes: how many of the first `LONG_RUN` steps do.
      turns: the seconds of each step, for each turn; all turns start from the same
        parameters and state.
      cpu_turns: the same in CPU seconds, of all threads of the process.
    """

    network: str
    optimizer: str
    subsets: int
    parameters: int
    init_seconds: float
    trace_seconds: float
    compile_seconds: float
    state_bytes: int
    temp_bytes: int | None = None
    refreshes: list[int] = dataclasses.field(default_factory=list)
    long_run_refreshes: int = 0
    turns: list[list[float]] = dataclasses.field(default_factory=list)
    cpu_turns: list[list[float]] = dataclasses.field(default_factory=list)

    @property
    def average(self) -> float | None:
        """The seconds of a step, refreshes included."""
        return self._average(self.turns)

    @property
    def without_refresh(self) -> float | None:
        """The seconds of a step without a refresh."""
        return self._plain(self.turns)

    @property
    def cpu_average(self) -> float | None:
        """CPU seconds of a step, refreshes included."""
        return self._average(self.cpu_turns)

    @property
    def cpu_without_refresh(self) -> float | None:
        """CPU seconds of a step without a refresh."""
        return self._plain(self.cpu_turns)

    def _plain(self, turns: list[list[float]]) -> float | None:
        """The mean of the steps without a refresh."""
        times = [x for n, x in enumerate(_medians(turns)) if n not in self.refreshes]
        return statistics.fmean(times) if times else None

    def _average(self, turns: list[list[float]]) -> float | None:
        """The mean of the first `LONG_RUN` steps, from those of a turn."""
        plain, times = self._plain(turns), _medians(turns)
        if plain is None or not self.refreshes:
            return plain
        more = statistics.fmean(times[n] for n in self.refreshes) - plain
        return plain + more * self.long_run_refreshes / LONG_RUN

    @property
    def steps(self) -> int:
        """How many steps a turn has."""
        return len(self.turns[0]) if self.turns else 0

    def as_json(self) -> dict[str, Any]:
        """Fields and medians; of the turns, their median alone."""
        fields = dataclasses.asdict(self)
        del fields["turns"], fields["cpu_turns"]
        return fields | {
            "average": self.average,
            "without_refresh": self.without_refresh,
            "cpu_average": self.cpu_average,
            "cpu_without_refresh": self.cpu_without_refresh,
            "number_of_turns": len(self.turns),
            "step_seconds": [float(f"{x:.4g}") for x in _medians(self.turns)],
        }


def _medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """For each step its median over the turns, all of which do the same."""
    if not turns:
        return []
    return [statistics.median(times) for times in zip(*turns, strict=True)]


# Of a row: the column, the quantity, and the unit and digits of its absolute number.
QUANTITIES: dict[str, tuple[Callable[[Row], float | None], float, int]] = {
    "compile": (lambda row: row.compile_seconds, 1, 2),
    "average step": (lambda row: row.average, 1e3, 3),
    "step without refresh": (lambda row: row.without_refresh, 1e3, 3),
    "average CPU": (lambda row: row.cpu_average, 1e3, 3),
    "CPU without refresh": (lambda row: row.cpu_without_refresh, 1e3, 3),
}
HEADER = (
    "network",
    "S",
    "optimizer",
    *(f"{name} / Muon's" for name in QUANTITIES),
    "compile CPU s",
    "average step ms",
    "without refresh ms",
    "average CPU ms",
    "CPU without refresh ms",
    "trace CPU s",
    "init CPU s",
    "state B / parameter",
    "temp MiB",
    "steps",
)
NOTES = """\
The step is jitted and donates parameters and state: the loss and its gradient, the
update, `optax.apply_updates`. "compile" is tracing, lowering and compiling, in CPU
seconds of a process of its own with empty caches. An average step is the mean of the
first 1000, computed from the mean of those with and of those without a refresh; each is
waited for and is itself the median of its repetitions. "CPU" is the same in CPU seconds
of all threads, which depends less on other load. S is the number of subsets.
"""


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, ratios first.

    Args:
      rows: of any number of networks.

    Returns:
      Lines without an end of line after the last.

    Example:
      >>> muon = Row("cnn", "muon", 8, 100, 0.1, 0.5, 2.0, 400)
      >>> adam = Row("cnn", "adam", 8, 100, 0.1, 0.5, 1.0, 800)
      >>> muon.turns = muon.cpu_turns = [[1e-3]]
      >>> adam.turns = adam.cpu_turns = [[2e-3]]
      >>> print(table([muon, adam]).splitlines()[-1][:51])
      | cnn | 8 | adam | 0.50 | 2.00 | 2.00 | 2.00 | 2.00
    """
    references = {row.network: row for row in rows if row.optimizer == REFERENCE}
    cells = [_cells(row, references.get(row.network)) for row in rows]
    return "\n".join(markdown(HEADER, cells))


def report(rows: Sequence[Row], where: Mapping[str, Any]) -> str:
    """The whole of it in Markdown: the machine, the table, and what it means."""
    return f"{facts(where)}\n\n{table(rows)}\n\n{NOTES}"


def _cells(row: Row, reference: Row | None) -> tuple[str, ...]:
    def ratio(quantity: Callable[[Row], float | None]) -> float | None:
        unit = None if reference is None else quantity(reference)
        value = quantity(row)
        return value / unit if value is not None and unit else None

    return (
        row.network,
        str(row.subsets),
        row.optimizer,
        *(number(ratio(quantity), 1, 2) for quantity, _, _ in QUANTITIES.values()),
        *(number(get(row), unit, digits) for get, unit, digits in QUANTITIES.values()),
        number(row.trace_seconds, 1, 2),
        number(row.init_seconds, 1, 2),
        number(row.state_bytes / row.parameters, 1, 1),
        number(row.temp_bytes, 1 / 2**20, 1),
        str(row.steps),
    )
