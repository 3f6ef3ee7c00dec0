"""Helpers of the benchmarks: arguments, processes, the machine, tables and files."""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

import partnewton as pn

__all__ = [
    "Parser",
    "add_common_options",
    "executor",
    "facts",
    "in_a_process",
    "integer",
    "machine",
    "markdown",
    "number",
    "positive",
    "started",
    "temp_bytes",
    "use_one_thread",
    "write",
]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_common_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options that the benchmarks have in common.

    Args:
      parser: the parser.
      name: the name of the files that are written, without extensions.
    """
    parser.add_argument(
        "--scale",
        type=integer,
        default=1,
        metavar="N",
        help="divide the widths of the networks by this number, for a quick test "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=positive,
        default=100.0,
        metavar="X",
        help="stop repeating calls after this total time, and skip what is estimated "
        "to take longer (default: %(default)g)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="FOLDER",
        help=f"folder for {name}.json and {name}.md (default: benchmarks/results)",
    )


def started(
    parser: argparse.ArgumentParser, module: str, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, str]:
    """The options, after the output folder is created, and the command line."""
    options = parser.parse_args(argv)
    try:  # before anything is measured
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}.")
    given = sys.argv[1:] if argv is None else argv
    return options, shlex.join(["python", "-m", module, *given])


ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
# glibc then keeps the memory of a step, instead of requesting it from the kernel at
# each call as it does above 32 MiB.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}


def use_one_thread() -> None:
    """New processes compute in one thread, unless the environment says otherwise.

    CPU seconds are then the seconds of an idle machine. Memory is kept by the process.
    """
    for name, value in (ONE_THREAD | KEPT_MEMORY).items():
        os.environ.setdefault(name, value)


def executor() -> concurrent.futures.Executor:
    """A new process, which runs submitted calls one after the other."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context)


def in_a_process(function: Callable, *args: Any) -> Any:
    """Call a function in a new process, which can use all memory of the device."""
    with executor() as process:
        return process.submit(function, *args).result()


def temp_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The memory that an executable needs beside arguments and results, if known."""
    memory = compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def machine() -> dict[str, Any]:
    """The machine and the versions, for a report."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": _cores(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "partnewton": pn.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count()


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)
    facts = dict(found)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    name, numbers = facts.pop("model name"), ", ".join(map(" ".join, facts.items()))
    return f"{name} ({numbers})" if numbers else name


def number(value: float | None, factor: float, digits: int) -> str:
    """The text of a cell: `value` times `factor`, or "-" for None."""
    return "-" if value is None else f"{value * factor:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def facts(where: Mapping[str, Any]) -> str:
    """The first line of a report, from :func:`machine`."""
    told = ", ".join(f"{key} {value}" for key, value in where.items() if value)
    return f"Measured: {told}."


def write(
    folder: Path,
    name: str,
    *,
    where: Mapping[str, Any],
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    report: str,
) -> None:
    """Write ``name.json``, with one line per row, and ``name.md`` to a folder."""
    content = {
        "machine": where,
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    text = json.dumps(content, allow_nan=False, indent=1).removesuffix("\n}")
    text = f'{text},\n "rows": [\n  {lines}\n ]\n}}\n'
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(report, encoding="utf-8")


def integer(text: str) -> int:
    """The type of a positive integer argument."""
    if not re.fullmatch(r"\+?0*[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be an integer from 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """The type of a positive argument."""
    if not re.fullmatch(r"\d{1,9}(\.\d*)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return float(text)
