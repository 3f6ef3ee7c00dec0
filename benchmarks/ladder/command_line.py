"""Training on real data, from small networks to millions of parameters.

    python -m benchmarks.ladder --quick
    python -m benchmarks.ladder
    python -m benchmarks.ladder --rungs mlp_digits gpt_bytes --rates 3 --seeds 1
    python -m benchmarks.ladder --rungs mlp_digits --optimizers lookback_rate=0.1

Each run is stored in a file of its own, and runs that are there are not repeated.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import reporting
from benchmarks.ladder import images, plan, report, rungs, text
from benchmarks.ladder.optimizers import DEFAULT, ENTRIES, OURS
from benchmarks.ladder.run import CLOCKS, Job, run

__all__ = ["main"]

QUICK = (*OURS, "adamw_cosine", "muon_cosine")
QUICK_DIVISOR = 20
LEAST_STEPS = 20
SEEDS, CARRIED = 3, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and writes the tables and the pictures."""
    parser = _parser()
    options, _ = reporting.started(parser, "benchmarks.ladder", argv)
    if options.clock == "cpu":
        reporting.use_one_thread()
    # The processes share an accelerator.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _shorten(options)
    text.use_cache(options.output.resolve())
    names = _names(options, parser)
    folder = options.output / _folder_name(options)
    folder.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for name in names:
        if not options.report:
            _complete(name, folder, options, end)
        _write(names, folder, options)
    print((options.output / "ladder.md").read_text("utf-8"))
    return 0


def _shorten(options: argparse.Namespace) -> None:
    """What --quick means for options that are not given."""
    options.seeds = options.seeds or (1 if options.quick else SEEDS)
    if options.quick:
        options.rates = options.rates or 2
        options.carried = options.carried or 1
    options.carried = 0 if options.steps_only else options.carried or CARRIED
    options.divide = options.divide or (QUICK_DIVISOR if options.quick else 1)


