"""Runs of all optimizers, each for the same number of seconds."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import partnewton as pn
from partnewton.demo.curves import Curves
from partnewton.demo.evaluation import compiled
from partnewton.demo.pinn.problem import Problem, true

__all__ = ["SUBSPACE_NEWTON", "Results", "SolutionCurves", "run"]

CHUNK = 10  # steps in one compiled loop
ADAM_RATE = 3e-2  # the best of 1e-3, 3e-3, 1e-2 and 3e-2 for this problem
MEMORY = 50  # of L-BFGS
SNAPSHOT_AFTER = 0.1  # fraction of the steps

SUBSPACE_NEWTON = "subspace_newton"

PyTree = Any


@dataclasses.dataclass
class SolutionCurves(Curves):
    """The curves of a physics-informed network.

    What is logged, of `subspace_newton`, is after the last of the steps, without those
    of step 0.

    Attributes:
      error: the relative L2 error of the solution.
    """

    error: list[float] = dataclasses.field(default_factory=list)


class Results(NamedTuple):
    """The results of the demonstration.

    Attributes:
      problem: the problem.
      curves: the curves of each optimizer.
      params: the last weights of each optimizer.
      summary: along the gradient, at the weights of `subspace_newton` after
        `snapshot_step` steps.
      snapshot_step: the number of steps before that snapshot.
      names: the names of the subsets.
      wall_seconds: the total time.
    """

    problem: Problem
    curves: dict[str, SolutionCurves]
    params: dict[str, PyTree]
    summary: pn.Summary
    snapshot_step: int
    names: tuple[str, ...]
    wall_seconds: float


def run(problem: Problem) -> Results:
    """Runs each optimizer, then computes the partition Hessian.

    Args:
      problem: from :func:`prepare`.

    Returns:
      The results.
    """
    with jax.enable_x64(True):
        return _results(problem)


def _results(problem: Problem) -> Results:
    begin = time.perf_counter()
    curves: dict[str, SolutionCurves] = {}
    params, snapshot, limit = {}, (0, problem.params), None
    for name, method in _methods(problem).items():
        curves[name], halts = _run(problem, name, method, limit)
        params[name] = halts[-1][1]
        if name == SUBSPACE_NEWTON:
            snapshot, limit = halts[0], curves[name].seconds[-1]

    def summarize(params: PyTree) -> pn.Summary:
        return pn.summarize(
            problem.value_fn,
            params,
            jax.grad(problem.value_fn)(params),
            param_labels=problem.param_labels,
        )

    summary = compiled(summarize, snapshot[1])(snapshot[1])
    names = pn.subset_names(problem.params, problem.param_labels)
    seconds = time.perf_counter() - begin
    return Results(problem, curves, params, summary, snapshot[0], names, seconds)


class _Method(NamedTuple):
    """An optimizer.

    Attributes:
      tx: the transformation.
      settings: its hyperparameters, as text for a table.
      value_and_grad: ``value_and_grad(params, state)``, of the loss.
      scale: from the fraction of the time that has passed to a factor of the updates.
    """

    tx: optax.GradientTransformationExtraArgs
    settings: str
    value_and_grad: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]
    scale: Callable[[float], float] = lambda fraction: 1.0


def _methods(problem: Problem) -> dict[str, _Method]:
    """The optimizers; the first one decides how many seconds the others have."""
    value_and_grad = jax.value_and_grad(problem.value_fn)
    of_line_search = optax.value_and_grad_from_state(problem.value_fn)

    def computed(params: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
        return value_and_grad(params)

    def reused(params: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
        return of_line_search(params, state=state)

    return {
        SUBSPACE_NEWTON: _Method(
            pn.subspace_newton(param_labels=problem.param_labels),
            "no arguments",
            computed,
        ),
        "lbfgs": _Method(
            optax.lbfgs(memory_size=MEMORY),
            f"optax.lbfgs with its line search, memory_size {MEMORY}",
            reused,
        ),
        "adam": _Method(
            optax.with_extra_args_support(optax.adam(ADAM_RATE)),
            f"learning rate {ADAM_RATE:g} with cosine decay over the seconds",
            computed,
            lambda fraction: 0.5 * (1 + math.cos(math.pi * min(fraction, 1))),
        ),
    }


def _run(
    problem: Problem, name: str, method: _Method, limit: float | None
) -> tuple[SolutionCurves, list[tuple[int, PyTree]]]:
    """Runs one optimizer.

    Args:
      problem: the problem.
      name: of the optimizer, for the progress bar.
      method: the optimizer.
      limit: the seconds after which it is stopped; None for the number of steps of the
        configuration.

    Returns:
      Its curves; and the number of steps and the weights at the snapshot and at the
      end.
    """
    curves, halts = SolutionCurves(method.settings), []
    steps = problem.config.steps if limit is None else None
    carry = problem.params, method.tx.init(problem.params)
    # No bar if the output is not a terminal, but one line at the end.
    with tqdm(total=steps, desc=f"{name:16}", unit="step", disable=None) as bar:
        bar.set_postfix_str("compiling")
        begin = time.perf_counter()
        chunk = compiled(_chunk(problem, method), carry, 0, 0.0)
        evaluate = compiled(_evaluation(problem), problem.params)
        curves.compile_seconds = time.perf_counter() - begin
        loss, error = evaluate(problem.params)
        curves.append(0, 0.0, train_loss=loss, error=error)

        def is_finished() -> bool:
            if limit is None:
                return curves.steps[-1] >= problem.config.steps
            return curves.seconds[-1] >= limit

        while not is_finished():
            count, fraction = CHUNK, 0.0
            if limit is None:
                count = min(CHUNK, problem.config.steps - curves.steps[-1])
            else:
                fraction = curves.seconds[-1] / limit
            begin = time.perf_counter()
            carry = jax.block_until_ready(chunk(carry, count, method.scale(fraction)))
            seconds = time.perf_counter() - begin
            loss, error = evaluate(carry[0])
            last = curves.steps[-1] + count
            curves.append(last, seconds, train_loss=loss, error=error)
            if name == SUBSPACE_NEWTON:
                curves.log(jax.device_get(pn.metrics(carry[1])))
            if not halts and last >= SNAPSHOT_AFTER * (steps or 0):
                halts.append((last, carry[0]))
            bar.set_postfix_str(f"loss {curves.train_loss[-1]:.3g}")
            bar.update(count)
    if bar.disable:
        print(curves.line(name), file=sys.stderr, flush=True)
    return curves, [*halts, (curves.steps[-1], carry[0])]


def _chunk(problem: Problem, method: _Method) -> Callable[..., PyTree]:
    """Several steps as one program."""

    def chunk(carry: PyTree, count: jax.Array, scale: jax.Array) -> PyTree:
        def step(_: int, carry: PyTree) -> PyTree:
            params, state = carry
            value, grad = method.value_and_grad(params, state)
            updates, state = method.tx.update(
                grad, state, params, value=value, grad=grad, value_fn=problem.value_fn
            )
            updates = optax.tree.scale(scale, updates)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, count, step, carry)

    return chunk


def _evaluation(problem: Problem) -> Callable[[PyTree], tuple[jax.Array, jax.Array]]:
    """The loss, and the relative L2 error of the solution."""
    x = jnp.linspace(0.0, 1.0, 1001)

    def evaluate(params: PyTree) -> tuple[jax.Array, jax.Array]:
        difference = problem.solution(params, x) - true(x)
        error = jnp.linalg.norm(difference) / jnp.linalg.norm(true(x))
        return problem.value_fn(params), error

    return evaluate
