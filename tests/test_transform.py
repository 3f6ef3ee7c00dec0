"""What the transformation does to updates, what it refuses, and what it remembers."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.selection import some
from support.states import newton_state

import partnewton as pn
from partnewton import averaging, partitions, rules
from partnewton._refresh import default_refreshes

PARAMS = {
    "dense": {"bias": jnp.array([0.5, -1.0]), "kernel": jnp.array([[1.0, 2.0]])},
    "scale": jnp.array(1.5, jnp.float32),
}
NAMES = ("dense/bias", "dense/kernel", "scale")


def loss(params, x=1.0):
    """Strictly convex: three leaves that interact, a third order, and one minimum."""
    dense = params["dense"]
    y = x * dense["kernel"][0] + dense["bias"] - 0.5 * params["scale"]
    norm = optax.tree.norm(params, squared=True)
    return jnp.sum((y - 0.3) ** 2 + 0.02 * y**4) + norm


@functools.partial(jax.jit, static_argnames=("tx", "value_fn"))
def update(tx, direction, state, params, value_fn=loss, **extra):
    """What `tx` makes of a direction: updates and state."""
    return tx.update(direction, state, params, value_fn=value_fn, **extra)


@functools.partial(jax.jit, static_argnames=("tx", "value_fn"))
def step(tx, params, state, value_fn=loss, direction=None, **extra):
    """One step with the gradient, or with another direction: params and state.

    The step is added: an optimizer, unlike this transformation alone, changes the sign.
    """
    if direction is None:
        direction = jax.grad(value_fn)(params)
    updates, state = tx.update(direction, state, params, value_fn=value_fn, **extra)
    return optax.apply_updates(params, updates), state


def scale_by_newton(**kwargs):
    return pn.scale_by_partition_newton(rules.newton(), **kwargs)


def paper(learning_rate=1.0, update_interval=1, **kwargs):
    """The published method for full batches, momentum and sign included."""
    return pn.paper_newton(learning_rate, update_interval=update_interval, **kwargs)


def newton_descent(**kwargs):
    """Newton's method along the gradient."""
    return paper(momentum=0.0, rule=rules.newton(), **kwargs)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
        actual,
        expected,
    )


# --- what an update is -----------------------------------------------------------


def test_each_subset_of_the_updates_is_multiplied_by_its_rate_without_change_of_sign():
    tx = pn.scale_by_partition_newton(rules.newton(nonnegative=False))
    grads = jax.grad(loss)(PARAMS)
    updates, state = update(tx, grads, tx.init(PARAMS), PARAMS)
    summary = pn.summarize(loss, PARAMS, grads)
    eta = np.linalg.solve(summary.hessian, summary.gradient)
    rates = iter(eta)
    assert_close(updates, jax.tree.map(lambda u: u * next(rates), grads), rtol=1e-3)
    np.testing.assert_allclose(state.learning_rates, eta, rtol=1e-3)


@pytest.mark.slow
def test_the_preset_is_a_chain_of_momentum_newton_and_learning_rate():
    preset = paper(0.3, momentum=0.5, rule=rules.newton())
    chain = optax.chain(
        optax.ema(0.5),
        scale_by_newton(),
        optax.scale_by_learning_rate(0.3),
    )
    ours, theirs = PARAMS, PARAMS
    state, other = preset.init(PARAMS), chain.init(PARAMS)
    for _ in range(3):
        ours, state = step(preset, ours, state)
        theirs, other = step(chain, theirs, other)
        assert_close(ours, theirs, rtol=1e-4)
    assert loss(ours) < loss(PARAMS)


@pytest.mark.slow
def test_the_preset_has_the_arguments_of_the_transformation():
    inner = inspect.signature(pn.scale_by_partition_newton).parameters
    preset = inspect.signature(pn.paper_newton).parameters
    assert set(preset) == {*inner, "learning_rate", "momentum"}
    for name in set(inner) - {"update_interval"}:
        assert preset[name].default == inner[name].default
    rates = set()
    for kwargs in (
        {},
        {"rule": rules.diagonal()},
        {"param_labels": partitions.whole},
        {"update_interval": 2},
        {"average": averaging.exponential()},
    ):
        kwargs = {"rule": rules.newton(), **kwargs}
        tx = paper(momentum=0.0, **kwargs)
        chain = pn.scale_by_partition_newton(**kwargs)
        chain = optax.chain(chain, optax.scale(-1.0))
        ours, theirs = PARAMS, PARAMS
        state, other = tx.init(PARAMS), chain.init(PARAMS)
        for _ in range(2):
            ours, state = step(tx, ours, state)
            theirs, other = step(chain, theirs, other)
        assert_close(ours, theirs)
        rates.add(tuple(newton_state(state).learning_rates.tolist()))
    assert len(rates) == 5  # each of them changes something


