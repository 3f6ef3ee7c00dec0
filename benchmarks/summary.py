"""What a summary costs: ``python -m benchmarks.summary``.

Everything is measured in one run and told in gradients: the median time of a compiled
summary over that of one compiled gradient of the same loss on the same batch. One
subset is one tensor, and the direction is the gradient, handed over as an argument.
Parameters and data are arguments too: XLA would fold constants. Several networks have a
process each, as in training: what an earlier one has left to `malloc` would change by a
factor of two how long memory takes to come.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import partnewton as pn
from benchmarks import models
from benchmarks.reporting import (
    facts,
    in_a_process,
    integer,
    machine,
    markdown,
    number,
    positive,
    started,
    write,
)
from partnewton.__main__ import Parser
from partnewton.engines import ENGINES

__all__ = ["Row", "main", "measure", "table"]

PyTree = Any
GIB = 2**30
RIVAL = "hessian_of_phi"
FORWARD, GRADIENT = "forward", "gradient"
HESSIAN, THIRD, TENSOR = "hessian", "third", "tensor"
QUANTITIES = {
    FORWARD: "the loss",
    GRADIENT: "its gradient",
    HESSIAN: "summarize(third_order=False)",
    THIRD: "summarize(third_order=True)",
    TENSOR: "derivative_tensors(order=3)",
}

# About how many gradients a call takes at least, given S; what is not here is unknown.
GUESSES: dict[tuple[str, str], Callable[[int], float]] = {
    ("jvp_of_grad", HESSIAN): lambda S: 2 * S,
    ("jvp_of_grad", THIRD): lambda S: (2 + 4) * S,
    ("jvp_of_grad", TENSOR): lambda S: 2 * S + 4 * S * (S + 1) / 2,
    (RIVAL, HESSIAN): lambda S: 2 * S,
    (RIVAL, THIRD): lambda S: (2 + 2) * S,
    (RIVAL, TENSOR): lambda S: 2 * S + 4 * S**2,
}
# On a CPU the passes of the reference over a network with convolutions take far longer:
# 11 to 14 times that was measured, in a loop and batched.
SLOW_CONVOLUTIONS = 10
QUICK = 0.2  # seconds; a shorter call is timed after one that warms the caches again


@dataclasses.dataclass
class Row:
    """One function of one network, measured.

    Attributes:
      model: a key of `models.NETWORKS`.
      batch: the batch size.
      subsets: S.
      engine: a key of `partnewton.engines.ENGINES` or "hessian_of_phi"; "" for the
        loss and its gradient.
      quantity: a key of `QUANTITIES`.
      trace_seconds: tracing and lowering.
      compile_seconds: tracing, lowering and compiling.
      temp_bytes: the memory that the executable needs beside arguments and results.
      flops: as XLA counts them: the body of a loop once.
      seconds: the times of the calls; the first call is not among them.
      gradients: the median of `seconds` over that of the gradient.
      floor: S/2 losses and one gradient, in gradients.
      difference: the largest distance from the first engine's result, over the largest
        entry of that; the worst of value, gradient, hessian and third.
      skipped: why it was not measured, or None.
    """

    model: str
    batch: int
    subsets: int
    engine: str
    quantity: str
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    gradients: float | None = None
    floor: float | None = None
    difference: float | None = None
    skipped: str | None = None

    @property
    def median(self) -> float | None:
        """The median of `seconds`."""
        return statistics.median(self.seconds) if self.seconds else None


# --- What is measured ------------------------------------------------------------


def _function(
    loss: Callable[[PyTree, PyTree], jax.Array],
    engine: str,
    quantity: str,
    batch_size: int | None,
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """A function of params, direction and batch."""

    def run(params: PyTree, direction: PyTree, batch: PyTree) -> PyTree:
        value_fn = functools.partial(loss, batch=batch)
        if quantity == FORWARD:
            return value_fn(params)
        if quantity == GRADIENT:
            return jax.grad(value_fn)(params)
        if engine == RIVAL:
            return _hessian_of_phi(value_fn, params, direction, quantity)
        if quantity == TENSOR:
            return pn.derivative_tensors(
                value_fn, params, direction, engine=engine, batch_size=batch_size
            )
        return pn.summarize(
            value_fn,
            params,
            direction,
            third_order=quantity == THIRD,
            engine=engine,
            batch_size=batch_size,
        )

    return run


def _hessian_of_phi(
    value_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    direction: PyTree,
    quantity: str,
) -> PyTree:
    """The same by what jax offers: derivatives of L(params - sum_s eta_s u_s)."""
    leaves, treedef = jax.tree.flatten(params)
    parts = jax.tree.leaves(direction)

    def phi(eta: jax.Array) -> jax.Array:
        pairs = zip(leaves, parts, strict=True)
        moved = [x - eta[s] * u for s, (x, u) in enumerate(pairs)]
        return value_fn(jax.tree.unflatten(treedef, moved))

    def third(axis: jax.Array) -> jax.Array:
        line = phi
        for _ in range(3):
            line = functools.partial(_along, line, axis)
        return line(eta)

    eta = jnp.zeros(len(leaves))
    value, slope = jax.value_and_grad(phi)(eta)
    hessian = jax.hessian(phi)(eta)
    if quantity == TENSOR:
        return -slope, hessian, -jax.jacfwd(jax.hessian(phi))(eta)
    thirds = -jax.vmap(third)(jnp.eye(len(leaves))) if quantity == THIRD else None
    return pn.Summary(value, -slope, hessian, thirds)


def _along(f: Callable, v: jax.Array, x: jax.Array) -> jax.Array:
    return jax.jvp(f, (x,), (v,))[1]


# --- Measuring -------------------------------------------------------------------


def measure(
    model: models.Model,
    engines: Sequence[str],
    *,
    tensor: bool = False,
    batch_size: int | None = None,
    repeats: int = 5,
    max_gib: float = 12.0,
    max_seconds: float = 100.0,
    log: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Compiles and times everything that is asked for, in turns.

    Args:
      model: the network.
      engines: names of engines, or "hessian_of_phi".
      tensor: whether to measure the whole third order as well.
      batch_size: for the engines: how many subsets are processed at once.
      repeats: how many calls a median is of.
      max_gib: what needs more memory than this is compiled and not run.
      max_seconds: what is guessed to take longer than this for one call is not tried,
        and calls of one function stop after so many seconds in all.
      log: what takes a line about each step.

    Returns:
      The rows: the loss, its gradient, then what each engine computes.

    Raises:
      ValueError: an engine does not take the loss.
    """
    subsets = len(jax.tree.leaves(model.params))
    size = len(jax.tree.leaves(model.batch)[0])
    convolves = any(leaf.ndim == 4 for leaf in jax.tree.leaves(model.params))
    slow = convolves and jax.default_backend() == "cpu"
    quantities = [HESSIAN, THIRD, *([TENSOR] if tensor else [])]
    cases = [("", FORWARD), ("", GRADIENT)]
    cases += [(engine, quantity) for engine in engines for quantity in quantities]
    direction = jax.jit(jax.grad(model.loss))(model.params, model.batch)
    arguments = jax.block_until_ready((model.params, direction, model.batch))

    rows, calls, firsts, results = [], {}, {}, {}
    gradient_seconds = 0.0
    for engine, quantity in cases:
        row = Row(model.name, size, subsets, engine, quantity)
        rows.append(row)
        guess = gradient_seconds * GUESSES.get((engine, quantity), lambda S: 0)(subsets)
        if slow and engine != RIVAL:
            guess *= SLOW_CONVOLUTIONS
        if guess > max_seconds:
            row.skipped = f"a guess of {guess:.0f} s a call or more (--max-seconds)"
            log(f"{_title(row)}: skipped, {row.skipped}")
            continue
        function = _function(model.loss, engine, quantity, batch_size)
        call = _compile(row, function, arguments)
        if engine and (row.temp_bytes or 0) > max_gib * GIB:
            row.skipped = f"needs {row.temp_bytes / GIB:.3g} GiB (--max-gib)"
            log(f"{_title(row)}: not run, {row.skipped}")
            continue
        first_call, result = _timed(call, arguments)
        if quantity == GRADIENT:
            gradient_seconds = min(_timed(call, arguments)[0] for _ in range(2))
        if engine:
            row.difference = _difference(result, results.setdefault(quantity, result))
        calls[len(rows) - 1], firsts[len(rows) - 1] = call, first_call
        log(
            f"{_title(row)}: compiled in {row.compile_seconds:.1f} s, first call "
            f"{first_call:.3f} s"
        )

    for _ in range(repeats):  # in turns: what disturbs the machine disturbs all
        for i, call in calls.items():
            if sum(rows[i].seconds) < max_seconds:
                if firsts[i] < QUICK:
                    _timed(call, arguments)
                rows[i].seconds.append(_timed(call, arguments)[0])
    _in_gradients(rows)
    return rows


