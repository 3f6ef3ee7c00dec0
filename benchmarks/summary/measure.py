"""Summaries compiled and timed.

Times are given in gradients: the median time of a compiled summary over that of one
compiled gradient of the same loss on the same batch. There is one subset per tensor,
and the direction is the gradient, passed as an argument. Parameters and data are also
arguments, since XLA would fold constants.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import partnewton as pn
from benchmarks import models
from benchmarks.reporting import temp_bytes
from partnewton import engines

__all__ = ["Measurement", "measure"]

PyTree = Any
GIB = 2**30
HESSIAN_OF_PHI = "hessian_of_phi"
FORWARD, GRADIENT = "forward", "gradient"
HESSIAN, THIRD, TENSOR = "hessian", "third", "tensor"
SEVERAL = "several"
QUANTITIES = {
    FORWARD: "the loss",
    GRADIENT: "its gradient",
    HESSIAN: "summarize(third_order=False)",
    THIRD: "summarize(third_order=True)",
    TENSOR: "derivative_tensors(order=3)",
    SEVERAL: "summarize(third_order=True) along K directions",
}

# A lower bound of the time of a call in gradients, as a function of S, if known.
GUESSES: dict[tuple[str, str], Callable[[int], float]] = {
    ("jvp_of_grad", HESSIAN): lambda S: 2 * S,
    ("jvp_of_grad", THIRD): lambda S: (2 + 4) * S,
    ("jvp_of_grad", SEVERAL): lambda S: 4 * (2 + 4) * S,
    ("jvp_of_grad", TENSOR): lambda S: 2 * S + 4 * S * (S + 1) / 2,
    (HESSIAN_OF_PHI, HESSIAN): lambda S: 2 * S,
    (HESSIAN_OF_PHI, THIRD): lambda S: (2 + 2) * S,
    (HESSIAN_OF_PHI, TENSOR): lambda S: 2 * S + 4 * S**2,
}
# On a CPU, Hessian-vector products of convolutions take 11 to 14 times as long.
SLOW_CONVOLUTIONS = 10
QUICK = 0.2  # seconds; a shorter call is timed after another one, with warm caches


@dataclasses.dataclass
class Measurement:
    """The measurements of one function of one network.

    Attributes:
      model: a key of `models.NETWORKS`.
      batch: the batch size.
      subsets: S.
      engine: a key of `partnewton.engines.ENGINES` or "hessian_of_phi"; "" for the
        loss and its gradient.
      quantity: a key of `QUANTITIES`.
      trace_seconds: tracing and lowering.
      compile_seconds: tracing, lowering and compiling.
      temp_bytes: the temporary memory of the executable.
      flops: as counted by XLA, which counts the body of a loop once.
      seconds: the times of the calls, without the first call.
      gradients: the median of `seconds` over that of the gradient.
      floor: S/2 losses and one gradient, in gradients.
      difference: the maximal error relative to the result of the first engine, in the
        maximum norm; the largest of those of value, gradient, hessian and third.
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


# --- The functions ---------------------------------------------------------------


