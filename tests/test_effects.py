"""Losses with effects and named axes: nothing is ignored, nothing happens twice."""

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
from partnewton.engines import ENGINES

each_engine = pytest.mark.parametrize(
    "engine", some(sorted(ENGINES), default=["adjoint"])
)


def params() -> dict[str, jax.Array]:
    return {"b": jnp.array(0.5), "w": jnp.array([0.3, 0.7, 0.4])}


def column_by_column(p):
    hidden = jax.new_ref(jnp.zeros_like(p["w"]))
    for i in range(3):
        hidden[i] = jnp.sin(p["w"][i] * p["b"])
    return jnp.sum(jnp.exp(hidden[...]) * p["w"])


def summed_in_a_scan(p):
    total = jax.new_ref(jnp.zeros_like(p["w"]))
    slope = jnp.tanh(p["w"] * p["b"])

    def body(carry, x):
        total[...] += x * slope
        return carry, None

    lax.scan(body, None, jnp.sin(p["w"]))
    return jnp.sum(total[...] ** 3)


def created_in_a_scan(p):
    def body(carry, x):
        state = jax.new_ref(jnp.zeros_like(x))
        state[...] = jnp.sin(carry * x)
        state[...] += p["b"]
        return carry + state[...], None

    return lax.scan(body, 0.1 * p["b"], jnp.sin(p["w"]))[0] ** 2


def handed_to_a_function(p):
    @jax.jit
    def store(state, i, x):
        state[i] = jnp.sin(x) * state[i - 1]

    state = jax.new_ref(jnp.ones(4, p["w"].dtype))
    for i in range(1, 4):
        store(state, i, p["w"][i - 1] * p["b"])
    return jnp.sum(state[...]) ** 2 + jnp.sum(p["w"] ** 3)


def counter(p):
    count = jax.new_ref(np.zeros((), np.int32))
    x = jnp.sin(p["w"] * p["b"])
    count[...] += 2
    return jnp.sum(x ** count[...])


@each_engine
@pytest.mark.parametrize(
    "loss",
    some(
        [
            column_by_column,
            summed_in_a_scan,
            created_in_a_scan,
            handed_to_a_function,
            counter,
        ],
        default=[created_in_a_scan],
    ),
)
def test_what_flows_through_a_mutable_array_counts(loss, engine):
    assert_is_derivative_of_gradient(loss, params, engine)


def test_a_mutable_array_from_outside_is_written_once():
    count = jax.new_ref(jnp.zeros(()))

    def loss(p):
        count[...] += 1
        return column_by_column(p) + jnp.sum(p["w"] ** 2)

    quick_jit(functools.partial(pn.summarize, loss, engine="adjoint"))(
        params(), params()
    )
    assert count[...] == 1


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


@pytest.mark.parametrize("function", [jnp.sin, clipped])
def test_ordered_callbacks_run_once_and_in_order(function):
    met = []

    def loss(p):
        x = jnp.sin(p["w"] * p["b"])
        jax.debug.callback(lambda _: met.append("before"), x, ordered=True)
        y = function(x)
        jax.debug.callback(lambda _: met.append("after"), y, ordered=True)
        return jnp.sum(y**2)

    compute = functools.partial(pn.summarize, loss, engine="adjoint")
    jax.block_until_ready(jax.jit(compute)(params(), params()))
    jax.effects_barrier()
    assert met == ["before", "after"]


# --- Named axes ----------------------------------------------------------------------

XS = np.array([[0.4, -1.1, 0.2], [0.9, 0.3, -0.4], [-0.5, 0.7, 1.0]], np.float32)


def mean_over_lanes(p, x):
    return lax.pmean(jnp.sum(jnp.sin(p["w"] * x * p["b"])), "batch")


def sum_inside(p, x):
    return jnp.sum(jnp.sin(lax.psum(p["w"] * x, "batch")))


def gathered(p, x):
    return jnp.sum(jnp.sin(lax.all_gather(p["w"] * x, "batch")))


@each_engine
@pytest.mark.parametrize("loss", [mean_over_lanes, sum_inside, gathered])
def test_a_collective_over_a_vmapped_axis_raises(loss, engine):
    def lane(x):
        return pn.summarize(lambda p: loss(p, x), params(), params(), engine=engine)

    with pytest.raises(ValueError, match=r"over 'batch', the axis_name of a vmap"):
        jax.vmap(lane, axis_name="batch")(XS)


def batch_norm(p):
    def lane(x):
        z = jnp.sin(p["w"] * x)
        z = z - lax.pmean(z, "batch")
        return jnp.sum(z * lax.rsqrt(lax.pmean(z**2, "batch") + 1e-2) ** 2 * p["b"])

    return jnp.mean(jax.vmap(lane, axis_name="batch")(XS.astype(p["w"].dtype)) ** 2)


@each_engine
def test_a_collective_over_an_axis_inside_is_not(engine):
    assert_is_derivative_of_gradient(batch_norm, params, engine, rtol=1e-5)


@each_engine
def test_a_vmap_with_an_axis_name_but_no_collective_works(engine):
    def lane(x):
        p = {"b": params()["b"], "w": x}
        return pn.summarize(column_by_column, p, direction_of(p), engine=engine)

    found = quick_jit(jax.vmap(lane, axis_name="batch"))(XS)
    assert found.hessian.shape == (3, 2, 2)


# --- Strict modes --------------------------------------------------------------------


@pytest.mark.slow
@each_engine
def test_all_strict_modes_at_once(engine):
    def loss(p):
        x = jnp.tanh(p["w"][:, None] * p["w"][None] * p["b"])
        x, _ = lax.scan(lambda c, y: (jnp.sin(c * y), None), p["w"], x)
        kept = jnp.where(np.array([True, False, True]), x, jnp.zeros_like(x))
        return jnp.sum(jax.nn.softmax(clipped(kept)) ** 2) + jnp.sum(jax.nn.gelu(x))

    def both(p, u):
        return (
            pn.summarize(loss, p, u, engine=engine),
            pn.derivative_tensors(loss, p, u, engine=engine),
        )

    expected, _ = quick_jit(both)(params(), direction_of(params()))
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.enable_checks(True),
    ):
        p = params()
        found, _ = quick_jit(lambda *x: both(*x))(p, direction_of(p))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