def _names(options: argparse.Namespace, parser: reporting.Parser) -> list[str]:
    """The rungs, without those whose files are missing unless they are named."""
    names = options.rungs or (
        rungs.QUICK if options.quick else [x for x in rungs.RUNGS if x not in rungs.GPU]
    )
    if not any(map(rungs.needs_fashion, names)) or options.report:
        return list(names)
    try:
        place = images.find(options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(f"--data-dir: {error}")
    if place is not None:
        images.use(place)
        return list(names)
    told = (
        "the files of Fashion-MNIST (train-images-idx3-ubyte.gz, ...) are in none of "
        f"{', '.join(images.FOLDERS)}: name their folder by --data-dir, or install "
        "Debian's package dataset-fashion-mnist"
    )
    if options.rungs:
        parser.error(told)
    print(f"Rungs on images are left out, since {told}.")
    return [x for x in names if not rungs.needs_fashion(x)]


def _complete(name: str, folder: Path, options: argparse.Namespace, end: float) -> None:
    """Makes all runs of a rung in one process, whose crash is stored as a failure."""
    process = reporting.executor()
    steps = process.submit(_steps, name, options.scale).result()
    settings = _settings(max(LEAST_STEPS, steps // options.divide), options)
    common = {"clock": options.clock, "scale": options.scale}
    with tqdm(desc=name, unit="run") as bar:
        while jobs := plan.missing(_records(name, folder), settings):
            bar.total = bar.n + len(jobs)
            for job in jobs:
                if time.monotonic() > end:
                    process.shutdown()
                    return
                bar.set_postfix_str(f"{job.entry} {job.rate:g}")
                try:
                    record = process.submit(run, name, job, **common).result()
                except BrokenExecutor as error:
                    process, record = reporting.executor(), _failure(error)
                except Exception as error:  # of this optimizer on this rung
                    record = _failure(error)
                record = {"rung": name, **job._asdict(), **record}
                record["base_steps"] = settings.steps
                _store(record, folder, name, job)
                bar.update()
    process.shutdown()


def _steps(rung: str, scale: int) -> int:
    return rungs.make(rung, scale).steps


def _settings(steps: int, options: argparse.Namespace) -> plan.Settings:
    chosen = options.optimizers or (QUICK if options.quick else DEFAULT)
    entries = list(dict.fromkeys((plan.REFERENCE, *chosen)))
    return plan.Settings(steps, entries, options.seeds, options.rates, options.carried)


def _failure(error: BaseException) -> dict[str, Any]:
    lines = str(error).splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return {"failure": message[:300]}


def _store(record: dict[str, Any], folder: Path, name: str, job: Job) -> None:
    """All of the file or nothing, also if the process is killed."""
    path = folder / f"{name}.{job.entry}.{job.rate:g}.{job.seed}.{job.steps}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, allow_nan=False), "utf-8")
    unfinished.replace(path)


def _records(name: str, folder: Path) -> dict[Job, dict[str, Any]]:
    """The stored runs of a rung, the newest one last."""
    found = {}
    paths = folder.glob(f"{name}.*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        record = json.loads(path.read_text("utf-8"))
        found[Job(*(record[field] for field in Job._fields))] = record
    return found


def _write(names: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    """``ladder.md``, ``ladder.json`` and a picture per rung, of all stored runs."""
    tables = {}
    for name in names:
        records = _records(name, folder)
        if records:
            # The number of steps of the rung may have been another one before.
            steps = list(records.values())[-1]["base_steps"]
            found = {job.entry for job in records}
            settings = _settings(steps, options)
            settings = settings._replace(entries=[x for x in ENTRIES if x in found])
            tables[name] = records, settings
            report.picture(name, *tables[name], options.output / f"{name}.png")
    where = reporting.machine()
    parts = [reporting.facts(where), report.summary(tables)]
    parts += [report.details(name, *pair) for name, pair in tables.items()]
    reporting.write(
        options.output,
        "ladder",
        where=where,
        options=options,
        rows=[r for records, _ in tables.values() for r in records.values()],
        report="\n\n".join(parts) + "\n",
    )


def _folder_name(options: argparse.Namespace) -> str:
    """Runs of other lengths or widths are no substitute."""
    scale = f"_scale{options.scale}" if options.scale > 1 else ""
    divide = f"_divided{options.divide}" if options.divide > 1 else ""
    return f"runs_{options.clock}{scale}{divide}"


def _parser() -> reporting.Parser:
    parser = reporting.Parser(prog="python -m benchmarks.ladder")
    parser.add_argument(
        "--rungs",
        nargs="+",
        choices=rungs.RUNGS,
        metavar="NAME",
        help=f"of {', '.join(rungs.RUNGS)}; by default all but {', '.join(rungs.GPU)}",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=ENTRIES,
        metavar="NAME",
        help=f"of {', '.join(ENTRIES)}; partition_newton is always run",
    )
    parser.add_argument("--data-dir", type=Path, help="the files of Fashion-MNIST")
    parser.add_argument(
        "--seeds",
        type=reporting.integer,
        help=f"at most (default: {SEEDS}, or 1 with --quick)",
    )
    parser.add_argument(
        "--rates", type=reporting.integer, help="at most, of each grid; by default all"
    )
    parser.add_argument(
        "--carried",
        type=reporting.integer,
        help="rates that are tried at equal seconds, the best ones at equal steps "
        f"(default: {CARRIED}, or 1 with --quick)",
    )
    parser.add_argument(
        "--steps-only", action="store_true", help="no runs at equal seconds"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="cpu",
        help="CPU seconds of one thread, or (on an accelerator) seconds of the wall",
    )
    parser.add_argument(
        "--scale", type=reporting.integer, default=1, help="divides the widths"
    )
    parser.add_argument(
        "--divide",
        type=reporting.integer,
        help="divides the numbers of steps, for a trial (default: 1)",
    )
    parser.add_argument(
        "--minutes",
        type=reporting.positive,
        default=1e6,
        help="after which no run is started any more",
    )
    parser.add_argument("--quick", action="store_true", help="a trial in five minutes")
    parser.add_argument("--report", action="store_true", help="of stored runs only")
    parser.add_argument("--output", type=Path, default=Path("ladder_results"))
    return parser
