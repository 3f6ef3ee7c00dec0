"""The fast engine: custom rules, transformations of jax, and devices."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.both_engines import normal
from support.oracles import assert_close

import partnewton as pn

PyTree = Any


each_engine = pytest.mark.parametrize("engine", ["adjoint", "jvp_of_grad"])


# --- Custom differentiation rules ----------------------------------------------------


@jax.custom_vjp
def rounded(x: jax.Array) -> jax.Array:
    """Rounds; a straight-through estimator of the gradient."""
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def by_stop_gradient(x: jax.Array) -> jax.Array:
    return x + lax.stop_gradient(jnp.round(x) - x)


def estimator_losses(quantised: Callable) -> list[Callable]:
    return [
        lambda p: 0.5 * quantised(p["w"]) ** 2,
        lambda p: p["a"] * quantised(p["w"]),  # a before w
        lambda p: p["z"] * quantised(p["w"]),  # z after w
    ]


POINT = {"a": jnp.array(3.0), "w": jnp.array(1.7), "z": jnp.array(5.0)}
ONES = {"a": jnp.array(1.0), "w": jnp.array(1.0), "z": jnp.array(1.0)}
SURROGATE = [
    [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
    [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
]
# The derivative of the value of `round` is zero. For a * rounded(w), the gradient with
# respect to w has the derivative one along a, and that with respect to a has the
# derivative zero along w. A summary contains the symmetric part.
OF_THE_GRADIENT = [np.multiply(0.5, x) for x in SURROGATE]
OF_THE_GRADIENT[0] = np.zeros((3, 3))


@each_engine
@pytest.mark.parametrize(
    ("quantised", "expected"),
    [(rounded, OF_THE_GRADIENT), (by_stop_gradient, SURROGATE)],
)
def test_straight_through_estimators(quantised, engine, expected):
    for loss, hessian in zip(estimator_losses(quantised), expected, strict=True):
        summary = pn.summarize(loss, POINT, ONES, engine=engine)
        gradient = jax.grad(loss)(POINT)
        assert summary.gradient.tolist() == jax.tree.leaves(gradient)
        np.testing.assert_array_equal(summary.hessian, hessian)
        np.testing.assert_array_equal(summary.third, 0)


@each_engine
def test_a_custom_vjp_keeps_its_own_rule(engine):
    """A rule with twice the derivative of tanh is propagated as it is."""

    @jax.custom_vjp
    def steep(x):
        return jnp.tanh(x)

    steep.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g / jnp.cosh(x) ** 2,))
    summary = pn.summarize(lambda w: 3 * steep(w), 0.4, 1.0, engine=engine)
    slope, bend, jerk = (
        functools.reduce(lambda f, _: jax.grad(f), range(n), jnp.tanh)(0.4)
        for n in (1, 2, 3)
    )
    np.testing.assert_allclose(summary.gradient, [6 * slope], rtol=1e-6)
    np.testing.assert_allclose(summary.hessian, [[6 * bend]], rtol=1e-6)
    np.testing.assert_allclose(summary.third, [6 * jerk], rtol=1e-5)


# --- Where it can be used ------------------------------------------------------------


def small_loss(p: PyTree, x: Any = 1.0) -> jax.Array:
    return jnp.sum(jnp.tanh(p["w"] @ p["v"] * x) * jnp.exp(p["v"]))


def small_params(seed: int = 0) -> PyTree:
    return {
        "v": jnp.array(normal(3, seed=seed), np.float32),
        "w": jnp.array(normal(3, 3, seed=seed), np.float32),
    }


def small(p: PyTree, x: Any = 1.0, engine: str = "adjoint") -> pn.Summary:
    loss = functools.partial(small_loss, x=x)
    return pn.summarize(loss, p, small_params(9), engine=engine)


def assert_same(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, np.asarray(y), rtol, "summary")


def expected_of(params: PyTree, xs: Any = 1.0) -> pn.Summary:
    return small(params, xs, engine="jvp_of_grad")


def test_under_vmap_over_parameters_and_over_data():
    many = [small_params(seed) for seed in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *many)
    xs = jnp.arange(1.0, 4.0)
    found = jax.jit(jax.vmap(small))(batch, xs)
    expected = [expected_of(p, x) for p, x in zip(many, xs, strict=True)]
    assert_same(found, jax.tree.map(lambda *x: np.stack(x), *expected))


def test_under_cond_scan_and_checkpoint():
    params = small_params()
    expected = expected_of(params)

    def nothing(params):
        return jax.tree.map(jnp.zeros_like, expected)

    @jax.jit
    def compute(flag, params):
        in_cond = lax.cond(flag, small, nothing, params)
        in_checkpoint = jax.checkpoint(small)(params)
        _, in_scan = lax.scan(lambda p, _: (p, small(p)), params, length=2)
        return in_cond, in_checkpoint, jax.tree.map(lambda x: x[1], in_scan)

    for found in compute(True, params):
        assert_same(found, expected)
    assert_same(compute(False, params)[0], nothing(params))


def test_an_entry_of_a_summary_has_a_gradient():
    def entry(params, engine):
        summary = small(params, engine=engine)
        return summary.hessian[0, 1] + summary.third[0] + summary.gradient[1]

    gradient = jax.jit(jax.grad(entry), static_argnames="engine")
    params = small_params()
    assert_same(
        gradient(params, engine="adjoint"), gradient(params, engine="jvp_of_grad"), 1e-4
    )


@pytest.mark.slow
def test_parameters_in_bfloat16():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
    summary = small(half)
    assert {x.dtype for x in summary} == {np.dtype(np.float32)}
    exact = expected_of(jax.tree.map(lambda x: x.astype(np.float32), half))
    assert_same(summary, exact, 2**-5)


def test_aux_may_hold_anything():
    def loss(p):
        aux = {"name": "tanh", "none": None, "n": 3, "v": 2 * p["v"], "x": np.ones(2)}
        return small_loss(p), aux

    params = small_params()
    summary, aux = pn.summarize(
        loss, params, small_params(9), has_aux=True, engine="adjoint"
    )
    assert_same(summary, expected_of(params))
    assert (aux["name"], aux["none"], aux["n"]) == ("tanh", None, 3)
    np.testing.assert_array_equal(aux["v"], 2 * params["v"])
    np.testing.assert_array_equal(aux["x"], np.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["sharded_map", "explicit_mesh", "collectives"])
def test_on_four_devices(check):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "support.adjoint_on_devices", check],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.usefixtures("registry_is_restored")
def test_the_examples_of_the_page_about_the_engine():
    page = Path(__file__).parent.parent / "docs" / "engine.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("\n".join(blocks), str(page), "exec"), {})
