"""Updates outside of jit: compiled once for each program of a loss, never wrong."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partnewton as pn
from partnewton._eager import compiled_direction, compiled_when_eager
from partnewton.directions import orthogonal_momentum

X = jnp.array([0.3, -0.8, 1.1])
_lowered = []


def _listen(event, duration, **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _lowered.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations(most):
    before = len(_lowered)
    yield
    assert len(_lowered) - before <= most


def gradient(updates, state, params, *, value_fn, **extra_args):
    """An update function that is quick to compile."""
    del updates, extra_args
    return jax.grad(value_fn)(params), state


def third(updates, state, params, *, value_fn, **extra_args):
    """The derivatives of third order along ones."""
    del updates, extra_args
    for _ in range(2):
        value_fn = functools.partial(_slope, value_fn)
    return jax.grad(value_fn)(params), state


def _slope(fn, params):
    return jax.jvp(fn, (params,), (jnp.ones_like(params),))[1]


def eager(update_fn=gradient, **kwargs):
    update = compiled_when_eager(update_fn, **kwargs)

    def call(value_fn, params=X, **extra_args):
        actual = update(params, (), params, value_fn=value_fn, **extra_args)[0]
        plain = update_fn(params, (), params, value_fn=value_fn)[0]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), actual, plain
        )
        return actual

    return call


def twice(make, update_fn=gradient, most=0, number=jnp.float32):
    """Two losses, of which the second compiles no more than `most` programs."""
    update = compiled_when_eager(update_fn)
    for value, allowed in ((2.0, 10**9), (3.0, most)):
        value_fn = make(number(value))
        with compilations(allowed):
            actual, _ = update(X, (), X, value_fn=value_fn)
        expected, _ = update_fn(X, (), X, value_fn=value_fn)
        # The slope of a saturated tanh, 1 - tanh^2, has an error of a few eps.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        yield actual


# --- what is compiled once ---------------------------------------------------------


def rectified(scale):
    return lambda x: jnp.sum(jax.nn.relu(scale * x) ** 4)


def scanned(scale):
    def body(carry, x):
        return carry + scale * x, jnp.sin(carry * x)

    return lambda x: jnp.sum(jax.lax.scan(body, scale, x)[1])


def chosen(scale):
    return lambda x: jax.lax.cond(x[0] > 0, jnp.sum, jnp.prod, scale * x**3)


def rematerialised(scale):
    return jax.checkpoint(lambda x: jnp.sum(jnp.tanh(scale * x)))


def straight_through(scale):
    return lambda x: jnp.sum(scale * _rounded(x) ** 3)


@jax.custom_vjp
def _rounded(x):
    return jnp.round(4 * x) / 4


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (jnp.clip(g, -1, 1),))


def dropped_out(scale):
    key = jax.random.key(scale.astype(int))
    return lambda x: jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, (3,)), x**2, 0))


@jax.jit
@jax.custom_jvp
def _softened(x):
    return jnp.tanh(x)


_softened.__wrapped__.defjvp(
    lambda primals, tangents: (
        jnp.tanh(primals[0]),
        (1 - jnp.tanh(primals[0]) ** 2) * tangents[0],
    ),
    symbolic_zeros=True,
)


def of_a_jitted_function(scale):
    return lambda x: jnp.sum(_softened(scale * x))


@pytest.mark.parametrize(
    "make",
    [
        rectified,
        scanned,
        chosen,
        rematerialised,
        straight_through,
        dropped_out,
        of_a_jitted_function,
    ],
)
def test_a_closure_over_another_array_does_not_recompile(make):
    first, second = twice(make)
    assert not np.allclose(first, second)


def test_the_third_order_through_rules_is_compiled_once():
    first, second = twice(rectified, third)
    assert not np.allclose(first, second)


def test_arguments_by_keyword_do_not_recompile():
    def loss(x, batch):
        return jnp.sum(batch["scale"] * jnp.sin(x * batch["power"]))

    update = compiled_when_eager(gradient)
    for scale, power, most in ((2.0, 1, 10**9), (3.0, 1, 0), (3.0, 2, 9)):
        batch = {"scale": np.full(3, scale, np.float32), "power": power}
        with compilations(most):
            actual, _ = update(X, (), X, value_fn=loss, batch=batch, other=object())
        np.testing.assert_allclose(actual, scale * power * np.cos(X * power), rtol=1e-5)


def test_what_is_rebound_is_read_again():
    scale, offset = jnp.float32(2), 0.0
    data = np.ones(3, np.float32)

    def loss(x):
        return jnp.sum(scale * x**2 * data) + offset * jnp.sum(x)

    update = compiled_when_eager(gradient)

    def check(most):
        with compilations(most):
            actual, _ = update(X, (), X, value_fn=loss)
        np.testing.assert_allclose(actual, 2 * scale * X * data + offset, rtol=1e-5)

    check(10**9)
    scale = jnp.float32(3)
    check(0)
    data[1] = 5.0
    check(0)
    offset = 0.5  # a number of Python is part of the program
    check(9)
    offset = 0.0
    check(0)


def test_steps_of_the_transformations_compile_once():
    def loss(params, x):
        return jnp.mean(jax.nn.relu(params["w"] @ x) ** 2 + params["w"] ** 2)

    params = {"w": jnp.array([[1.0, 2.0]])}
    tx = optax.chain(
        pn.scale_by_partition_newton(pn.rules.newton()),
        pn.scale_by_lookback(update_interval=1),
        optax.scale(-0.1),
    )
    state = tx.init(params)
    for i in range(3):
        x = jnp.array([1.0, i])
        grads = jax.grad(loss)(params, x)
        with compilations(0 if i else 10**9):
            updates, state = tx.update(
                grads, state, params, value_fn=lambda p, x=x: loss(p, x)
            )
        _, image = jax.jvp(functools.partial(jax.grad(loss), x=x), (params,), (grads,))
        rate = jnp.sum(grads["w"] ** 2) / jnp.sum(grads["w"] * image["w"])
        np.testing.assert_allclose(state[0].learning_rates, [rate], rtol=1e-5)
        np.testing.assert_allclose(
            updates["w"], -0.1 * state[1].factor * rate * grads["w"], rtol=1e-5
        )
        params = optax.apply_updates(params, updates)
    assert state[1].factor != 1


def test_the_default_direction_compiles_once():
    direction = compiled_direction(orthogonal_momentum())
    updates = {"w": jnp.eye(3)}
    state = direction.init(updates)
    for i in range(2):
        with compilations(0 if i else 10**9):
            _, state = direction.update(updates, state, updates)


# --- what differs ------------------------------------------------------------------


def with_rule(factor):
    """Equal values, different derivatives."""

    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvps(lambda t, _, x: factor * x * t)
    return lambda x: jnp.sum(square(x))


def with_backward_rule(factor):
    @jax.custom_vjp
    def identity(x):
        return 1.0 * x

    identity.defvjp(lambda x: (x, None), lambda _, g: (factor * g,))
    return lambda x: jnp.sum(identity(x) ** 2)


def with_rule_of_rule(factor):
    """Equal values and slopes, different derivatives of second order."""

    @jax.custom_jvp
    def slope(x):
        return jnp.cos(x)

    @jax.custom_jvp
    def wave(x):
        return jnp.sin(x)

    slope.defjvps(lambda t, _, x: factor * t * x**3)
    wave.defjvps(lambda t, _, x: slope(x) * t)
    return lambda x: jnp.sum(wave(x))


def in_a_jit(factor):
    return jax.jit(lambda x: factor * jnp.sum(x**2))


def in_a_loop(factor):
    def body(i, x):
        return jnp.sin(x) if factor == 2 else jnp.cos(x)

    return lambda x: jnp.sum(jax.lax.fori_loop(0, 3, body, x))


def in_a_literal(factor):
    number = float(factor) - 2  # 0.0, 1.0
    return lambda x: jnp.sum(jnp.arctan2(number * x, x - 1)) + number


def in_an_axis(factor):
    return lambda x: jnp.sum(jnp.roll(x, int(factor)) * x**2)


def with_a_large_constant(factor):
    return jax.jit(lambda x: jnp.sum(x * np.full(3, factor, np.float32)))


@pytest.mark.parametrize("update_fn", [gradient, third])
@pytest.mark.parametrize(
    "make",
    [
        with_rule,
        with_backward_rule,
        with_rule_of_rule,
        in_a_jit,
        in_a_loop,
        in_a_literal,
        in_an_axis,
        with_a_large_constant,
    ],
)
def test_other_code_with_equal_shapes_gives_its_own_numbers(make, update_fn):
    if make is with_backward_rule and update_fn is third:
        update_fn = gradient  # forward mode is not defined
    list(twice(make, update_fn, most=10**9, number=float))


def test_the_sign_of_zero_is_part_of_a_program():
    call = eager()
    for zero in (0.0, -0.0):
        call(lambda x, zero=zero: jnp.sum(jnp.arctan2(zero, x - 2) * x))
    plus, minus = (
        call(lambda x, zero=zero: jnp.sum(jnp.arctan2(zero, x - 2) * x))
        for zero in (0.0, -0.0)
    )
    np.testing.assert_allclose(plus, -minus)
    assert plus[0] > 3


def test_side_effects_happen_at_each_step():
    seen = []

    def loss(x):
        jax.debug.callback(lambda value: seen.append(float(value)), jnp.sum(x))
        return jnp.sum(x**2)

    update = compiled_when_eager(gradient)
    for _ in range(2):
        update(X, (), X, value_fn=loss)
    jax.effects_barrier()
    assert len(seen) == 2


# --- what is left as it is ---------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        pn.scale_by_partition_newton(pn.rules.newton()),
        pn.scale_by_lookback(),
    ],
    ids=["rates", "lookback"],
)
def test_inside_a_trace_the_program_is_that_of_the_plain_update(tx):
    params = {"w": jnp.ones(2)}
    state = tx.init(params)

    def traced(update):
        def step(params, state):
            loss = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
            return update(jax.grad(loss)(params), state, params, value_fn=loss)

        return str(jax.make_jaxpr(step)(params, state))

    assert traced(tx.update) == traced(tx.update.__wrapped__)


def test_a_loss_over_what_an_outer_function_traces():
    update = compiled_when_eager(gradient)

    @jax.jit
    def outer(scale):
        return update(X, (), X, value_fn=lambda x: jnp.sum(scale * x**2))[0]

    np.testing.assert_allclose(outer(3.0), 6 * X, rtol=1e-6)
    slope = jax.grad(lambda scale: jnp.sum(outer.__wrapped__(scale)))(3.0)
    np.testing.assert_allclose(slope, 2 * jnp.sum(X), rtol=1e-6)


def test_errors_are_those_of_the_update_function():
    tx = pn.scale_by_partition_newton()
    state = tx.init(X)
    with pytest.raises(ZeroDivisionError):
        tx.update(X, state, X, value_fn=lambda x: jnp.sum(x) * (1 // 0))
    with pytest.raises(ValueError, match=r"scalar loss, got shape \(3,\)"):
        tx.update(X, state, X, value_fn=lambda x: x)
    with pytest.raises(TypeError, match="has_aux=True"):
        tx.update(X, state, X, value_fn=lambda x: (jnp.sum(x), 1))
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(X, state, X)


def test_aux_may_be_anything():
    update = compiled_when_eager(
        lambda u, s, p, value_fn: (jax.grad(value_fn, has_aux=True)(p)[0], s), True
    )
    aux = [object(), "text"]
    actual, _ = update(X, (), X, value_fn=lambda x: (jnp.sum(x**2), (aux, x)))
    np.testing.assert_allclose(actual, 2 * X, rtol=1e-6)


def test_parameters_of_any_kind():
    frozen = pn.partitions.FROZEN
    params = {
        "a": np.ones(2, np.float32),
        "number": 2.0,
        "none": None,
        "codes": jnp.arange(3, dtype=jnp.int8),
        "key": jax.random.key(0),
    }
    labels = {"a": "a", "number": "n", "none": None, "codes": frozen, "key": frozen}
    tx = pn.scale_by_partition_newton(pn.rules.newton(), param_labels=labels)
    grads = params | {"codes": np.zeros(3, jax.dtypes.float0)}
    state = tx.init(params)

    def loss(params):
        keep = jax.random.bernoulli(params["key"], 1.0, (2,))
        return jnp.sum(params["a"] ** 2 * keep) + params["number"] ** 2

    for most in (10**9, 0):
        with compilations(most):
            updates, state = tx.update(grads, state, params, value_fn=loss)
    np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(updates["number"], 2.0, rtol=1e-6)
