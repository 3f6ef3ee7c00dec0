"""The cost of summaries: ``python -m benchmarks.summary``.

Each of several networks is measured in a process of its own, because memory that an
earlier one has returned to `malloc` changes the time of later allocations, by up to a
factor of two.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import models
from benchmarks.reporting import (
    Parser,
    add_common_options,
    in_a_process,
    integer,
    machine,
    positive,
    started,
    write,
)
from benchmarks.summary.measure import HESSIAN_OF_PHI, Measurement, measure
from benchmarks.summary.report import report
from partnewton.engines import ENGINES

__all__ = ["main"]


def parser() -> Parser:
    """The parser of the command line."""
    result = Parser(
        prog="benchmarks.summary",
        usage="python -m benchmarks.summary [options]",
        description="Measures the time of summaries as a multiple of the time of one "
        "compiled gradient of the same loss on the same batch, with one subset per "
        "tensor. Prints a table and writes summary.json and summary.md.",
        allow_abbrev=False,
    )
    add = result.add_argument
    engines = (*ENGINES, HESSIAN_OF_PHI)
    add(
        "--model",
        nargs="+",
        choices=tuple(models.NETWORKS),
        default=list(models.NETWORKS),
        metavar="NAME",
        help=f"networks, among {', '.join(models.NETWORKS)} (default: all)",
    )
    add(
        "--engine",
        nargs="*",
        choices=engines,
        default=list(engines),
        metavar="NAME",
        help=f"among {', '.join(ENGINES)} and {HESSIAN_OF_PHI}, which is "
        "jax.hessian of phi, and nested jvp for its third order (default: all; without "
        "a name: only the gradient)",
    )
    add(
        "--batch",
        type=integer,
        metavar="N",
        help="batch size (default: that of each network)",
    )
    add(
        "--batch-size",
        type=integer,
        metavar="N",
        help="number of subsets that an engine processes together (default: that of "
        "the engine)",
    )
    add(
        "--tensor",
        action="store_true",
        help="measure derivative_tensors(order=3) as well",
    )
    add(
        "--directions",
        type=integer,
        default=1,
        metavar="K",
        help="measure summaries along K directions as well, if K is greater than 1 "
        "(default: %(default)s)",
    )
    add(
        "--repeats",
        type=integer,
        default=5,
        metavar="N",
        help="number of timed calls, after a first one (default: %(default)s)",
    )
    add(
        "--max-gib",
        type=positive,
        default=12.0,
        metavar="X",
        help="compile, but do not run, functions that need more memory "
        "(default: %(default)g)",
    )
    add_common_options(result, "summary")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the results.

    Args:
      argv: the arguments of the command line, without the name of the program.

    Returns:
      The exit code, 0.

    Raises:
      SystemExit: with code 2 and one line on standard error for invalid arguments; with
        code 0 after ``--help``.
    """
    options, command = started(parser(), "benchmarks.summary", argv)
    names = list(dict.fromkeys(options.model))
    call = _here if len(names) == 1 else in_a_process
    where, rows = {"command": f"`{command}`", **call(machine)}, []
    for name in names:
        rows += call(_measured, name, options)
        _write(options, rows, where)  # after each network, in case of an interrupt
    print(report(rows, where))
    return 0


def _here(function: Callable, *args: Any) -> Any:
    return function(*args)


def _measured(name: str, options: argparse.Namespace) -> list[Measurement]:
    return measure(
        models.make(name, options.batch, scale=options.scale),
        tuple(dict.fromkeys(options.engine)),
        tensor=options.tensor,
        directions=options.directions,
        batch_size=options.batch_size,
        repeats=options.repeats,
        max_gib=options.max_gib,
        max_seconds=options.max_seconds,
        log=functools.partial(print, file=sys.stderr, flush=True),
    )


def _write(
    options: argparse.Namespace, rows: Sequence[Measurement], where: dict[str, Any]
) -> None:
    write(
        options.output,
        "summary",
        where=where,
        options=options,
        rows=[_as_json(row) for row in rows],
        report=report(rows, where),
    )


def _as_json(row: Measurement) -> dict[str, Any]:
    fields = dataclasses.asdict(row) | {"median": row.median}
    if row.difference is not None and not math.isfinite(row.difference):
        fields["difference"] = str(row.difference)  # JSON has no NaN
    return fields
