"""The measurements as Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.reporting import facts, markdown, number
from benchmarks.summary.measure import GRADIENT, Measurement

__all__ = ["report", "table"]


def table(rows: Sequence[Measurement]) -> str:
    """Two tables in Markdown: the gradients, and the engines.

    Args:
      rows: from :func:`benchmarks.summary.measure.measure`, of any number of networks.

    Returns:
      The lines, without a newline after the last one.

    Example:
      >>> times = {"compile_seconds": 0.3, "seconds": [0.01, 0.02]}
      >>> sizes = {"temp_bytes": 2**20, "flops": 2e9}
      >>> row = Measurement("mlp", 100, 8, "", "gradient", **times, **sizes)
      >>> print(table([row]).splitlines()[2])
      | mlp | 100 | 8 | gradient | 15.00 | 0.30 | 1.0 | 2.00 |
    """
    plain = [
        (
            row.model,
            str(row.batch),
            str(row.subsets),
            row.quantity,
            number(row.median, 1e3, 2),
            number(row.compile_seconds, 1, 2),
            number(row.temp_bytes, 1 / 2**20, 1),
            number(row.flops, 1e-9, 2),
        )
        for row in rows
        if not row.engine
    ]
    gradients = {row.model: row for row in rows if row.quantity == GRADIENT}
    header = "network,batch,S,function,ms,compiling s,temp MiB,GFlop"
    lines = markdown(header.split(","), plain)
    measured = [row for row in rows if row.engine]
    if measured:
        header = (
            "network,S,engine,quantity,gradients,floor,times the floor,compiling s,"
            "compiling / gradient's,temp MiB,GFlop,difference,calls"
        )
        cells = [_cells(row, gradients[row.model]) for row in measured]
        lines += ["", *markdown(header.split(","), cells)]
    return "\n".join(lines)


def _cells(row: Measurement, gradient: Measurement) -> tuple[str, ...]:
    def over(value: float | None, unit: float | None) -> float | None:
        return value / unit if value is not None and unit else None

    return (
        row.model,
        str(row.subsets),
        row.engine,
        row.quantity,
        number(row.gradients, 1, 2) if row.skipped is None else f"- {row.skipped}",
        number(row.floor, 1, 2),
        number(over(row.gradients, row.floor), 1, 2),
        number(row.compile_seconds, 1, 1),
        number(over(row.compile_seconds, gradient.compile_seconds), 1, 1),
        number(row.temp_bytes, 1 / 2**20, 1),
        number(row.flops, 1e-9, 2),
        "-" if row.difference is None else f"{row.difference:.0e}",
        str(len(row.seconds)),
    )


NOTES = """\
Times are medians of interleaved calls, divided by the median of one compiled gradient.
The floor is the time of S/2 losses and one gradient. XLA counts the flops of the body
of a loop once, so the flops of an engine that loops over subsets cannot be compared.
The difference is the maximal error relative to the result of the first engine, in
float32.
"""


def report(rows: Sequence[Measurement], where: dict[str, Any]) -> str:
    """The machine, the tables and notes, in Markdown."""
    return f"{facts(where)}\n\n{table(rows)}\n\n{NOTES}"