def _compile(row: Row, function: Callable, arguments: tuple) -> Callable:
    """The executable; what it took and what it needs go into the row."""
    jax.clear_caches()  # so that none profits from what another has traced
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    row.trace_seconds = time.perf_counter() - start
    compiled = lowered.compile()
    row.compile_seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    row.temp_bytes = None if memory is None else memory.temp_size_in_bytes
    row.flops = None if cost is None else cost.get("flops")
    return compiled


def _timed(call: Callable, arguments: tuple) -> tuple[float, PyTree]:
    start = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start, result


def _difference(result: PyTree, first: PyTree) -> float:
    def relative(x: jax.Array, y: jax.Array) -> jax.Array:
        distance, largest = jnp.max(jnp.abs(x - y)), jnp.max(jnp.abs(y))
        return distance / jnp.where(largest > 0, largest, 1)

    differences = jax.tree.leaves(jax.tree.map(relative, result, first))
    return float(jnp.max(jnp.stack(differences)))  # NaN if one is


def _in_gradients(rows: list[Row]) -> None:
    medians = {row.quantity: row.median for row in rows if not row.engine}
    for row in rows:
        if row.seconds:
            row.gradients = row.median / medians[GRADIENT]
        if row.engine:
            row.floor = 1 + row.subsets / 2 * medians[FORWARD] / medians[GRADIENT]


