"""Zero times anything is zero: masks in front of something singular."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.gradients import assert_is_derivative_of_gradient, direction_of
from support.oracles import quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import ENGINES, compat
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.primitives.elementwise import ELEMENTWISE

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))

X = np.array([[0.4, -1.1], [0.0, 0.0], [0.9, 0.3], [-0.5, 0.7]])
VALID = np.array([True, False, True, True])
DIAGONAL = np.eye(4, dtype=bool)


def params() -> dict[str, jax.Array]:
    return {
        "b": jnp.array([0.5, -0.3, 0.2]),
        "w": jnp.array([[0.3, 0.7, 0.4], [0.2, -0.5, 0.1]]),
    }


def hidden(p):
    x = X.astype(p["w"].dtype)
    return jnp.tanh(x @ p["w"] + p["b"] * np.arange(4, dtype=x.dtype)[:, None])


def pairwise_distances(p):
    z = hidden(p)
    squares = jnp.sum((z[:, None] - z) ** 2, -1)
    return jnp.sum(jnp.exp(-jnp.sqrt(jnp.where(DIAGONAL, 0, squares))))


def distances_by_products(p):
    z = hidden(p)
    norms = jnp.sum(z * z, -1)
    squares = norms[:, None] + norms - 2 * jnp.einsum("ik,jk->ij", z, z)
    return jnp.sum(jnp.where(DIAGONAL, 0, squares) ** 0.5 * jnp.sum(p["b"]))


def padded(p):
    return jnp.where(VALID[:, None], hidden(p), 0)


def padded_norms(p):
    z = padded(p)
    return jnp.sum(jnp.sin(z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-3)))


def padded_norms_by_einsum(p):
    z = padded(p)
    norms = jnp.sqrt(jnp.einsum("ij,ij->i", z, z))
    return jnp.sum(norms**3 * jnp.sum(jnp.sin(z * p["b"]), 1))


def padded_products(p):
    z = padded(p)
    norms = jnp.sqrt(jnp.einsum("ij,ij->i", jnp.abs(z), jnp.abs(z) * jnp.exp(z)))
    return jnp.sum(norms**3)


def inside_a_cond(p):
    z = padded(p)
    squares = lax.cond(True, lambda z: jnp.sum(z**2, 1), lambda z: z[:, 0], z)
    return jnp.sum(jnp.sqrt(squares) * jnp.exp(z[:, 0]))


def root_of_relu(p):
    return jnp.sum(jnp.sqrt(jax.nn.relu(hidden(p) - 0.11)) * jnp.cos(p["b"]))


def power_of_relu(p):
    return jnp.sum(jax.nn.relu(hidden(p)) ** 1.5 * jnp.cos(p["b"]))


def logarithm_of_relu(p):
    z = jax.nn.relu(hidden(p) - 0.11)
    return jnp.sum(jnp.where(z > 0, jnp.log(z) ** 2, 0) * p["b"])


def in_a_scan(p):
    def body(carry, x):
        z = jnp.sin(x @ p["w"] + carry)
        return jnp.sqrt(jax.nn.relu(z)), jax.nn.relu(z) ** 1.5

    carry, ys = lax.scan(body, p["b"], X.astype(p["w"].dtype))
    return jnp.sum(carry**2) + jnp.sum(jnp.sin(ys))


def zeros_in_the_data(p):
    x = np.abs(X).astype(p["w"].dtype)
    return jnp.sum((x @ jnp.exp(p["w"])) ** 1.5 * p["b"])


LOSSES = {
    loss.__name__: loss
    for loss in [
        pairwise_distances,
        distances_by_products,
        padded_norms,
        padded_norms_by_einsum,
        padded_products,
        inside_a_cond,
        root_of_relu,
        power_of_relu,
        logarithm_of_relu,
        in_a_scan,
        zeros_in_the_data,
    ]
}

# jax itself multiplies zero by infinity where it differentiates these gradients.
BEYOND_JAX = {
    distances_by_products,
    padded_norms,
    padded_norms_by_einsum,
    padded_products,
    root_of_relu,
    power_of_relu,
    in_a_scan,
    zeros_in_the_data,
}


@pytest.mark.parametrize("name", some(LOSSES, default=["root_of_relu"]))
def test_a_mask_keeps_infinity_out(name):
    loss = LOSSES[name]
    assert_is_derivative_of_gradient(loss, params, "adjoint", rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [x for x in LOSSES.values() if x not in BEYOND_JAX])
def test_the_reference_agrees_where_jax_does(loss):
    assert_is_derivative_of_gradient(loss, params, "jvp_of_grad", rtol=1e-5)


@pytest.mark.parametrize("engine", some(sorted(ENGINES), default=["adjoint"]))
@pytest.mark.parametrize(
    "loss",
    [
        lambda p: jnp.sum(jnp.sqrt(jnp.where(DIAGONAL[0, :2], p["x"], 0))),
        lambda p: jnp.sqrt(jnp.sum(p["x"] ** 2)),
        lambda p: jnp.sum(jnp.abs(p["x"]) ** 1.5),
    ],
)
def test_an_infinity_that_reaches_the_loss_is_not_hidden(loss, engine):
    p = {"x": jnp.zeros(2), "y": jnp.ones(2)}
    u = {"x": jnp.ones(2), "y": jnp.ones(2)}
    summary = pn.summarize(loss, p, u, engine=engine)
    assert not np.isfinite(summary.hessian[0, 0])


def gamma(p):
    """Black pixels: the third derivative of x^2.2 at 0 is infinite."""
    pixels = jnp.array([0.0, 0.3, 0.8]) + jnp.stack([p["x"], 0.5 * p["x"], p["x"]])
    return jnp.sum(pixels**2.2 * jnp.exp(p["y"])) + jnp.sin(p["z"] * p["y"])


def test_only_subsets_that_reach_an_infinity_have_an_infinite_third_derivative():
    p = {"x": jnp.array(0.0), "y": jnp.array(0.3), "z": jnp.array(0.7)}
    u = {"x": jnp.array(1.0), "y": jnp.array(0.5), "z": jnp.array(-1.0)}
    summary = quick_jit(functools.partial(pn.summarize, gamma, engine="adjoint"))(p, u)
    assert np.isfinite(summary.third).tolist() == [False, True, True]
    for x in (summary.value, summary.gradient, summary.hessian):
        assert np.all(np.isfinite(x))

    def along_y(t):
        return gamma({**p, "y": p["y"] + t * u["y"]})

    expected = jax.jvp(jax.grad(jax.grad(along_y)), (0.0,), (1.0,))[1]
    np.testing.assert_allclose(summary.third[1], expected, rtol=1e-5)


def attention(p):
    scores = hidden(p) @ hidden(p).T
    scores = jnp.where(np.tril(np.ones((4, 4), bool)), scores, -1e9)
    values = jax.nn.softmax(scores) @ hidden(p)
    centred = values - jnp.mean(values, 1, keepdims=True)
    variance = jnp.mean(centred**2, 1, keepdims=True)
    normed = jax.nn.gelu(centred / jnp.sqrt(variance + 1e-5)) @ p["w"].T
    return jnp.mean(jax.nn.logsumexp(normed, 1))


def test_common_networks_need_no_guards():
    """Which would cost them time."""
    program, _ = program_of(compat.traced(attention, params())[1])
    guarded = [op for op in program.ops if op.is_guarded and op.rule is ELEMENTWISE]
    assert not guarded
    summary = quick_jit(functools.partial(pn.summarize, attention))
    p = params()
    assert np.all(np.isfinite(summary(p, direction_of(p)).third))


def recurrent(p, last):
    """`last` of the final state of a loop, whose state is zero at the beginning."""

    def step(h, x):
        return jnp.tanh(x @ p["w"] + h * p["b"]), None

    h, _ = lax.scan(step, jnp.zeros(3, p["w"].dtype), X.astype(p["w"].dtype))
    return last(h)


def guarded_in_loops(loss):
    program, _ = program_of(compat.traced(loss, params())[1])
    bodies = [op.loop.body for op in program.ops if op.loop]
    return [op for body in bodies for op in body.ops if op.is_guarded]


def test_a_loop_needs_guards_only_if_its_results_have_infinite_cotangents():
    def harmless(h):
        return jnp.sum(h**2)

    def masked_root(h):
        return jnp.sum(jnp.sqrt(jnp.where(h > 0, h, 0)))

    assert not guarded_in_loops(lambda p: recurrent(p, harmless))
    assert guarded_in_loops(lambda p: recurrent(p, masked_root))


def root_of_the_state(p, is_first_unrolled=False):
    """The root is singular at the initial state, which no parameter changes."""
    x = X.astype(p["w"].dtype)

    def added(x):
        return (x @ p["w"]) ** 2 + 0.1

    def step(h, x):
        return jnp.sqrt(h) * p["b"] ** 2 + added(x), None

    h = jnp.zeros(3, x.dtype)
    if is_first_unrolled:
        h, x = added(x[0]), x[1:]
    return jnp.sum(lax.scan(step, h, x)[0])


@pytest.mark.slow
def test_a_root_of_the_constant_initial_state_of_a_loop():
    """In the first iteration, its derivative is infinite, and its tangent zero."""
    p = params()
    along = direction_of(p)
    found = pn.summarize(root_of_the_state, p, along, engine="adjoint")
    regular = functools.partial(root_of_the_state, is_first_unrolled=True)
    expected = pn.summarize(regular, p, along, engine="jvp_of_grad")
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
