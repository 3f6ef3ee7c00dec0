"""Training of small networks, compared with optimizers tuned over grids of rates.

    python -m benchmarks.training --output training_results
    python -m benchmarks.training --quick
    python -m benchmarks.training --unseen
    python -m benchmarks.training --variants

Results are stored in the output folder, and a run that was interrupted is continued.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import problems, training_report
from benchmarks.training_loop import timed_run, train
from benchmarks.training_optimizers import GRADIENT, OPTIMIZERS, SWEEPS, VARIANTS

QUICK = ("digits_tanh", "relu_squared", "breast_cancer", "full_batch")
TIMED = ("gradient", "adam_c", "muon_c", "partition_newton")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "training.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    names = options.problems or _names(options)
    seeds = 1 if options.quick else options.seeds
    optimizers = options.optimizers or (
        ["partition_newton", *VARIANTS]
        if options.variants
        else [x for x in OPTIMIZERS if x not in SWEEPS | VARIANTS]
    )
    jobs = [(p, o) for p in names for o in optimizers]
    for name, optimizer in tqdm(jobs, unit="run"):
        row = results.setdefault(name, {})
        if optimizer not in row:
            found = _entry(name, optimizer, seeds)
            if found is not None:
                row[optimizer] = found
                path.write_text(json.dumps(results))
    if options.time:
        for name in names:
            results[name]["seconds"] = _timings(name)
            path.write_text(json.dumps(results))
    text = training_report.markdown({k: results[k] for k in names})
    (options.output / "training.md").write_text(text)
    for name in names:
        training_report.picture(name, results[name]).savefig(
            options.output / f"{name}.png", dpi=110
        )
    print(text)


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.quick:
        return QUICK
    if options.unseen:
        return tuple(problems.UNSEEN)
    return (*problems.FIRST, *problems.SECOND)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--quick", action="store_true", help="4 problems, 1 seed")
    parser.add_argument("--time", action="store_true", help="measure time per step too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("training_results"))
    parser.add_argument(
        "--unseen", action="store_true", help="problems on which no default was tuned"
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="partition_newton with one default changed",
    )
    known = [*problems.FIRST, *problems.SECOND, *problems.UNSEEN]
    parser.add_argument("--problems", nargs="+", choices=known, metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, metavar="NAME")
    return parser


def _entry(name: str, optimizer: str, seeds: int) -> dict[str, Any] | None:
    problem, chosen = problems.make(name), OPTIMIZERS[optimizer]
    if chosen.full_batch_only and not problem.is_full_batch:
        return None
    begin = time.perf_counter()
    curves = train(problem, chosen.make, chosen.rates, seeds)
    return {
        "rates": chosen.rates.tolist(),
        "train": curves.train_loss.tolist(),
        "test": curves.test_loss.tolist(),
        "metric": curves.test_metric.tolist(),
        "wall_seconds": time.perf_counter() - begin,
        "jax": jax.__version__,
    }


def _timings(name: str) -> dict[str, float]:
    problem = problems.make(name)
    chosen = OPTIMIZERS | {"gradient": GRADIENT}
    runs = {
        x: timed_run(problem, *chosen[x][:2], steps=200, clock=time.perf_counter)
        for x in TIMED
    }
    return {x: min(run() for _ in range(3)) for x, run in runs.items()}


if __name__ == "__main__":
    main()