def _function(
    loss: Callable[[PyTree, PyTree], jax.Array],
    engine: str,
    quantity: str,
    batch_size: int | None,
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The measured function, of params, direction and batch."""

    def run(params: PyTree, direction: PyTree, batch: PyTree) -> PyTree:
        value_fn = functools.partial(loss, batch=batch)
        if quantity == FORWARD:
            return value_fn(params)
        if quantity == GRADIENT:
            return jax.grad(value_fn)(params)
        if engine == HESSIAN_OF_PHI:
            return _hessian_of_phi(value_fn, params, direction, quantity)
        if quantity == TENSOR:
            return pn.derivative_tensors(
                value_fn, params, direction, engine=some_engine
            )
        return pn.summarize(
            value_fn,
            params,
            direction,
            third_order=quantity in (THIRD, SEVERAL),
            engine=some_engine,
        )

    if engine in engines.ENGINES:
        some_engine = dataclasses.replace(engines.get(engine), batch_size=batch_size)
    return run


def _hessian_of_phi(
    value_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    direction: PyTree,
    quantity: str,
) -> PyTree:
    """The summary by jax.hessian of phi(eta) = L(params - sum_s eta_s u_s)."""
    leaves, treedef = jax.tree.flatten(params)
    parts = jax.tree.leaves(direction)

    def phi(eta: jax.Array) -> jax.Array:
        pairs = zip(leaves, parts, strict=True)
        moved = [x - eta[s] * u for s, (x, u) in enumerate(pairs)]
        return value_fn(jax.tree.unflatten(treedef, moved))

    def third(axis: jax.Array) -> jax.Array:
        line = phi
        for _ in range(3):
            line = functools.partial(_derivative_along, line, axis)
        return line(eta)

    eta = jnp.zeros(len(leaves))
    value, slope = jax.value_and_grad(phi)(eta)
    hessian = jax.hessian(phi)(eta)
    if quantity == TENSOR:
        return -slope, hessian, -jax.jacfwd(jax.hessian(phi))(eta)
    thirds = -jax.vmap(third)(jnp.eye(len(leaves))) if quantity == THIRD else None
    return pn.Summary(value, -slope, hessian, thirds)


def _derivative_along(f: Callable, v: jax.Array, x: jax.Array) -> jax.Array:
    return jax.jvp(f, (x,), (v,))[1]


# --- Measuring -------------------------------------------------------------------


def measure(
    model: models.MeasuredLoss,
    engines: Sequence[str],
    *,
    tensor: bool = False,
    directions: int = 1,
    batch_size: int | None = None,
    repeats: int = 5,
    max_gib: float = 12.0,
    max_seconds: float = 100.0,
    log: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Compile and time the requested functions, with interleaved calls.

    Args:
      model: the network.
      engines: names of engines, or "hessian_of_phi".
      tensor: whether to measure the whole third-order tensor as well.
      directions: K; if greater than 1, summaries along the gradient and K - 1 random
        directions are measured as well, for engines.
      batch_size: the number of subsets that an engine processes together.
      repeats: the number of timed calls.
      max_gib: functions that need more memory are compiled, but not run.
      max_seconds: functions whose calls are estimated to take longer are skipped, and
        calls of a function are not repeated after this total time.
      log: called with a line about each step.

    Returns:
      The measurements of the loss, of its gradient, and of each engine.

    Raises:
      ValueError: an engine does not support the loss.
    """
    subsets = len(jax.tree.leaves(model.params))
    size = len(jax.tree.leaves(model.batch)[0])
    convolves = any(leaf.ndim == 4 for leaf in jax.tree.leaves(model.params))
    slow = convolves and jax.default_backend() == "cpu"
    quantities = [HESSIAN, THIRD, *([TENSOR] if tensor else [])]
    cases = [("", FORWARD), ("", GRADIENT)]
    cases += [(engine, quantity) for engine in engines for quantity in quantities]
    if directions > 1:
        cases += [(engine, SEVERAL) for engine in engines if engine != HESSIAN_OF_PHI]
    direction = jax.jit(jax.grad(model.loss))(model.params, model.batch)
    one = jax.block_until_ready((model.params, direction, model.batch))
    several = model.params, _and_random(direction, directions - 1), model.batch
    several = jax.block_until_ready(several)

    def arguments(quantity: str) -> tuple:
        return several if quantity == SEVERAL else one

    rows, calls, firsts, results = [], {}, {}, {}
    gradient_seconds = 0.0
    for engine, quantity in cases:
        row = Measurement(model.name, size, subsets, engine, quantity)
        rows.append(row)
        guess = gradient_seconds * GUESSES.get((engine, quantity), lambda S: 0)(subsets)
        if slow and engine != HESSIAN_OF_PHI:
            guess *= SLOW_CONVOLUTIONS
        if guess > max_seconds:
            row.skipped = f"at least {guess:.0f} s per call, estimated (--max-seconds)"
            log(f"{_title(row)}: skipped, {row.skipped}")
            continue
        function = _function(model.loss, engine, quantity, batch_size)
        call = _compile(row, function, arguments(quantity))
        if engine and (row.temp_bytes or 0) > max_gib * GIB:
            row.skipped = f"needs {row.temp_bytes / GIB:.3g} GiB (--max-gib)"
            log(f"{_title(row)}: not run, {row.skipped}")
            continue
        first_call, result = _timed(call, arguments(quantity))
        if quantity == GRADIENT:
            gradient_seconds = min(_timed(call, one)[0] for _ in range(2))
        if engine:
            row.difference = _difference(result, results.setdefault(quantity, result))
        calls[len(rows) - 1], firsts[len(rows) - 1] = call, first_call
        log(
            f"{_title(row)}: compiled in {row.compile_seconds:.1f} s, first call "
            f"{first_call:.3f} s"
        )

    for _ in range(repeats):  # interleaved, so that other load affects all functions
        for i, call in calls.items():
            if sum(rows[i].seconds) < max_seconds:
                some = arguments(rows[i].quantity)
                if firsts[i] < QUICK:
                    _timed(call, some)
                rows[i].seconds.append(_timed(call, some)[0])
    _in_gradients(rows)
    return rows


def _and_random(direction: PyTree, count: int) -> list[PyTree]:
    """A direction, and random ones with normally distributed entries."""

    def draw(key: jax.Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(direction)
        pairs = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        return jax.tree.unflatten(
            treedef, [jax.random.normal(k, x.shape, x.dtype) for k, x in pairs]
        )

    return [direction, *map(draw, jax.random.split(jax.random.key(0), count))]


def _compile(row: Measurement, function: Callable, arguments: tuple) -> Callable:
    """The executable; its compile time and memory are stored in the row."""
    jax.clear_caches()  # traces of other functions are not reused
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    row.trace_seconds = time.perf_counter() - start
    compiled = lowered.compile()
    row.compile_seconds = time.perf_counter() - start
    row.temp_bytes, cost = temp_bytes(compiled), compiled.cost_analysis()
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


def _in_gradients(rows: list[Measurement]) -> None:
    medians = {row.quantity: row.median for row in rows if not row.engine}
    for row in rows:
        if row.seconds:
            row.gradients = row.median / medians[GRADIENT]
        if row.engine:
            row.floor = 1 + row.subsets / 2 * medians[FORWARD] / medians[GRADIENT]


def _title(row: Measurement) -> str:
    return " ".join(filter(None, (row.model, row.engine, row.quantity)))
