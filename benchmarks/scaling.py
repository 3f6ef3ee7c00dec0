"""The cost of a summary as a function of its sizes: `python -m benchmarks.scaling`.

A multilayer perceptron with d layers has S = 2 d tensors, weights and biases. One
quantity is varied at a time: the number of subsets S for a fixed number of parameters
P, then P, then the batch size. Times are medians of several calls after compilation;
memory is the temporary memory and the results, as reported by the compiler. Both are
divided by those of one gradient of the same loss on the same batch.

    python -m benchmarks.scaling            S, P and the batch: several minutes
    python -m benchmarks.scaling --quick    a few small cases
    python -m benchmarks.scaling --engine jvp_of_grad
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import partnewton as pn

MAX_BYTES = 6e9  # cases that need more memory are not run
MAX_TOTAL_SECONDS = 6.0  # calls of a function are not repeated after this time


class Case(NamedTuple):
    """The sizes: S subsets, about P parameters, a batch size."""

    subsets: int
    parameters: float
    batch: int


class CaseCost(NamedTuple):
    """The measurements of a case; times in seconds, memory in bytes."""

    subsets: int
    parameters: int
    batch: int
    gradient: float
    second: float | None
    third: float | None
    gradient_bytes: int
    second_bytes: int | None
    third_bytes: int | None


SUBSETS = [Case(S, 1e6, 64) for S in (2, 4, 10, 20, 50, 100, 200)]
PARAMETERS = [Case(20, P, 64) for P in (1e4, 1e5, 1e6, 1e7, 1e8)]
BATCHES = [Case(20, 1e6, batch) for batch in (16, 64, 256, 1024, 4096)]
QUICK = [Case(2, 1e4, 16), Case(10, 1e4, 16), Case(10, 1e4, 64)]


def network(case: Case) -> tuple[Any, Callable[..., jax.Array], jax.Array]:
    """Parameters, loss and a batch of inputs for a case."""
    depth = case.subsets // 2
    width = max(1, round((case.parameters / depth + 0.25) ** 0.5 - 0.5))
    keys = jax.random.split(jax.random.key(0), depth + 1)
    params = [
        {
            "kernel": jax.random.normal(key, (width, width)) / jnp.sqrt(width),
            "bias": jnp.zeros(width),
        }
        for key in keys[1:]
    ]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        target = x
        for layer in params:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((x - target) ** 2)

    return params, loss, jax.random.normal(keys[0], (case.batch, width))


def measure(case: Case, engine: str, repeats: int) -> CaseCost:
    """Times and memory of a gradient and of summaries of order 2 and 3."""
    params, loss, x = network(case)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    grads, gradient, gradient_bytes = _timed(jax.grad(loss), repeats, params, x)
    row = CaseCost(
        case.subsets,
        count,
        case.batch,
        gradient,
        None,
        None,
        gradient_bytes,
        None,
        None,
    )
    for field, third_order in (("second", False), ("third", True)):

        def summarize(
            params: Any, direction: Any, x: jax.Array, third_order: bool = third_order
        ) -> pn.Summary:
            return pn.summarize(
                lambda p: loss(p, x),
                params,
                direction,
                third_order=third_order,
                engine=engine,
            )

        found = _timed(summarize, repeats, params, grads, x)
        if found is not None:
            row = row._replace(**{field: found[1], f"{field}_bytes": found[2]})
    return row


def _timed(function: Callable[..., Any], repeats: int, *arguments: Any) -> Any:
    """The result, the median time and the memory; None above `MAX_BYTES`."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    if needed > MAX_BYTES:
        return None
    result, seconds = jax.block_until_ready(compiled(*arguments)), []
    while len(seconds) < repeats and sum(seconds) < MAX_TOTAL_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds), needed


def table(rows: Sequence[CaseCost]) -> str:
    """A table in Markdown: time of the gradient, and ratios to the gradient."""
    lines = [
        "| S | P | batch | gradient | order 2 | order 3 | memory, order 2 | order 3 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            str(row.subsets),
            f"{row.parameters:.2g}".replace("e+0", "e"),
            str(row.batch),
            f"{1e3 * row.gradient:.3g} ms",
            _ratio(row.second, row.gradient),
            _ratio(row.third, row.gradient),
            _ratio(row.second_bytes, row.gradient_bytes),
            _ratio(row.third_bytes, row.gradient_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(x: float | None, unit: float) -> str:
    return "too large" if x is None else f"{x / unit:.1f}"


def main() -> None:
    """Measure, print the tables and, with ``--json``, write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("S", "P", "batch"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} "
        f"cores, {platform.machine()}, engine {options.engine}, float32"
    )
    series = {"S": SUBSETS, "P": PARAMETERS, "batch": BATCHES}
    if options.quick:
        series = {"a few": QUICK}
    elif options.only:
        series = {options.only: series[options.only]}
    found = {}
    for name, cases in series.items():
        rows = [measure(case, options.engine, options.repeats) for case in cases]
        found[name] = [row._asdict() for row in rows]
        print(f"\n{name}\n\n{table(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
