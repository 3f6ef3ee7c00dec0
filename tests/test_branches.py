"""A `cond` around most of a loss: each branch is a program of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines.adjoint.graph import branch_point_of

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=4), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=4), jnp.float32),
}


def network(p, x, activation):
    hidden = activation(x @ p["w"] + p["b"])
    normed = hidden / jnp.sqrt(1.0 + jnp.sum(hidden**2, -1, keepdims=True))
    return jnp.mean(jnp.logaddexp(normed @ p["v"], 0.1 * jnp.sum(hidden, -1)))


def training(p):
    return network(p, X, jnp.tanh)


def evaluation(p):
    return 2.0 * network(p, 0.5 * X, jax.nn.gelu)


def branching(p, flag):
    return jax.lax.cond(flag, training, evaluation, p)


def jitted(p, flag):
    return jax.jit(branching)(p, flag) + 0.1 * jnp.sum(p["v"] ** 3)


def by_the_parameters(p, flag):
    return jax.lax.cond(flag & (p["b"][0] < 1e3), training, evaluation, p)


def one_of_three(p, flag):
    index = jnp.where(flag, 0, 2)
    return jax.lax.switch(index, [training, lambda p: p["v"][0], evaluation], p)


def nested(p, flag):
    def inside(p):
        return 1.0 + jax.lax.cond(~flag, evaluation, training, p)

    return jax.lax.cond(flag, inside, lambda p: inside(p) - 1.0, p)


LOSSES = [branching, jitted, by_the_parameters, one_of_three, nested]


def phi(loss, flag, eta):
    moved = {
        k: p - eta[s] * PARAMS[k] for s, (k, p) in enumerate(sorted(PARAMS.items()))
    }
    return loss(moved, flag)


def derivatives(f, x, e, order):
    """The derivative of some order along e."""
    for _ in range(order):
        f = functools.partial(lambda f, x: jax.jvp(f, (x,), (e,))[1], f)
    return f(x)


@pytest.mark.parametrize(
    "loss", some(LOSSES, default=[by_the_parameters]), ids=lambda f: f.__name__
)
def test_a_summary_is_that_of_the_branch_that_is_taken(loss):
    @quick_jit
    def found(flag):
        return pn.summarize(lambda q: loss(q, flag), PARAMS, PARAMS, engine="adjoint")

    @quick_jit
    def expected(flag):
        f, zero = functools.partial(phi, loss, flag), jnp.zeros(3)
        third = jax.vmap(lambda e: derivatives(f, zero, e, 3))(jnp.eye(3))
        gradient, hessian = jax.grad(f)(zero), jax.hessian(f)(zero)
        return f(zero), -gradient, hessian, -third

    for flag in (True, False):
        for ours, theirs in zip(found(flag), expected(flag), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_aux_comes_from_the_branch_that_is_taken():
    def loss(p, flag):
        value, aux = jax.lax.cond(
            flag,
            lambda p: (training(p), jnp.ones(2)),
            lambda p: (evaluation(p), jnp.zeros(2)),
            p,
        )
        return value, {"array": aux, "text": "kept"}

    def find(p, flag):
        summary, aux = pn.summarize(
            lambda q: loss(q, flag), p, p, engine="adjoint", has_aux=True
        )
        assert aux.pop("text") == "kept"
        return summary, aux

    for flag in (True, False):
        _, aux = quick_jit(find)(PARAMS, jnp.array(flag))
        np.testing.assert_array_equal(aux["array"], float(flag))


def points(loss):
    jaxpr = jax.make_jaxpr(lambda p: loss(p, jnp.array(True)))(PARAMS)
    return branch_point_of(jaxpr)


def test_programs_do_not_multiply():
    """Many branches one after the other stay steps of one program."""

    def layers(p, flag):
        total = 0.0
        for n in range(3):
            total += jax.lax.cond(flag, training, evaluation, p) * n
        return total

    def small(p, flag):
        return training(p) * jax.lax.cond(flag, lambda x: x, lambda x: 2 * x, p["v"][0])

    assert points(branching).branches == (1,)  # it is known already
    assert points(one_of_three).branches == (0, 1, 2)
    assert points(layers) is None
    assert points(small) is None