@pytest.mark.slow
def test_the_default_rule_is_cubic_with_damping_one():
    default, named = pn.scale_by_partition_newton(), None
    named = pn.scale_by_partition_newton(rules.cubic(1.0))
    other = pn.scale_by_partition_newton(rules.cubic(30.0))
    ours, theirs, third = (
        step(tx, PARAMS, tx.init(PARAMS))[0] for tx in (default, named, other)
    )
    assert_same(ours, theirs)
    with pytest.raises(AssertionError):
        assert_close(ours, third)


@pytest.mark.slow
def test_one_subset_takes_the_step_of_cauchy():
    tx = scale_by_newton(param_labels=partitions.whole)
    grads = jax.grad(loss)(PARAMS)
    _, state = update(tx, grads, tx.init(PARAMS), PARAMS)
    _, hvp = jax.jvp(jax.grad(loss), (PARAMS,), (grads,))
    cauchy = optax.tree.norm(grads, squared=True) / optax.tree.vdot(grads, hvp)
    np.testing.assert_allclose(state.learning_rates, [cauchy], rtol=1e-4)


def test_one_subset_an_entry_takes_the_step_of_newton():
    def quadratic(x):
        hessian = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
        return 0.5 * (x - 1) @ hessian @ (x - 1)

    tx = optax.chain(
        pn.scale_by_partition_newton(
            rules.newton(nonnegative=False), param_labels=partitions.per_element
        ),
        optax.scale(-1.0),
    )
    params = jnp.array([4.0, -2.0, 0.5])
    params, _ = step(tx, params, tx.init(params), quadratic)
    np.testing.assert_allclose(params, np.ones(3), rtol=1e-4)


@pytest.mark.slow
def test_the_state_carries_what_was_measured_and_predicted():
    tx = pn.scale_by_partition_newton()
    grads = jax.grad(loss)(PARAMS)
    _, state = update(tx, grads, tx.init(PARAMS), PARAMS)
    summary = pn.summarize(loss, PARAMS, grads)
    proposal = rules.cubic()(summary)
    assert_close(state.summary, summary)
    np.testing.assert_allclose(state.learning_rates, proposal.learning_rates, rtol=1e-4)
    np.testing.assert_allclose(
        state.predicted_decrease, proposal.predicted_decrease, rtol=1e-4
    )
    assert state.status == proposal.status
    assert state.count == 1
    assert state.notfinite_count == 0


def test_the_first_field_of_the_state_is_the_count():
    assert pn.ScaleByPartitionNewtonState._fields[0] == "count"


@pytest.mark.slow
def test_newton_computes_no_third_order():
    @jax.custom_jvp
    def two(x):
        return jnp.full_like(x, 2.0)

    @two.defjvp
    def _(primals, tangents):
        raise NotImplementedError("a third derivative")

    @jax.custom_jvp
    def slope(x):
        return 2 * x

    @slope.defjvp
    def _(primals, tangents):
        return slope(*primals), two(*primals) * tangents[0]

    @jax.custom_jvp
    def square(x):
        return x * x

    @square.defjvp
    def _(primals, tangents):
        return square(*primals), slope(*primals) * tangents[0]

    def twice_differentiable(x):
        return jnp.sum(square(x))

    params = jnp.array([1.0, 2.0])
    tx = scale_by_newton()
    _, state = step(tx, params, tx.init(params), twice_differentiable)
    assert tx.init(params).third is None
    assert state.third is None
    assert state.summary.third is None
    np.testing.assert_allclose(state.learning_rates, [0.5])
    cubic = pn.scale_by_partition_newton(rules.cubic())
    with pytest.warns(UserWarning, match=r"without the third order.*third derivative"):
        _, state = step(cubic, params, cubic.init(params), twice_differentiable)
    np.testing.assert_array_equal(state.third, [0.0])
    np.testing.assert_allclose(state.learning_rates, [0.5])


def test_frozen_parameters_keep_their_values_whatever_their_gradients():
    params = {"w": jnp.ones(3), "fixed": jnp.ones(2), "step": jnp.array(7)}
    labels = {
        "w": np.array([0, 0, partitions.FROZEN]),
        "fixed": partitions.FROZEN,
        "step": partitions.FROZEN,
    }
    tx = pn.scale_by_partition_newton(param_labels=labels)
    direction = {
        "w": jnp.array([1.0, 1.0, jnp.nan]),
        "fixed": jnp.array([jnp.inf, 1.0]),
        "step": jnp.array(0),
    }
    updates, state = update(
        tx, direction, tx.init(params), params, lambda p: jnp.sum(p["w"] ** 4)
    )
    assert state.notfinite_count == 0
    assert updates["w"][0] > 0
    assert updates["w"][2] == 0
    np.testing.assert_array_equal(updates["fixed"], 0)
    assert updates["step"] == 0
    assert updates["step"].dtype == params["step"].dtype


