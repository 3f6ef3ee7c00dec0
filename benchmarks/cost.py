"""What a training step costs: ``python -m benchmarks.cost``.

Parameters and state are donated to the jitted step. Measured are the CPU seconds until
it is compiled, its time on average and without a refresh, and the size of the state,
for `partition_newton`, for each transformation of its chain alone, and for other
optimizers of optax. All numbers are multiples of those of `optax.contrib.muon` on the
same network.

Each optimizer has a process of its own, so that compiled programs are not shared, and
the processes of a network are timed in turns, so that other load on the machine affects
all of them.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from benchmarks import reporting
from benchmarks.cost_cases import NETWORKS, OPTIMIZERS, TRANSFORMATIONS
from benchmarks.cost_report import Row, report
from benchmarks.cost_training import MOST_STEPS, measure

__all__ = ["main"]

QUICK_NETWORKS = ("spirals", "digits_cnn")
QUICK_OPTIMIZERS = ("adamw", "muon", "partition_newton")


def parser() -> reporting.Parser:
    """The parser of the command line."""
    result = reporting.Parser(
        prog="benchmarks.cost",
        usage="python -m benchmarks.cost [options]",
        description="Compiles and times training steps, each as a multiple of what the "
        "step with optax.contrib.muon takes. Prints a table and writes cost.json and "
        "cost.md, which are kept up to date while it runs.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--networks",
        nargs="+",
        choices=tuple(NETWORKS),
        metavar="NAME",
        help=f"among {', '.join(NETWORKS)} (default: all)",
    )
    add(
        "--optimizers",
        nargs="+",
        type=_optimizer_name,
        metavar="NAME",
        help=f"among {', '.join(OPTIMIZERS)} (default: all); those of the chain, "
        f"{', '.join(TRANSFORMATIONS)}, can be joined by +",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{', '.join(QUICK_NETWORKS)} with {', '.join(QUICK_OPTIMIZERS)} unless "
        "others are named, and one turn",
    )
    add("--compile-only", action="store_true", help="compile without timing steps")
    add(
        "--turns",
        type=reporting.integer,
        default=3,
        metavar="N",
        help="number of repetitions of the steps, for medians (default: %(default)s)",
    )
    add(
        "--seconds",
        type=reporting.positive,
        default=3.0,
        metavar="X",
        help="duration of a turn, with at least one refresh interval and at most "
        f"{MOST_STEPS} steps or one interval (default: %(default)g)",
    )
    reporting.add_common_options(result, "cost")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
      argv: the arguments of the command line, without the name of the program.

    Returns:
      The exit code, 0.

    Raises:
      SystemExit: with code 2 after one line on standard error where something is wrong
        with the arguments; with code 0 after ``--help``.
    """
    options, command = reporting.started(parser(), "benchmarks.cost", argv)
    where = {"command": f"`{command}`"}
    where |= reporting.in_a_process(reporting.machine)
    networks = options.networks or (QUICK_NETWORKS if options.quick else NETWORKS)
    names = options.optimizers or (QUICK_OPTIMIZERS if options.quick else OPTIMIZERS)
    turns = 0 if options.compile_only else 1 if options.quick else options.turns
    rows: list[Row] = []
    for network in dict.fromkeys(networks):
        for row in measure(
            network,
            tuple(dict.fromkeys(names)),
            scale=options.scale,
            turns=turns,
            seconds=options.seconds,
            max_seconds=options.max_seconds,
            log=functools.partial(print, file=sys.stderr, flush=True),
        ):
            if not any(row is known for known in rows):
                rows.append(row)
            reporting.write(  # an interrupt loses nothing
                options.output,
                "cost",
                where=where,
                options=options,
                rows=[x.as_json() for x in rows],
                report=report(rows, where),
            )
    print(report(rows, where))
    return 0


def _optimizer_name(text: str) -> str:
    """A type of argument: a key of `OPTIMIZERS`, or transformations joined by "+"."""
    if text not in OPTIMIZERS and not set(text.split("+")) <= set(TRANSFORMATIONS):
        raise argparse.ArgumentTypeError(
            f"must be among {', '.join(OPTIMIZERS)}, got {text!r}"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
