"""The compared optimizers, as functions that make one step and can be compiled.

``adamw_RATE`` has a cosine schedule; the best of its rates is reported. All others have
the defaults of their libraries, apart from what is in the name: the number of vectors
of L-BFGS, how Levenberg-Marquardt solves its linear systems, partnewton's `history`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import partnewton as pn
from benchmarks.full_batch.objective import Objective, PyTree

__all__ = ["MORE", "OPTIMIZERS", "OURS", "SCIPY", "TUNED", "Method", "is_applicable"]

RATES = ("1e-3", "3e-3", "1e-2")
MAX_PARAMETERS = {"lm_qr": 4000, "lm_cholesky": 4000, "bfgs": 4000}
"""Methods that store or factorise a matrix with as many columns as parameters."""

Carry = Any


class Method(NamedTuple):
    """An optimizer for one objective, as functions without side effects.

    Attributes:
      init: from the initial parameters to what a step updates.
      step: ``step(carry, horizon)``; the horizon is the number of steps of the run.
      params: the parameters in a carry.
      evaluations: the number of values with gradients that the last step computed, or
        None if its cost is not a number of gradients.
    """

    init: Callable[[PyTree], Carry]
    step: Callable[[Carry, jax.Array], Carry]
    params: Callable[[Carry], PyTree]
    evaluations: Callable[[Carry], jax.Array] | None


def _first(carry: Carry) -> Any:
    return carry[0]


def _one(carry: Carry) -> jax.Array:
    return jnp.int32(1)


def _optax(
    make: Callable[[], Any],
    evaluations: Callable[[Carry], jax.Array] | None,
) -> Callable[[Objective], Method]:
    """A method from an optax transformation, which receives the loss and its value."""

    def method(objective: Objective) -> Method:
        tx, loss = optax.with_extra_args_support(make()), objective.loss

        def step(carry: Carry, horizon: jax.Array) -> Carry:
            params, state = carry
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return optax.apply_updates(params, updates), state

        return Method(lambda p: (p, tx.init(p)), step, _first, evaluations)

    return method


def _lbfgs(memory_size: int) -> Callable[[Objective], Method]:
    """optax's L-BFGS; the gradient at the accepted point is that of the line search."""

    def method(objective: Objective) -> Method:
        tx, loss = optax.lbfgs(memory_size=memory_size), objective.loss
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(carry: Carry, horizon: jax.Array) -> Carry:
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return optax.apply_updates(params, updates), state

        def evaluations(carry: Carry) -> jax.Array:
            return optax.tree.get(carry[1], "num_linesearch_steps")

        return Method(lambda p: (p, tx.init(p)), step, _first, evaluations)

    return method


def _adamw(rate: float) -> Callable[[Objective], Method]:
    def method(objective: Objective) -> Method:
        adam = optax.adamw(1.0)

        def init(params: PyTree) -> Carry:
            return params, adam.init(params), jnp.int32(0)

        def step(carry: Carry, horizon: jax.Array) -> Carry:
            params, state, count = carry
            updates, state = adam.update(
                jax.grad(objective.loss)(params), state, params
            )
            progress = jnp.minimum(count / horizon, 1)
            scale = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            updates = jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)
            return optax.apply_updates(params, updates), state, count + 1

        return Method(init, step, _first, _one)

    return method


def _optimistix(
    make: Callable[[], Any], least_squares: bool
) -> Callable[[Objective], Method]:
    """A solver of optimistix, whose tolerance of zero lets it run until it is stopped.

    The arrays of its state are the carry; the rest does not change.
    """

    def method(objective: Objective) -> Method:
        solver = make()
        function = objective.residuals if least_squares else objective.loss
        parts = []  # of the state: what is no array

        def fn(params: PyTree, args: Any) -> tuple[jax.Array, None]:
            return function(params), None

        def closed(params: PyTree) -> Callable:
            return eqx.filter_closure_convert(fn, params, None)

        def init(params: PyTree) -> Carry:
            shape = jax.eval_shape(function, params)
            state = solver.init(
                closed(params), params, None, {}, shape, None, frozenset()
            )
            arrays, rest = eqx.partition(state, eqx.is_array)
            parts[:] = [rest]
            return params, arrays

        def step(carry: Carry, horizon: jax.Array) -> Carry:
            params, arrays = carry
            state = eqx.combine(arrays, parts[0])
            params, state, _ = solver.step(
                closed(params), params, None, {}, state, frozenset()
            )
            return params, eqx.filter(state, eqx.is_array)

        return Method(init, step, _first, None if least_squares else _one)

    return method


def _bfgs() -> Any:
    import optimistix

    return optimistix.BFGS(rtol=0.0, atol=0.0)


def _levenberg_marquardt() -> Any:
    import optimistix

    return optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)


def _levenberg_marquardt_normal() -> Any:
    """With the normal equations: faster than QR, with the condition number squared."""
    import lineax
    import optimistix

    solver = lineax.Normal(lineax.Cholesky())
    return optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0, linear_solver=solver)


def _subspace_newton(**options: Any) -> Callable[[Objective], Method]:
    """As an attribute, which versions before it do not have, only when it is run."""
    return _optax(lambda: pn.subspace_newton(**options), None)


TUNED: dict[str, tuple[str, ...]] = {"adamw": tuple(f"adamw_{r}" for r in RATES)}
"""Optimizers of which the best rate is reported, and their entries."""

SCIPY = "scipy_lbfgsb"
"""Run by scipy, with a compiled function and gradient, in float64 only."""

OURS: dict[str, Callable[[Objective], Method]] = {
    "subspace_newton": _subspace_newton(),
    "partition_newton": _optax(pn.partition_newton, None),
    "paper_newton": _optax(lambda: pn.paper_newton(1.0), None),
    **{f"subspace_newton_{h}": _subspace_newton(history=h) for h in (0, 1, 4)},
}
"""The first one that is in a report is compared with the best of the others."""

MORE = ("paper_newton", "subspace_newton_0", "subspace_newton_1", "subspace_newton_4")
"""Run on demand only."""

OPTIMIZERS: dict[str, Callable[[Objective], Method]] = {
    **{f"adamw_{r}": _adamw(float(r)) for r in RATES},
    "lbfgs_10": _lbfgs(10),
    "lbfgs_50": _lbfgs(50),
    "bfgs": _optimistix(_bfgs, least_squares=False),
    "lm_qr": _optimistix(_levenberg_marquardt, least_squares=True),
    "lm_cholesky": _optimistix(_levenberg_marquardt_normal, least_squares=True),
    **OURS,
}


def is_applicable(name: str, objective: Objective, dtype: str, count: int) -> bool:
    """Whether an optimizer can be run on an objective with `count` parameters."""
    if name == SCIPY:
        return dtype == "float64"
    if name.startswith("lm_") and objective.residuals is None:
        return False
    return count <= MAX_PARAMETERS.get(name, count)