def test_a_user_defined_rule_takes_ten_lines():
    def cauchy(summary):
        eta = jnp.sum(summary.gradient) / jnp.sum(summary.hessian)
        rates = jnp.full_like(summary.gradient, eta)
        return rules.Proposal(rates, 0.5 * eta * jnp.sum(summary.gradient))

    ours = pn.scale_by_partition_newton(rules.Rule(cauchy, third_order=False))
    theirs = scale_by_newton(param_labels=partitions.whole)
    assert_close(
        step(ours, PARAMS, ours.init(PARAMS))[0],
        step(theirs, PARAMS, theirs.init(PARAMS))[0],
    )


def test_the_rule_gets_the_averaged_summary():
    tx = scale_by_newton(average=averaging.exponential(0.5))
    state = tx.init(PARAMS)
    seen = []
    for x in (1.0, 2.0):
        _, state = step(tx, PARAMS, state, functools.partial(loss, x=x))
        seen.append(state.summary)
    mean = jax.tree.map(lambda a, b: (a + 2 * b) / 3, *seen)
    expected = rules.newton()(mean).learning_rates
    np.testing.assert_allclose(state.learning_rates, expected, rtol=1e-3)


# --- the loss and its arguments --------------------------------------------------


def test_arguments_of_the_loss_are_picked_by_its_signature():
    def value_fn(params, x, *, y=0.0):
        return jnp.sum((params * x - y) ** 2)

    params = jnp.array([1.0, 2.0])
    tx = scale_by_newton()
    grads = jax.grad(value_fn)(params, 2.0, y=1.0)
    _, state = tx.update(
        grads, tx.init(params), params, value_fn=value_fn, x=2.0, y=1.0, z="ignored"
    )
    np.testing.assert_allclose(state.loss, value_fn(params, 2.0, y=1.0))


@pytest.mark.slow
def test_value_and_grad_and_unknown_extra_arguments_are_ignored():
    tx = scale_by_newton()
    grads = jax.grad(loss)(PARAMS)
    plain = update(tx, grads, tx.init(PARAMS), PARAMS)
    more = update(
        tx, grads, tx.init(PARAMS), PARAMS, value=3.0, grad=grads, other={"a": ()}
    )
    assert_same(plain, more)


def test_params_may_be_given_by_name():
    tx = scale_by_newton()
    grads = jax.grad(loss)(PARAMS)
    assert_same(
        tx.update(grads, tx.init(PARAMS), params=PARAMS, value_fn=loss),
        tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss),
    )


def test_the_loss_may_have_aux():
    tx, with_aux = scale_by_newton(), scale_by_newton(has_aux=True)
    assert_same(
        step(tx, PARAMS, tx.init(PARAMS)),
        step(
            with_aux,
            PARAMS,
            with_aux.init(PARAMS),
            lambda p: (loss(p), "aux"),
            direction=jax.grad(loss)(PARAMS),
        ),
    )


# --- refreshing ------------------------------------------------------------------


def counting(losses):
    """The loss; each time that it runs, it adds to `losses`."""

    def value_fn(params):
        jax.debug.callback(lambda: losses.append(1))
        return loss(params)

    return value_fn


@pytest.mark.parametrize("jit", some([True, False], default=[True]))
def test_rates_are_refreshed_at_every_kth_update_and_kept_in_between(jit):
    calls = []
    value_fn = counting(calls)
    tx = scale_by_newton(update_interval=3)
    scale = functools.partial(tx.update, value_fn=value_fn)
    scale = jax.jit(scale) if jit else scale
    params, state = PARAMS, tx.init(PARAMS)
    rates, evaluated = [], []
    for _ in range(7):
        before = len(calls)
        updates, state = scale(jax.grad(loss)(params), state, params)
        jax.block_until_ready(updates)
        jax.effects_barrier()
        params = jax.tree.map(lambda p, u: p - 0.5 * u, params, updates)
        rates.append(tuple(np.asarray(state.learning_rates).tolist()))
        evaluated.append(len(calls) > before)
    assert evaluated == [True, False, False, True, False, False, True]
    assert rates[0] == rates[1] == rates[2] != rates[3] == rates[4] == rates[5]
    assert rates[6] != rates[5]
    assert state.count == 7


def test_between_refreshes_the_kept_rates_scale_the_newest_direction():
    tx = scale_by_newton(update_interval=2)
    _, state = step(tx, PARAMS, tx.init(PARAMS))
    direction = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)
    updates, after = update(tx, direction, state, PARAMS)
    rates = iter(state.learning_rates)
    assert_same(updates, jax.tree.map(lambda u: next(rates) * u, direction))
    assert_same(after, state._replace(count=after.count))


@pytest.mark.slow
def test_while_all_rates_are_zero_they_are_refreshed_at_each_update():
    """Nothing would move until the next refresh, however far that is."""

    def failing_at_first(params, bad):
        return loss(params) + jnp.where(bad, jnp.nan, 0.0)

    tx = paper(update_interval=100)
    params, state = PARAMS, tx.init(PARAMS)
    for bad in (True, False):
        grads = jax.grad(loss)(params)
        params, state = step(tx, params, state, failing_at_first, grads, bad=bad)
    assert newton_state(state).notfinite_count == 1
    assert loss(params) < loss(PARAMS)


