"""Losses with rules of their own: a summary is the derivative of their gradient."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jax.experimental.ode import odeint
from support.gradients import assert_is_derivative_of_gradient, direction_of
from support.oracles import quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import ENGINES, jvp_of_grad
from partnewton.engines.adjoint import final
from partnewton.engines.adjoint.rows import apply

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))
adjoint_by_default = pytest.mark.parametrize(
    "engine", some(sorted(ENGINES), default=["adjoint"])
)


def params() -> dict[str, jax.Array]:
    return {"b": jnp.array([0.5, 0.2]), "w": jnp.array([0.3, 0.7])}


def around(function: Callable) -> Callable:
    """A loss with a function of an array in it, and curvature before and after it."""

    def loss(p):
        hidden = function(jnp.sin(p["w"]) * jnp.exp(p["b"]))
        return jnp.sum(jnp.tanh(hidden * p["b"])) + jnp.sum(p["w"] ** 3 * p["b"])

    return loss


def with_rule(function: Callable, backward: Callable) -> Callable:
    """A function with a rule for reverse mode: from its argument and the cotangent."""
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x, g),))
    return wrapped


clipped = with_rule(lambda x: x, lambda _, g: jnp.clip(g, -0.3, 0.4))
normalised = with_rule(lambda x: x, lambda _, g: g / (0.1 + jnp.linalg.norm(g)))
cleaned = with_rule(lambda x: x, lambda _, g: jnp.nan_to_num(g) * jnp.abs(g))
reversed_ = with_rule(jnp.tanh, lambda x, g: -0.5 * g)
sine = with_rule(jnp.sin, lambda x, g: g * jnp.cos(x))
calls_another = with_rule(
    lambda x: sine(x) ** 2, lambda x, g: 2 * g * sine(x) * jnp.cos(x)
)


def transport(costs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A cost at a potential that two iterations have not brought to its optimum."""
    potential = jnp.zeros_like(costs)
    for _ in range(2):
        potential = 0.5 * potential + 0.3 * jnp.tanh(costs - potential)
    return jnp.sum(potential * jnp.exp(-costs * potential)), potential


@jax.custom_vjp
def envelope(costs: jax.Array) -> jax.Array:
    """Its gradient is by the envelope theorem, as if the potential were optimal."""
    return transport(costs)[0]


def envelope_forward(costs):
    value, potential = transport(costs)
    return value, (costs, potential)


def envelope_backward(kept, g):
    costs, potential = kept
    return (-g * potential**2 * jnp.exp(-costs * potential),)


envelope.defvjp(envelope_forward, envelope_backward)


@jax.custom_vjp
def deep_equilibrium(x: jax.Array) -> jax.Array:
    z = jnp.zeros_like(x)
    for _ in range(30):
        z = layer(x, z)
    return z


def layer(x: jax.Array, z: jax.Array) -> jax.Array:
    return 0.4 * jnp.tanh(z + x)


@jax.custom_vjp
def solve_transposed(x: jax.Array, z: jax.Array, g: jax.Array) -> jax.Array:
    slope = 0.4 / jnp.cosh(z + x) ** 2
    return g / (1 - slope)


def solve_transposed_backward(kept, g):
    _, pull = jax.vjp(lambda x, z, g: g / (1 - 0.4 / jnp.cosh(z + x) ** 2), *kept)
    return pull(g)


solve_transposed.defvjp(lambda *x: (solve_transposed(*x), x), solve_transposed_backward)


def deep_equilibrium_backward(kept, g):
    x, z = kept
    return (solve_transposed(x, z, g) * 0.4 / jnp.cosh(z + x) ** 2,)


def deep_equilibrium_forward(x):
    z = deep_equilibrium(x)
    return z, (x, z)


deep_equilibrium.defvjp(deep_equilibrium_forward, deep_equilibrium_backward)


def kernel_of_sine(x_ref, out_ref):
    out_ref[...] = jnp.sin(x_ref[...])


