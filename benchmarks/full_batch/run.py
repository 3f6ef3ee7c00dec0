"""One run of one optimizer: losses and errors over seconds and over gradients."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.full_batch import functions
from benchmarks.full_batch.objective import Objective, PyTree
from benchmarks.full_batch.optimizers import OPTIMIZERS, SCIPY, Method, is_applicable
from benchmarks.full_batch.problems import make

__all__ = ["Budget", "run"]

POINTS = 40  # recorded at least, of a run that uses all of its seconds
GROWTH = 0.1  # the part of the elapsed seconds after which the next point follows
UNCHANGED = 300  # steps without any change after which a run ends
HORIZON = 0.97  # of the seconds, for the schedules, which must not be cut off
MAX_WALL = 8.0  # times the seconds, on a machine with other load


class Budget(NamedTuple):
    """How long a run takes, and by which clock.

    Attributes:
      seconds: without compiling.
      clock: a function that returns seconds: of the CPU, or of the wall.
    """

    seconds: float
    clock: Callable[[], float]


class Trace(NamedTuple):
    """What a run records at each point; the parameters are evaluated afterwards."""

    seconds: list[float]
    steps: list[int]
    evaluations: list[int]
    params: list[PyTree]

    def add(self, seconds: float, steps: int, evaluations: int, params: PyTree) -> None:
        for values, value in zip(
            self, (seconds, steps, evaluations, jax.device_get(params)), strict=True
        ):
            values.append(value)


def run(
    problem: str, optimizer: str, dtype: str, seed: int, seconds: float, clock: str
) -> dict[str, Any] | None:
    """The record of a run, ready for JSON; None if the optimizer is not applicable.

    float64 has to be enabled by the caller, for the whole process, before the first
    call; float32 runs must be in a process without it. In the record,

    - ``loss`` and ``error`` are evaluated in float64 at the parameters of the run;
    - ``evaluations`` are values with gradients, or None if the cost is not countable;
    - ``gradient_seconds`` is the time of one value with gradient;
    - ``compile_seconds`` includes tracing, and is not part of ``seconds``.

    Test functions, whose gradients take microseconds, have a tenth of the seconds.
    """
    objective = make(problem)
    params = objective.init(jax.random.key(seed), jnp.dtype(dtype))
    count = sum(x.size for x in jax.tree.leaves(params))
    if not is_applicable(optimizer, objective, dtype, count):
        return None
    scale = 0.1 if problem in functions.FUNCTIONS else 1.0
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    budget = Budget(seconds * scale, clocks[clock])
    if optimizer == SCIPY:
        trace, compile_seconds, horizon = _run_scipy(objective, params, budget)
        countable = True
    else:
        method = OPTIMIZERS[optimizer](objective)
        trace, compile_seconds, horizon = _run_compiled(
            method, params, budget, optimizer.startswith("adamw")
        )
        countable = method.evaluations is not None
    loss, error = _evaluate(objective, trace.params)
    return {
        "problem": problem,
        "optimizer": optimizer,
        "dtype": dtype,
        "seed": seed,
        "budget": budget.seconds,
        "clock": clock,
        "parameters": count,
        "minimum": objective.minimum,
        "compile_seconds": compile_seconds,
        "gradient_seconds": _gradient_seconds(problem, dtype, budget.clock),
        "horizon": horizon,
        "seconds": trace.seconds,
        "steps": trace.steps,
        "evaluations": trace.evaluations if countable else None,
        "loss": loss,
        "error": error,
        "jax": jax.__version__,
    }


def _run_compiled(
    method: Method, params: PyTree, budget: Budget, has_horizon: bool
) -> tuple[Trace, float, int]:
    """Runs compiled loops of a growing number of steps, and waits for each."""

    def steps(carry: Any, count: jax.Array, horizon: jax.Array) -> Any:
        def body(_: Any, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            carry, evaluations = state
            carry = method.step(carry, horizon)
            if method.evaluations is not None:
                evaluations += jnp.asarray(method.evaluations(carry), jnp.int32)
            return carry, evaluations

        return jax.lax.fori_loop(0, count, body, (carry, jnp.int32(0)))

    begin = budget.clock()
    start = jax.jit(method.init).lower(params).compile()
    carry = jax.block_until_ready(start(params))
    one = jnp.int32(1), jnp.int32(1)
    compiled = jax.jit(steps).lower(carry, *one).compile()
    compile_seconds = budget.clock() - begin

    horizon = 1
    if has_horizon:
        per_step = _seconds_per_step(compiled, carry, budget)
        horizon = max(1, int(HORIZON * budget.seconds / per_step))
    trace = Trace([0.0], [0], [0], [jax.device_get(params)])
    elapsed, done, evaluated, unchanged = 0.0, 0, 0, 0
    count, end = 1, time.perf_counter() + MAX_WALL * budget.seconds
    while elapsed < budget.seconds and time.perf_counter() < end:
        if has_horizon:
            count = min(count, horizon - done)
        begin = budget.clock()
        carry, more = jax.block_until_ready(
            compiled(carry, jnp.int32(count), jnp.int32(horizon))
        )
        elapsed += budget.clock() - begin
        done += count
        evaluated += int(more)
        trace.add(elapsed, done, evaluated, method.params(carry))
        unchanged = unchanged + count if _equal(*trace.params[-2:]) else 0
        if unchanged >= UNCHANGED or done == horizon > 1:
            break
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(trace.params[-1])):
            break
        following = min(
            max(GROWTH * elapsed, elapsed / done),
            budget.seconds / POINTS,
            budget.seconds - elapsed,
        )
        count = max(1, round(following * done / max(elapsed, 1e-9)))
    return trace, compile_seconds, horizon


def _seconds_per_step(compiled: Any, carry: Any, budget: Budget) -> float:
    """The time of a step, from a run of at least a fortieth of the budget."""
    count = 1
    while True:
        begin = budget.clock()
        jax.block_until_ready(compiled(carry, jnp.int32(count), jnp.int32(count)))
        seconds = budget.clock() - begin
        if seconds >= budget.seconds / POINTS:
            return seconds / count
        count *= 2


class _TimeIsUp(Exception):  # noqa: N818  it is no error
    pass


def _run_scipy(
    objective: Objective, params: PyTree, budget: Budget
) -> tuple[Trace, float, int]:
    """scipy's L-BFGS-B with 10 vectors and without tolerances."""
    from scipy import optimize

    flat, unravel = ravel_pytree(params)
    begin = budget.clock()
    compiled = (
        jax.jit(jax.value_and_grad(lambda z: objective.loss(unravel(z))))
        .lower(flat)
        .compile()
    )
    compile_seconds = budget.clock() - begin
    points = [(0.0, 0, 0, np.asarray(flat))]
    evaluated, steps = 0, 0
    begin = budget.clock()

    def value_and_grad(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluated
        evaluated += 1
        value, grad = compiled(jnp.asarray(z))
        return float(value), np.asarray(grad)

    def callback(z: np.ndarray) -> None:
        nonlocal steps
        steps += 1
        elapsed = budget.clock() - begin
        if elapsed > points[-1][0] + min(
            GROWTH * points[-1][0], budget.seconds / POINTS
        ):
            points.append((elapsed, steps, evaluated, z.copy()))
        if elapsed > budget.seconds:
            raise _TimeIsUp

    unlimited = 10**9
    options = {"maxiter": unlimited, "maxfun": unlimited, "ftol": 0.0, "gtol": 0.0}
    try:
        found = optimize.minimize(
            value_and_grad,
            points[0][-1],
            jac=True,
            method="L-BFGS-B",
            callback=callback,
            options=options,
        )
    except _TimeIsUp:
        pass
    else:
        points.append((budget.clock() - begin, steps, evaluated, found.x))
    trace = Trace([], [], [], [])
    for seconds, step, evaluations, z in points:
        trace.add(seconds, step, evaluations, unravel(jnp.asarray(z)))
    return trace, compile_seconds, 1


def _equal(a: PyTree, b: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def _evaluate(
    objective: Objective, points: list[PyTree]
) -> tuple[list[float | None], list[float | None] | None]:
    """Losses and errors in float64; None if not finite."""
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), p) for p in points]
        loss, error = jax.jit(objective.loss), objective.error
        losses = [_finite(loss(p)) for p in wide]
        if error is None:
            return losses, None
        error = jax.jit(error)
        return losses, [_finite(error(p)) for p in wide]


def _finite(x: jax.Array) -> float | None:
    return float(x) if np.isfinite(x) else None


@functools.cache
def _gradient_seconds(problem: str, dtype: str, clock: Callable[[], float]) -> float:
    """The time of one value with gradient in a compiled loop; the best of 3."""
    objective = make(problem)
    params = objective.init(jax.random.key(0), jnp.dtype(dtype))

    @jax.jit
    def descend(params: PyTree, count: jax.Array, rate: jax.Array) -> PyTree:
        def body(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            params, total = carry
            value, grad = jax.value_and_grad(objective.loss)(params)
            params = jax.tree.map(
                lambda p, g: p - rate.astype(p.dtype) * g, params, grad
            )
            return params, total + value

        return jax.lax.fori_loop(0, count, body, (params, jnp.zeros((), dtype)))

    def seconds(count: int) -> float:
        begin = clock()
        jax.block_until_ready(descend(params, jnp.int32(count), jnp.float32(1e-20)))
        return clock() - begin

    seconds(1)  # compiles
    count = 1
    while seconds(count) < 0.1:
        count *= 2
    return min(seconds(count) for _ in range(3)) / count