def test_a_checkpoint_taken_in_the_middle_of_an_interval_continues_bit_for_bit():
    tx = paper(
        rule=rules.newton(), update_interval=3, average=averaging.exponential(0.5)
    )
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = step(tx, params, state)
    stored = pickle.dumps((params, state))
    restored = pickle.loads(stored)
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))
    for _ in range(4):
        params, state = step(tx, params, state)
        restored = step(tx, *restored)
        assert_same(restored, (params, state))


# --- what is refused -------------------------------------------------------------


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, rules.newton(), rules.diagonal()])
def test_at_the_exact_optimum_the_parameters_stay(rule):
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}

    def bowl(p):
        return jnp.sum(p["a"] ** 2) + p["b"] ** 2

    tx = paper(rule=rule)
    after, state = step(tx, params, tx.init(params), bowl)
    assert_same(after, params)
    assert newton_state(state).notfinite_count == 0
    # Displaced, the same state finds its way back.
    displaced = jax.tree.map(lambda x: x + 1.0, params)
    after, state = step(tx, displaced, tx.init(params), bowl)
    assert_close(after, params)


def test_a_subset_that_does_not_move_keeps_its_last_rate():
    tx = scale_by_newton()
    _, state = step(tx, PARAMS, tx.init(PARAMS))
    grads = jax.grad(loss)(PARAMS)
    partly = {**grads, "scale": jnp.zeros(())}
    _, after = update(tx, partly, state, PARAMS)
    assert after.learning_rates[2] == state.learning_rates[2] != 0
    assert after.learning_rates[0] != state.learning_rates[0]
    _, after = update(tx, zeros(grads), state, PARAMS)
    np.testing.assert_array_equal(after.learning_rates, state.learning_rates)
    assert after.notfinite_count == 0


BAD_LOSSES = {
    "nan": lambda p: loss(p) * jnp.nan,
    "infinite": lambda p: loss(p) + jnp.inf,
    "nan gradient": lambda p: loss(p) + jnp.sum(jnp.sqrt(0.0 * p["dense"]["bias"])),
    "infinite curvature": lambda p: loss(p) * 1e38,
}
AVERAGED = scale_by_newton(average=averaging.exponential(0.5))
BAD_NUMBERS = {"nan": jnp.nan, "infinite": jnp.inf, "minus infinite": -jnp.inf}


@pytest.mark.parametrize("bad", some(BAD_LOSSES, default=["nan", "infinite curvature"]))
def test_a_refresh_that_is_not_finite_keeps_the_last_good_rates(bad):
    tx = AVERAGED
    _, good = step(tx, PARAMS, tx.init(PARAMS))
    grads = jax.grad(loss)(PARAMS)
    updates, after = update(tx, grads, good, PARAMS, BAD_LOSSES[bad])
    assert after.notfinite_count == 1
    assert after.next_refresh == good.next_refresh <= after.count
    same = good._replace(count=after.count, notfinite_count=after.notfinite_count)
    assert_same(after, same)
    rates = iter(good.learning_rates)
    assert_same(updates, jax.tree.map(lambda u: next(rates) * u, grads))
    # The next good refresh is as if nothing had been between.
    _, healed = update(tx, grads, after, PARAMS)
    _, untouched = update(tx, grads, good, PARAMS)
    assert_same(
        healed._replace(count=0, notfinite_count=0, next_refresh=0),
        untouched._replace(count=0, notfinite_count=0, next_refresh=0),
    )


def test_learning_rates_that_are_not_finite_are_not_used():
    for name in ("learning_rates", "predicted_decrease"):

        def rule(summary, name=name):
            good = rules.Proposal(summary.gradient, jnp.ones(()))
            return good._replace(**{name: jnp.nan * getattr(good, name)})

        tx = pn.scale_by_partition_newton(rule)
        params, state = step(tx, PARAMS, tx.init(PARAMS))
        assert_same(params, PARAMS)
        assert state.notfinite_count == 1
        assert_same(state.learning_rates, jnp.zeros(3))


def test_an_average_that_overflows_is_not_kept():
    def sums():
        """A running sum: finite as long as it is not too long."""
        return averaging.Average(
            lambda zero: tuple(zero),
            lambda new, total: (
                new,
                jax.tree.map(lambda a, b: a + b, tuple(new), total),
            ),
        )

    tx = scale_by_newton(average=sums())
    params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
    huge = 1.5e38
    for _ in range(3):
        _, state = step(tx, params, state, lambda x: jnp.sum(x) * 0 + huge, params)
    assert state.notfinite_count == 1
    assert np.all(np.isfinite(state.average[0]))


@functools.cache
def published(interval):
    """The setting of the paper for mini-batches, and 300 steps of it."""
    tx = paper(0.3, update_interval=interval)

    def train(params, state):
        return jax.lax.fori_loop(0, 300, lambda _, x: step(tx, *x), (params, state))

    return tx, jax.jit(train)