def kernel_of_slope(x_ref, g_ref, out_ref):
    out_ref[...] = g_ref[...] * jnp.cos(x_ref[...])


def called(kernel: Callable, *args: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(*args)


kernel = with_rule(
    functools.partial(called, kernel_of_sine), lambda x, g: g * jnp.cos(x)
)
kernels = with_rule(
    functools.partial(called, kernel_of_sine),
    lambda x, g: called(kernel_of_slope, x, g),
)


def in_a_scan(x: jax.Array) -> jax.Array:
    return lax.scan(
        lambda c, y: (clipped(jnp.sin(c * y)), c), x, jnp.array([0.5, 2.0])
    )[0]


def in_a_cond(x: jax.Array) -> jax.Array:
    return lax.cond(x[0] > 0, lambda x: clipped(x) ** 2, jnp.sin, x)


def conjugate_gradients(x: jax.Array) -> jax.Array:
    def matrix(z):
        return (2 + x**2) * z + 0.1 * jnp.sum(z)

    return jax.scipy.sparse.linalg.cg(matrix, jnp.sin(x), tol=1e-12)[0]


def root(x: jax.Array) -> jax.Array:
    def solve(f, start):
        return lax.fori_loop(0, 30, lambda _, z: z - f(z) / (3 + 0 * z), start)

    def tangent_solve(g, y):
        return y / g(jnp.ones_like(y))

    return lax.custom_root(
        lambda z: z**3 + 2 * z - x, jnp.zeros_like(x), solve, tangent_solve
    )


def linear_solve(x: jax.Array) -> jax.Array:
    matrix = jnp.diag(2 + x) + 0.3

    def solve(matvec, b):
        return jnp.linalg.solve(jax.jacfwd(matvec)(b), b)

    return lax.custom_linear_solve(
        lambda z: matrix @ z, jnp.cos(x), solve, transpose_solve=solve
    )


SPARSE = sparse.BCOO.fromdense(np.array([[1.0, 0.0], [2.0, -1.0]], np.float32))


def sparse_product(x: jax.Array) -> jax.Array:
    matrix = sparse.BCOO((SPARSE.data.astype(x.dtype), SPARSE.indices), shape=(2, 2))
    return jax.vmap(lambda y: matrix @ y)(jnp.stack([x, x**2]))[1]


RULES = {
    "calls_another": calls_another,
    "cleaned": cleaned,
    "clipped": clipped,
    "conjugate_gradients": conjugate_gradients,
    "equilibrium": deep_equilibrium,
    "envelope": envelope,
    "in_a_cond": in_a_cond,
    "in_a_scan": in_a_scan,
    "kernel": kernel,
    "kernels": kernels,
    "linear_solve": linear_solve,
    "normalised": normalised,
    "reversed": reversed_,
    "root": root,
    "sparse_product": sparse_product,
}
LOSSES = {name: around(function) for name, function in RULES.items()}
SOME = ["clipped", "in_a_scan"]


@adjoint_by_default
@pytest.mark.parametrize("name", some(LOSSES, default=SOME))
def test_a_summary_is_the_derivative_of_the_gradient(name, engine, monkeypatch):
    if engine == "adjoint":  # which does it by itself
        monkeypatch.delattr(jvp_of_grad.JvpOfGrad, "summarize")
    assert_is_derivative_of_gradient(LOSSES[name], params, engine)


@pytest.mark.slow
def test_the_final_step_takes_a_few_subsets_at_a_time(monkeypatch):
    monkeypatch.setattr(final, "_MOST_PRODUCT_BYTES", 1)
    assert_is_derivative_of_gradient(LOSSES["clipped"], params, "adjoint")


@jax.custom_batching.custom_vmap
def cannot_be_batched(x):
    return 2 * x


@cannot_be_batched.def_vmap
def _(size, batched, x):
    raise NotImplementedError


def test_rows_that_cannot_be_batched_go_one_by_one():
    columns = np.arange(6.0).reshape(3, 2), np.ones((3, 1))
    (found,) = apply(lambda x, y: [cannot_be_batched(x) + y], *columns)
    np.testing.assert_array_equal(found, 2 * columns[0] + 1)


@adjoint_by_default
@pytest.mark.parametrize("batch_size", some([1, 2], default=[2]))
def test_batches_of_subsets(batch_size, engine):
    def compute(p, u):
        return [
            pn.summarize(LOSSES["clipped"], p, u, engine=some_engine)
            for some_engine in (
                dataclasses.replace(pn.engines.get(engine), batch_size=batch_size),
                engine,
            )
        ]

    found, expected = quick_jit(compute)(params(), direction_of(params()))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def ode_loss(p):
    ys = odeint(lambda y, t, w: -jnp.sin(w * y), p["b"], jnp.array([0.0, 1.0]), p["w"])
    return jnp.sum(ys[-1] ** 2)


@pytest.mark.slow
@each_engine
def test_an_ode_by_its_adjoint_equation_has_a_hessian(engine):
    assert_is_derivative_of_gradient(
        ode_loss, params, engine, third_order=False, rtol=1e-5
    )


@pytest.mark.slow
def test_what_jax_cannot_differentiate_thrice_raises_with_one_sentence():
    with pytest.raises(TypeError, match="With third_order=False the loss need only"):
        pn.summarize(ode_loss, params(), params(), engine="adjoint")


@each_engine
def test_a_kernel_without_a_rule_is_named(engine):
    def loss(p):
        return jnp.sum(called(kernel_of_sine, p["w"] * p["b"]) ** 2)

    with pytest.raises(TypeError, match="Pallas kernel 'kernel_of_sine'"):
        pn.summarize(loss, params(), params(), engine=engine)


def newton_by_while(p):
    """A root by Newton's method until it is found: no reverse mode."""

    def step(z):
        return z - (z**3 + z - p["w"] * p["b"]) / (3 * z**2 + 1)

    def body(state):
        n, z = state
        return n + 1, step(z)

    _, z = lax.while_loop(lambda state: state[0] < 12, body, (0, p["w"]))
    return jnp.sum(jnp.sin(z))


def newton_by_scan(p):
    z, _ = lax.scan(
        lambda z, _: (z - (z**3 + z - p["w"] * p["b"]) / (3 * z**2 + 1), None),
        p["w"],
        length=12,
    )
    return jnp.sum(jnp.sin(z))


@pytest.mark.slow
@adjoint_by_default
def test_a_loss_that_can_be_differentiated_forwards_only(engine):
    with jax.enable_x64(True):
        p = params()

        @quick_jit
        def compute(p):
            u = direction_of(p)
            return [
                (
                    *pn.summarize(loss, p, u, engine=engine),
                    *pn.derivative_tensors(loss, p, u, engine=engine),
                )
                for loss in (newton_by_while, newton_by_scan)
            ]

        found, expected = compute(p)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def float8_loss(p):
    x, y = (p[k].astype(jnp.float8_e4m3fn) for k in ("w", "b"))
    product = lax.dot_general(
        x[None],
        y[:, None],
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(product**2)


@adjoint_by_default
def test_products_of_float8(engine):
    """Numbers that float8 has: the product is exact, and so are its derivatives."""
    p = {"b": jnp.array([0.5, 0.25]), "w": jnp.array([1.0, -2.0])}
    u = {"b": jnp.array([1.0, 0.5]), "w": jnp.array([0.5, 1.0])}
    found = pn.summarize(float8_loss, p, u, engine=engine)
    # z = w.b = 0, so that L = z^2 has the Hessian 2 zdot zdot'.
    slopes = np.array([0.0, 0.5])
    np.testing.assert_allclose(found.gradient, [0, 0])
    np.testing.assert_allclose(found.hessian, 2 * np.outer(slopes, slopes))


@each_engine
def test_the_error_of_a_loss_is_raised_as_it_is(engine):
    def loss(p):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pn.summarize(loss, params(), params(), engine=engine)