def _title(row: Row) -> str:
    return " ".join(filter(None, (row.model, row.engine, row.quantity)))


# --- What is told of it ----------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as tables in Markdown, one for the gradients and one for the engines.

    Args:
      rows: from :func:`measure`, of any number of networks.

    Returns:
      Lines without an end of line after the last.

    Example:
      >>> row = Row("mlp", 100, 8, "", "gradient", 0.1, 0.3, 2**20, 2e9, [0.01, 0.02])
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


def _cells(row: Row, gradient: Row) -> tuple[str, ...]:
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
Times are medians of interleaved calls over that of one compiled gradient. The floor is
S/2 losses and one gradient, from the measured loss. XLA counts the flops of a loop's
body once, so they do not compare an engine that loops over subsets. The difference is
the largest distance from the first engine's result over the largest entry of that, in
float32; 0 for the first engine itself.
"""


def report(rows: Sequence[Row], where: dict[str, Any]) -> str:
    """The whole of it in Markdown: the machine, the tables, and what they mean."""
    return f"{facts(where)}\n\n{table(rows)}\n\n{NOTES}"


# --- The command line ------------------------------------------------------------


def parser() -> Parser:
    """The parser of the command line."""
    result = Parser(
        prog="benchmarks.summary",
        usage="python -m benchmarks.summary [options]",
        description="Times summaries, each as a multiple of one compiled gradient of "
        "the same loss on the same batch, with one subset a tensor. Prints a table and "
        "writes summary.json and summary.md.",
        allow_abbrev=False,
    )
    add = result.add_argument
    engines = (*ENGINES, RIVAL)
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
        help=f"among {', '.join(ENGINES)} and {RIVAL}, which is the batched "
        "jax.hessian of phi and its third order by nested jvp (default: all; with no "
        "name after it: none, the gradient alone)",
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
        help="how many subsets an engine processes at once (default: the engine's own)",
    )
    add(
        "--tensor",
        action="store_true",
        help="measure derivative_tensors(order=3) as well",
    )
    add(
        "--repeats",
        type=integer,
        default=5,
        metavar="N",
        help="calls that a median is of, after a first one (default: %(default)s)",
    )
    add(
        "--scale",
        type=integer,
        default=1,
        metavar="N",
        help="divide the widths of the networks by this, for a quick look",
    )
    add(
        "--max-gib",
        type=positive,
        default=12.0,
        metavar="X",
        help="compile, but do not run, what needs more memory (default: %(default)g)",
    )
    add(
        "--max-seconds",
        type=positive,
        default=100.0,
        metavar="X",
        help="do not try what is guessed to take longer a call, and stop repeating "
        "after so long in all (default: %(default)g)",
    )
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="FOLDER",
        help="where summary.json and summary.md are written (default: "
        "benchmarks/results)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
      argv: the arguments of the command line, without the name of the program.

    Returns:
      The exit code, 0.

    Raises:
      SystemExit: with code 2 after one line on standard error where something is wrong
        with the arguments; with 0 after ``--help``.
    """
    options, command = started(parser(), "benchmarks.summary", argv)
    names = list(dict.fromkeys(options.model))
    call = _here if len(names) == 1 else in_a_process
    where, rows = {"command": f"`{command}`", **call(machine)}, []
    for name in names:
        rows += call(_measured, name, options)
        _write(options, rows, where)  # after each network: an interrupt loses one
    print(report(rows, where))
    return 0


def _here(function: Callable, *args: Any) -> Any:
    return function(*args)


def _measured(name: str, options: argparse.Namespace) -> list[Row]:
    return measure(
        models.make(name, options.batch, scale=options.scale),
        tuple(dict.fromkeys(options.engine)),
        tensor=options.tensor,
        batch_size=options.batch_size,
        repeats=options.repeats,
        max_gib=options.max_gib,
        max_seconds=options.max_seconds,
        log=functools.partial(print, file=sys.stderr, flush=True),
    )


def _write(
    options: argparse.Namespace, rows: Sequence[Row], where: dict[str, Any]
) -> None:
    write(
        options.output,
        "summary",
        where=where,
        options=options,
        rows=[_as_json(row) for row in rows],
        report=report(rows, where),
    )


def _as_json(row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row) | {"median": row.median}
    if row.difference is not None and not math.isfinite(row.difference):
        fields["difference"] = str(row.difference)  # JSON knows no NaN
    return fields


if __name__ == "__main__":
    sys.exit(main())