@pytest.mark.parametrize("interval", some([1, 5], default=[5]))
@pytest.mark.parametrize("number", some(BAD_NUMBERS, default=["nan"]))
@pytest.mark.parametrize("when", some([0, 2], default=[2]))
def test_bad_gradients_never_reach_the_parameters(when, number, interval):
    tx, train = published(interval)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(when):
        params, state = step(tx, params, state, direction=jax.grad(loss)(params))
    grads = jax.grad(loss)(params)
    bias = grads["dense"]["bias"].at[1].set(BAD_NUMBERS[number])
    bad = {**grads, "dense": {**grads["dense"], "bias": bias}}
    after, state = step(tx, params, state, direction=bad)
    assert_same(after, params)
    assert newton_state(state).notfinite_count == 1
    # It is forgotten: the training arrives at the minimum.
    params, state = train(after, state)
    assert newton_state(state).notfinite_count == 1
    assert_close(jax.grad(loss)(params), zeros(params), rtol=0, atol=1e-4)


def test_a_gradient_that_is_not_finite_does_not_enter_the_momentum():
    tx = paper(rule=rules.newton())
    _, good = step(tx, PARAMS, tx.init(PARAMS))
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, after = step(tx, PARAMS, good, direction=bad)
    assert_same(after[0], good[0])


def test_the_momentum_is_the_average_of_optax():
    rng = np.random.default_rng(0)
    tx, ema = paper(momentum=0.8, rule=rules.newton()), optax.ema(0.8)
    state, other = tx.init(PARAMS), ema.init(PARAMS)
    for _ in range(4):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), PARAMS)
        _, state = step(tx, PARAMS, state, direction=grads)
        _, other = ema.update(grads, other)
        assert_close(state[0].ema, other.ema)


def test_momentum_zero_is_the_gradient_itself():
    tx = newton_descent()
    state = tx.init(PARAMS)
    for n in range(3):
        grads = jax.tree.map(lambda x, n=n: jnp.sin(x + n), PARAMS)
        _, state = step(tx, PARAMS, state, direction=grads)
        assert_same(state[0].ema, grads)


def test_updates_that_overflow_half_precision_are_zero_and_counted():
    params = {"w": jnp.ones(2, jnp.float16), "b": jnp.ones(2, jnp.float16)}

    def flat(p):  # so flat that the rate of w is beyond float16
        w, b = p["w"].astype(jnp.float32), p["b"].astype(jnp.float32)
        return jnp.sum(1e-6 * (w - 1e6) ** 2) + jnp.sum(b**2)

    def bowl(p):
        return jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2)

    tx = newton_descent()
    after, state = step(tx, params, tx.init(params), flat)
    assert_same(after, params)
    assert newton_state(state).notfinite_count == 1
    # The training goes on.
    after, state = step(tx, params, state, bowl)
    assert_same(after, zeros(params))
    assert newton_state(state).notfinite_count == 1


def test_a_bad_update_at_a_bad_refresh_counts_once():
    tx = scale_by_newton()
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    updates, state = update(tx, bad, tx.init(PARAMS), PARAMS)
    assert_same(updates, zeros(PARAMS))
    assert state.notfinite_count == 1


# --- errors ----------------------------------------------------------------------

LINK = pn.scale_by_partition_newton(rules.newton())


def update_of(tx, params, updates=None, value_fn=loss, jit=False):
    updates = params if updates is None else updates
    call = functools.partial(tx.update, value_fn=value_fn)
    return (jax.jit(call) if jit else call)(updates, tx.init(params), params)


