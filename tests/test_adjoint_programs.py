"""The fast engine: how equations become operations, and what a sweep computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from support import models
from support.both_engines import assert_engines_agree, normal, program_for
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import compat
from partnewton.engines.adjoint import sums
from partnewton.engines.adjoint.lowerings import (
    memory,
)
from partnewton.engines.adjoint.primitives.bilinear import BILINEAR, is_product

PyTree = Any


# --- Operations ----------------------------------------------------------------------


def curved_rules(loss: Callable, *shapes: tuple[int, ...]) -> list[str]:
    """The rules of the operations that are curved, in order."""
    ops = program_for(loss, *[jnp.ones(shape) for shape in shapes]).ops
    return [op.rule.name for op in ops if op.is_curved]


W1, W2 = (5, 5), (5, 5)
X = normal(3, 5).astype(np.float32)


def residual(w1, w2):
    x = jnp.tanh(X @ w1)
    return jnp.sum(jnp.sin(x + jnp.tanh(x @ w2)))


def gated(w):
    x = jnp.tanh(X @ w)
    return jnp.sum(jnp.tanh(x) * (jnp.tanh(x) @ normal(5, 5)))


def layer_norm(w):
    x = X @ w
    x = x - jnp.mean(x, axis=1, keepdims=True)
    return jnp.sum(x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-3))


def gelu(w1, w2):
    return jnp.sum(jax.nn.gelu(X @ w1) @ w2)


def elu(w1, w2):
    return jnp.sum(jnp.sin(jax.nn.elu(jax.nn.elu(X @ w1) @ w2)))


def softmax(w):
    return jnp.sum(jax.nn.softmax(X @ w) @ normal(5, 2))


def dropout(w1, w2):
    x = jnp.tanh(X @ w1)
    return jnp.sum(jnp.where(normal(3, 5) > 0, x / 0.5, 0.0) @ w2)


@pytest.mark.parametrize(
    ("loss", "shapes", "expected"),
    [
        (residual, (W1, W2), ["elementwise", "bilinear", *["elementwise"] * 2]),
        (gated, (W1,), ["elementwise", "elementwise"]),
        (layer_norm, (W1,), ["elementwise"] * 3),
        (gelu, (W1, W2), ["elementwise", "bilinear"]),
        (elu, (W1, W2), ["elementwise", "bilinear", "elementwise"]),
        (softmax, (W1,), ["elementwise"] * 2),
        (dropout, (W1, W2), ["elementwise", "bilinear"]),
    ],
)
def test_runs_of_elementwise_equations_are_one_operation(loss, shapes, expected):
    assert curved_rules(loss, *shapes) == expected


def masks_of_each_other(params: PyTree) -> jax.Array:
    """Two runs of elementwise equations that depend on each other through masks."""
    x = jnp.tanh(params["x"])
    y = jnp.where(x > 0, jnp.sin(params["y"]), params["y"])
    return jnp.sum(jnp.where(y > 0, jnp.exp(x), x) * y)


def test_operations_have_an_order_if_runs_depend_on_each_other_through_masks():
    with jax.enable_x64(True):
        params = {"x": jnp.array(normal(20)), "y": jnp.array(normal(20, seed=1))}
        assert_engines_agree(masks_of_each_other, params, params)


# --- Sparsity over subsets -----------------------------------------------------------

LAYERS = [(3, 7), (7, 11), (11, 13), (13, 2)]


def layers(dtype: Any = np.float32) -> list[dict[str, jax.Array]]:
    return [
        {
            "w": jnp.array(normal(*shape, seed=i) / shape[0] ** 0.5, dtype),
            "b": jnp.array(normal(shape[1], seed=i), dtype),
        }
        for i, shape in enumerate(LAYERS)
    ]


def dense(params: PyTree, x: Any, activation: Callable = jnp.tanh) -> jax.Array:
    *hidden, last = params
    for p in hidden:
        x = activation(x @ p["w"] + p["b"])
    return x @ last["w"] + last["b"]


def dense_loss(params: PyTree) -> jax.Array:
    x = normal(5, 3).astype(params[0]["w"].dtype)
    return jnp.mean(jnp.sin(dense(params, x)) ** 2)


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all values of a jaxpr and of those inside of it."""
    found = set()
    for equation in compat.open_jaxpr(jaxpr).eqns:
        found.update(v.aval.shape for v in equation.outvars)
        for inside in core.jaxprs_in_params(equation.params):
            found |= shapes_in(inside)
    return found


