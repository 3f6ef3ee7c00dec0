"""Optimizers on full-batch problems, at equal seconds and at equal gradients.

    python -m benchmarks.full_batch
    python -m benchmarks.full_batch --quick
    python -m benchmarks.full_batch --problems burgers siren --optimizers lbfgs_10

Each run is stored in a file of its own, and runs that are there are not repeated.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import partnewton as pn
from benchmarks import reporting
from benchmarks.full_batch import report
from benchmarks.full_batch.optimizers import MORE, OPTIMIZERS, SCIPY
from benchmarks.full_batch.problems import PROBLEMS
from benchmarks.full_batch.run import run

__all__ = ["main"]

DTYPES = ("float32", "float64")
QUICK = ("rosenbrock", "heisenberg_mlp", "poisson_2d")
ALL = (*OPTIMIZERS, SCIPY)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and writes the report and the pictures."""
    parser = _parser()
    options, _ = reporting.started(parser, "benchmarks.full_batch", argv)
    if options.clock == "cpu":
        reporting.use_one_thread()
    seconds = min(options.seconds, 2.0) if options.quick else options.seconds
    # Runs of other lengths are no substitute.
    folder = options.output / f"runs_{seconds:g}s_{options.clock}"
    folder.mkdir(exist_ok=True)
    seeds = range(1 if options.quick else options.seeds)
    problems = options.problems or (QUICK if options.quick else tuple(PROBLEMS))
    optimizers = options.optimizers or _default()
    for dtype in options.dtype:
        jobs = [
            (problem, optimizer, dtype, seed, seconds, options.clock)
            for problem in problems
            for optimizer in optimizers
            for seed in seeds
            if not _path(folder, problem, optimizer, dtype, seed).exists()
        ]
        _run_all(jobs, folder)
    records = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    records = [
        r
        for r in records
        if r["problem"] in problems
        and r["optimizer"] in optimizers
        and r["dtype"] in options.dtype
        and r["seed"] in seeds
    ]
    text = report.markdown(records)
    where = reporting.facts(reporting.machine())
    (options.output / "full_batch.md").write_text(f"{where}\n\n{text}", "utf-8")
    for problem in problems:
        report.picture(problem, records, options.output / f"{problem}.png")
    print(text)
    return 0


def _default() -> tuple[str, ...]:
    """All but variants, and but what this version of partnewton does not have."""
    missing = () if hasattr(pn, "subspace_newton") else ("subspace_newton",)
    return tuple(x for x in ALL if x not in (*MORE, *missing))


def _run_all(jobs: list[tuple], folder: Path) -> None:
    """Runs jobs of one dtype in one process; a crash of it is stored as a failure."""
    process = None
    for job in tqdm(jobs, unit="run"):
        process = process or reporting.executor()
        try:
            record = process.submit(_in_the_process, *job).result()
        except BrokenExecutor as error:
            process, record = None, _failure(job, error)
        except Exception as error:  # of this optimizer on this problem
            record = _failure(job, error)
        if record is not None:
            path = _path(folder, *job[:4])
            path.write_text(json.dumps(record, allow_nan=False), "utf-8")
    if process is not None:
        process.shutdown()


def _in_the_process(problem: str, optimizer: str, dtype: str, *rest: Any) -> Any:
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        return run(problem, optimizer, dtype, *rest)
    finally:
        jax.clear_caches()


def _failure(job: tuple, error: BaseException) -> dict[str, Any]:
    keys = ("problem", "optimizer", "dtype", "seed")
    lines = str(error).splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return dict(zip(keys, job, strict=False)) | {"failure": message[:300]}


def _path(folder: Path, problem: str, optimizer: str, dtype: str, seed: int) -> Path:
    return folder / f"{problem}.{optimizer}.{dtype}.{seed}.json"


def _parser() -> argparse.ArgumentParser:
    parser = reporting.Parser(prog="python -m benchmarks.full_batch")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", choices=ALL, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seeds", type=reporting.integer, default=3)
    parser.add_argument(
        "--seconds", type=reporting.positive, default=10.0, help="of each run"
    )
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="cpu",
        help="CPU seconds of one thread, or (on an accelerator) seconds of the wall",
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 problems, 1 seed, 2 seconds at most"
    )
    parser.add_argument(
        "--output", "--out", type=Path, default=Path("full_batch_results")
    )
    return parser