def complex_params():
    return {"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)}


def integer_params():
    return {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}


def labelled(labels):
    return pn.scale_by_partition_newton(param_labels=labels)


ERRORS = {
    "no params": (
        lambda: LINK.update(PARAMS, LINK.init(PARAMS), value_fn=loss),
        ValueError,
        r"^params: .*needs the parameters",
    ),
    "no value_fn": (
        lambda: LINK.update(PARAMS, LINK.init(PARAMS), PARAMS),
        ValueError,
        r"^value_fn: .*needs the loss",
    ),
    "no params in the preset": (
        lambda: paper().update(PARAMS, paper().init(PARAMS), value_fn=loss),
        ValueError,
        r"^params: .*needs the parameters",
    ),
    "a loss that is no function": (
        lambda: update_of(LINK, PARAMS, value_fn=3.0),
        TypeError,
        "value_fn must be a function",
    ),
    "a vector for a loss": (
        lambda: update_of(LINK, PARAMS, value_fn=lambda p: p["dense"]["bias"]),
        ValueError,
        r"value_fn must return a scalar loss, got shape \(2,\)",
    ),
    "an integer for a loss": (
        lambda: update_of(LINK, PARAMS, value_fn=lambda p: jnp.array(3)),
        TypeError,
        "value_fn must return a real floating point loss, got dtype int32",
    ),
    "a complex loss": (
        lambda: update_of(LINK, PARAMS, value_fn=lambda p: loss(p) + 0j),
        TypeError,
        "value_fn must return a real floating point loss, got dtype complex64",
    ),
    "updates without a leaf": (
        lambda: update_of(LINK, PARAMS, {"dense": PARAMS["dense"]}),
        ValueError,
        "updates has no leaf 'scale'",
    ),
    "updates with another leaf": (
        lambda: update_of(LINK, PARAMS, {**PARAMS, "more": jnp.ones(2)}),
        ValueError,
        "updates has a leaf 'more'",
    ),
    "updates of another shape": (
        lambda: update_of(LINK, PARAMS, {**PARAMS, "scale": jnp.ones(2)}),
        ValueError,
        r"updates: the leaf 'scale' has shape \(2,\).* shape \(\)",
    ),
    "integer parameters": (
        lambda: LINK.init(integer_params()),
        TypeError,
        "params: the leaf 'n' has dtype int32",
    ),
    "complex parameters": (
        lambda: LINK.init(complex_params()),
        TypeError,
        "params: the leaf 'z' has dtype complex64",
    ),
    "labels that match nothing": (
        lambda: labelled({"dense": "a", "scale": "b", "conv": "c"}).init(PARAMS),
        ValueError,
        "param_labels: 'conv' matches no leaf",
    ),
    "a pattern that matches nothing": (
        lambda: labelled(partitions.by_path([("conv", "a"), ("", "b")])).init(PARAMS),
        ValueError,
        "'conv', label 'a', matches no leaf",
    ),
    "a leaf without a label": (
        lambda: labelled({"dense": "a"}).init(PARAMS),
        ValueError,
        "param_labels: the leaf 'scale' of params has no label",
    ),
    "only frozen leaves": (
        lambda: labelled(partitions.FROZEN).init(PARAMS),
        ValueError,
        "param_labels: the partition is empty",
    ),
    "no leaves": (
        lambda: LINK.init({}),
        ValueError,
        "the partition is empty: params has no leaves",
    ),
    "an interval of zero": (
        lambda: paper(update_interval=0),
        ValueError,
        "update_interval must be at least 1, got 0",
    ),
    "an interval of zero from numpy": (
        lambda: paper(update_interval=np.int64(0)),
        ValueError,
        "update_interval must be at least 1, got 0",
    ),
    "a negative number of halvings": (
        lambda: paper(backtracking=-1),
        ValueError,
        "backtracking must not be negative, got -1",
    ),
    "negative damping": (
        lambda: rules.cubic(-1.0),
        ValueError,
        "damping must not be negative",
    ),
    "an unknown engine": (
        lambda: update_of(
            pn.scale_by_partition_newton(rules.newton(), engine="steam"), PARAMS
        ),
        ValueError,
        "engine must be one of",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_one_clear_error(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400


def test_errors_come_at_trace_time():
    for value_fn, message in (
        (lambda p: p["dense"]["bias"], "scalar loss"),
        (lambda p: jnp.array(3), "floating point loss"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            update_of(LINK, PARAMS, value_fn=value_fn, jit=True)
    with pytest.raises(ValueError, match="updates has no leaf"):
        update_of(LINK, PARAMS, {"dense": PARAMS["dense"]}, jit=True)


# --- learning_rates --------------------------------------------------------------

LABELS = {
    "per_tensor": (None, NAMES),
    "whole": (partitions.whole, ("params",)),
    "weights_biases": (partitions.weights_biases, ("biases", "weights")),
    "per_layer": (partitions.per_layer, ("dense", "params")),
    "per_element": (
        partitions.per_element,
        (
            *("dense/bias[0]", "dense/bias[1]", "dense/kernel[2]", "dense/kernel[3]"),
            "4",
        ),
    ),
    "frozen": ({"dense": "a b", "scale": partitions.FROZEN}, ("a b",)),
    "prefix": ({"dense": 10, "scale": 9}, ("10", "9")),
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("labels", LABELS)
def test_learning_rates_are_named_in_the_order_of_the_subsets(labels, jit):
    param_labels, names = LABELS[labels]
    tx = paper(rule=rules.newton(), param_labels=param_labels)

    def rates_after_a_step(params):
        _, state = step(tx, params, tx.init(params))
        return list(pn.learning_rates(state, params).items()), newton_state(state)

    if jit:  # strings do not leave a jit
        named = {}

        def arrays(params):
            items, newton = rates_after_a_step(params)
            named["names"] = [name for name, _ in items]
            return [rate for _, rate in items], newton

        rates, newton = jax.jit(arrays)(PARAMS)
        found = named["names"]
    else:
        items, newton = rates_after_a_step(PARAMS)
        found, rates = [name for name, _ in items], [rate for _, rate in items]
    expected = partitions.subset_names(PARAMS, param_labels or partitions.per_tensor)
    assert tuple(found) == expected
    if labels != "per_element":
        assert tuple(found) == names
    np.testing.assert_array_equal(jnp.stack(rates), newton.learning_rates)
    assert all(rate.shape == () for rate in rates)


def test_names_stay_in_order_beyond_ten_subsets():
    params = {f"layer_{n}": jnp.ones(()) for n in range(25)}
    labels = {f"layer_{n}": f"{24 - n}" for n in range(25)}
    state = paper(param_labels=labels).init(params)
    state = jax.tree.map(lambda x: x, state)  # a dict comes back with sorted keys
    expected = partitions.subset_names(params, labels)
    assert tuple(pn.learning_rates(state)) == expected


@pytest.mark.slow
def test_learning_rates_are_found_in_wrappers():
    inner = paper(rule=rules.newton())
    wrappers = {
        "chain": optax.chain(optax.clip(1e3), inner),
        "named_chain": optax.named_chain(("a", optax.identity()), ("b", inner)),
        "inject": optax.inject_hyperparams(pn.paper_newton)(learning_rate=1.0),
        "multi_steps": optax.MultiSteps(inner, 1),
        "apply_if_finite": optax.apply_if_finite(inner, 3),
        "partition": optax.partition({"all": inner}, "all"),
    }
    for name, tx in wrappers.items():
        _, state = step(tx, PARAMS, tx.init(PARAMS))
        found = pn.learning_rates(state, PARAMS)
        assert tuple(found) == NAMES, name
        assert all(rate > 0 for rate in found.values()), name


def test_learning_rates_of_no_state_or_of_two_are_an_error():
    with pytest.raises(ValueError, match=r"state must contain exactly one .* found 0"):
        pn.learning_rates(optax.adam(0.1).init(PARAMS))
    two = optax.chain(LINK, LINK).init(PARAMS)
    with pytest.raises(ValueError, match=r"state must contain exactly one .* found 2"):
        pn.learning_rates(two)


@pytest.mark.slow
def test_learning_rates_of_an_ensemble_keep_their_leading_axis():
    ensemble = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    tx = scale_by_newton()
    _, state = jax.vmap(lambda p: step(tx, p, tx.init(p)))(ensemble)
    found = pn.learning_rates(state)
    assert tuple(found) == NAMES
    for s, name in enumerate(NAMES):
        np.testing.assert_array_equal(found[name], state.learning_rates[:, s])


def test_a_subset_may_be_called_like_a_field_that_optax_looks_up():
    labels = {"dense": "value", "scale": "grad"}
    tx = optax.chain(
        scale_by_newton(param_labels=labels),
        optax.scale(-1.0),
        optax.scale_by_zoom_linesearch(5),
    )
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "value") is state[-1].value
    assert optax.tree.get(state, "grad") is state[-1].grad
    assert tuple(pn.learning_rates(state)) == ("value", "grad")


# --- backtracking ----------------------------------------------------------------


def nearly_linear(params):
    """A hinge, rounded: next to no curvature on its slope, and a wall behind it."""
    return jnp.sum(jnp.abs(params) + 1e-4 * params**2)


def first_rate(value_fn, start, backtracking):
    tx = scale_by_newton(backtracking=backtracking)
    params = jnp.array([start])
    _, state = step(tx, params, tx.init(params), value_fn)
    return float(state.learning_rates[0])


def test_rates_are_halved_until_the_loss_falls_by_a_tenth_of_what_the_slope_promises():
    start = 3.0
    newton = first_rate(nearly_linear, start, 0)
    slope = 1 + 2e-4 * start
    assert newton == pytest.approx(slope / 2e-4 / slope, rel=1e-3)

    def loss_at(rate):
        x = start - rate * slope
        return abs(x) + 1e-4 * x**2

    halvings = 0
    while loss_at(newton / 2**halvings) - loss_at(0) > -0.1 * slope**2 * (
        newton / 2**halvings
    ):
        halvings += 1
    assert halvings > 5
    rate = first_rate(nearly_linear, start, 30)
    assert rate == pytest.approx(newton / 2**halvings, rel=1e-6)
    assert first_rate(nearly_linear, start, 2) == pytest.approx(newton / 4, rel=1e-6)


@pytest.mark.slow
def test_rates_that_lower_the_loss_as_they_should_are_not_halved():
    tx, plain = scale_by_newton(backtracking=5), scale_by_newton()
    _, ours = step(tx, PARAMS, tx.init(PARAMS))
    _, theirs = step(plain, PARAMS, plain.init(PARAMS))
    assert_same(ours.learning_rates, theirs.learning_rates)


def test_rates_are_halved_where_the_loss_is_not_finite():
    def walled(params):  # not a number beyond the wall
        return jnp.sum(nearly_linear(params) + 0 * jnp.sqrt(params + 2))

    rate = first_rate(walled, 3.0, 30)
    assert 0 < rate < 5


@pytest.mark.slow
def test_backtracking_evaluates_a_loss_with_aux():
    tx = scale_by_newton(backtracking=3, has_aux=True)
    params = jnp.array([3.0])
    grads = jax.grad(nearly_linear)(params)
    _, state = tx.update(
        grads, tx.init(params), params, value_fn=lambda p: (nearly_linear(p), p)
    )
    assert float(state.learning_rates[0]) == pytest.approx(
        first_rate(nearly_linear, 3.0, 3), rel=1e-6
    )


def constant_value(params):
    """The "magic box" of stochastic graphs: its gradient is that of a bowl."""
    bowl = jnp.sum((params - 1.0) ** 2)
    return 5.0 + bowl - jax.lax.stop_gradient(bowl)


def semi_gradient(params):
    """A squared difference to a target that is further away by as much: TD learning."""
    target = 1.0 + 3.0 * jax.lax.stop_gradient(params)
    return jnp.sum((params - target) ** 2)


def straight_through(params):
    """The gradient of the identity in the place of that of rounding."""
    rounded = params + jax.lax.stop_gradient(jnp.round(params) - params)
    return jnp.sum((rounded - 1.0) ** 2)


@pytest.mark.parametrize(
    ("value_fn", "start"),
    [(constant_value, 3.0), (semi_gradient, 3.0), (straight_through, 2.9)],
)
def test_where_the_value_is_not_what_the_gradient_descends_rates_are_kept(
    value_fn, start
):
    plain = first_rate(value_fn, start, 0)
    assert plain > 0
    tx, params = scale_by_newton(backtracking=30), jnp.array([start])
    state = tx.init(params)
    for _ in range(2):  # at a later refresh, too
        _, state = step(tx, params, state, value_fn)
        assert float(state.learning_rates[0]) == pytest.approx(plain, rel=1e-6)


def test_a_step_that_explodes_at_every_length_is_not_trusted():
    def wall(params):  # uphill beyond any slope, wherever it is looked at
        bowl = jnp.sum(params**2)
        return bowl + jax.lax.stop_gradient(jnp.where(params[0] == 3.0, 0.0, 1e6))

    assert first_rate(wall, 3.0, 30) < 1e-4 * first_rate(wall, 3.0, 0)


@pytest.mark.parametrize("size", [1, 4, 26, 300])
def test_by_default_refreshes_become_rarer_up_to_five_times_the_number_of_subsets(size):
    counts = default_refreshes(5000, size)
    gaps = np.diff(counts)
    assert counts[:2] == [0, 20]
    assert np.all(np.diff(gaps) >= 0)
    assert gaps[-1] == min(max(20, 5 * size), max(counts[-2] // 4, 20))


def curved_at_20(params, count, curvature):
    return jnp.where(count == 20, curvature, 1.0) * jnp.sum(params**2) / 2


@pytest.mark.parametrize(
    ("update_interval", "curvature", "made"),
    [
        (None, 5.0, [0, 20, 23, 43]),  # one batch cuts the rate from 1 to 1/5
        (None, 3.0, [0, 20, 40]),
        (None, 0.2, [0, 20, 40, 43]),  # the batch after it cuts the rate from 5 to 1
        (20, 5.0, [0, 20, 40]),
    ],
)
def test_after_a_cut_the_rates_are_refreshed_soon(update_interval, curvature, made):
    tx = scale_by_newton(update_interval=update_interval)
    params = jnp.ones(2)

    def one(state, count):
        extra = {"value_fn": curved_at_20, "count": count, "curvature": curvature}
        direction = jax.grad(curved_at_20)(params, count, curvature)
        _, state = tx.update(direction, state, params, **extra)
        return state, (state.next_refresh, state.learning_rates[0])

    _, (following, rates) = jax.jit(
        lambda state: jax.lax.scan(one, state, jnp.arange(45))
    )(tx.init(params))
    assert [0, *np.unique(following)[:-1].tolist()] == made
    expected = np.where(np.arange(45) < 20, 1, 1 / curvature)
    expected[made[2] :] = 1
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.slow
def test_tensors_count_if_there_are_more_of_them_than_subsets():
    """With one subset for 30 tensors, the interval is as long as with 30 subsets."""
    params = [jnp.asarray(float(n)) for n in range(30)]

    def loss(params):
        return sum((x - n) ** 4 for n, x in enumerate(params, 1))

    def intervals(labels):
        tx = pn.scale_by_partition_newton(param_labels=labels, update_interval=None)
        state = tx.init(params)._replace(count=jnp.asarray(10**6, jnp.int32))
        _, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return int(state.next_refresh) - 10**6

    assert intervals("whole") == intervals("per_tensor") == 5 * 30


def test_the_default_refreshes_are_those_that_are_made():
    tx = paper(0.3, update_interval=None)

    def one(carry, _):
        params, state = carry
        params, state = step(tx, params, state)
        return (params, state), newton_state(state).next_refresh

    carry = PARAMS, tx.init(PARAMS)
    _, following = jax.jit(lambda c: jax.lax.scan(one, c, length=150))(carry)
    made = [0, *np.unique(following)[:-1].tolist()]
    assert made == default_refreshes(150, len(NAMES))