def stacked_weights(engine: str, **kwargs: Any) -> set[tuple[int, ...]]:
    params = layers()
    summary = functools.partial(pn.summarize, dense_loss, engine=engine, **kwargs)
    found = shapes_in(jax.make_jaxpr(summary)(params, params))
    assert (1, 7, 11) in found or (7, 11) in found
    return {x for x in found if x[1:] in LAYERS and x[0] > 1}


def test_no_stack_of_weights_is_ever_built():
    assert stacked_weights("adjoint") == set()
    # The same search finds the stacks of the reference engine.
    assert (8, 7, 11) in stacked_weights(pn.engines.JvpOfGrad(batch_size=8))


@pytest.mark.usefixtures("registry_is_restored")
def test_tangents_have_rows_for_the_subsets_on_which_a_value_depends():
    met = []

    def watched(op, primals, cotangents, jets, request):
        met.append([(x.first.start, x.first.span.stop) for x in jets])
        return BILINEAR.apply(op, primals, cotangents, jets, request)

    pn.engines.rule("dot_general", when=is_product)(watched)
    compute = functools.partial(pn.summarize, dense_loss, engine="adjoint")
    jax.eval_shape(compute, layers(), layers())
    # Products of layers 2 to 4: the first operand depends on all layers before.
    assert met == [
        [(0, 2), (2, 3)],
        [(0, 4), (4, 5)],
        [(0, 6), (6, 7)],
    ]


# --- Large sweeps, compiled in parts --------------------------------------------------


@pytest.mark.parametrize("batch_size", some([None, 4], default=[None]))
@pytest.mark.parametrize(
    "name",
    some(
        ["convolutional_network", "attention", "lstm"],
        default=["convolutional_network"],
    ),
)
def test_sweeps_of_separately_compiled_operations_are_the_same(
    name, batch_size, monkeypatch
):
    with jax.enable_x64(True):
        problem = models.make(name, jnp.float64)

        def summary_and_calls():
            # A new function each time, since jax caches the trace of a function.
            compute = functools.partial(
                pn.summarize, problem.loss, engine=pn.engines.Adjoint(batch_size)
            )
            compiled = jax.jit(compute).lower(problem.params, problem.direction)
            calls = compiled.compile().as_text().count(" call(")
            return quick_jit(compute)(problem.params, problem.direction), calls

        expected, fused = summary_and_calls()
        monkeypatch.setattr(sums, "_CACHED_BYTES", 0)
        monkeypatch.setattr(memory, "_LARGE", 0)
        found, outlined = summary_and_calls()
    assert (outlined > fused) == (jax.default_backend() == "cpu")
    for field in expected._fields:
        x, y = getattr(found, field), getattr(expected, field)
        assert_close(x, np.asarray(y), 1e-12, field)


@pytest.mark.parametrize("cached", some([0, 2**23], default=[0]))
def test_a_loop_may_start_from_a_literal(cached, monkeypatch):
    monkeypatch.setattr(sums, "_CACHED_BYTES", cached)

    def loss(params: PyTree) -> jax.Array:
        def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(carry + x), None

        return lax.scan(body, 0.0, jnp.tanh(params["x"] * params["y"]))[0]

    with jax.enable_x64(True):
        params = {"x": jnp.array(normal(5)), "y": jnp.array(normal(5, seed=1))}
        assert_engines_agree(loss, params, params)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [0, 2**23])
def test_a_summary_is_nan_where_the_loss_is_not_finite(cached, monkeypatch):
    monkeypatch.setattr(sums, "_CACHED_BYTES", cached)

    def loss(params: PyTree) -> jax.Array:
        return dense_loss(params) / 0.0

    summary = pn.summarize(loss, layers(), layers(), engine="adjoint")
    for x in (summary.gradient, summary.hessian, summary.third):
        assert np.all(np.isnan(x))
