"""The factor that looks back: the sign of a slope, and what must not disturb it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import types_of

import partnewton as pn
from partnewton import partitions

CURVATURE = np.array([1.0, 10.0, 0.1])
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def loss(params, target=None, factor=1.0, shift=0.0):
    x = jnp.concatenate([params["a"], params["b"]])
    target = jnp.zeros(3) if target is None else target
    return factor * 0.5 * jnp.sum(jnp.asarray(CURVATURE) * (x - target) ** 2) + shift


def steps_and_targets(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)) * 0.3, rng.normal(size=(n, 3))


def run(tx, steps, targets, params=PARAMS, **kwargs):
    """Factors and slopes after each update, and the parameters at the end."""
    state = tx.init(params)
    seen = []

    @jax.jit
    def call(step, target, state, params):
        tree = {"a": step[:2], "b": step[2:]}
        more = {"target": target, **kwargs}
        updates, state = tx.update(tree, state, params, value_fn=loss, **more)
        return optax.apply_updates(params, updates), state

    for step, target in zip(steps, targets, strict=True):
        params, state = call(jnp.float32(step), jnp.float32(target), state, params)
        seen.append((float(state.factor), float(state.slope)))
    return *np.array(seen).T, flat(params)


def expected(steps, targets, rate, position, interval, growth, share):
    """The same in numpy, with the gradient of the quadratic by hand."""
    x = np.array([1.0, -2.0, 3.0])
    anchor, begin, factor, slope, looks, seen = x, 0, 1.0, 0.0, [], []
    streak = 0
    for n, (step, target) in enumerate(zip(steps, targets, strict=True)):
        length = max(interval, int(growth * np.sqrt(begin)))
        if n > begin + length - max(1, int(share * length)):
            way = x - anchor
            looks.append(CURVATURE * (anchor + position * way - target) @ way)
        if n == begin + length:
            slope = np.mean(looks)
            streak = streak + 1 if slope < 0 else 0
            factor *= np.exp(-rate * (2 if streak >= 5 else 1) * np.sign(slope))
            anchor, begin, looks = x, n, []
        x = x + factor * step
        seen.append((factor, slope))
    return *np.array(seen).T, x


@pytest.mark.parametrize(
    ("rate", "position", "interval", "growth", "share", "count"),
    [
        (0.1, 0.6, 3, 0.0, 0.0, 30),
        (0.5, 0.9, 1, 0.0, 0.1, 30),
        (0.2, 0.0, 7, 3.0, 0.1, 80),
        (0.1, 0.6, 2, 1.0, 0.5, 120),
        (0.1, 0.6, 2, 0.5, 1.0, 60),
    ],
)
def test_the_multiplier_follows_the_sign_of_the_slope(
    rate, position, interval, growth, share, count
):
    given = steps_and_targets(count)
    tx = pn.scale_by_lookback(
        rate,
        slope_position=position,
        update_interval=interval,
        window_growth=growth,
        averaging_fraction=share,
    )
    theirs = expected(*given, rate, position, interval, growth, share)
    assert np.any(np.diff(theirs[0]) > 0), "it grows and decays in this example"
    assert np.any(np.diff(theirs[0]) < 0), "it grows and decays in this example"
    for actual, wanted in zip(run(tx, *given), theirs, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_while_steps_descend_the_multiplier_grows_to_its_maximum():
    steps = np.tile([-1e-3, 0.0, 0.0], (40, 1))
    tx = pn.scale_by_lookback(0.1, update_interval=2, window_growth=0, max_scale=1.5)
    factors, _, _ = run(tx, steps, np.zeros((40, 3)))
    np.testing.assert_allclose(factors[:6:2], np.exp([0.0, 0.1, 0.2]), rtol=1e-6)
    assert factors[-1] == pytest.approx(1.5)


def test_from_the_fifth_descent_in_a_row_the_multiplier_grows_twice_as_fast():
    steps = np.tile([-1e-3, 0.0, 0.0], (14, 1))
    steps[8] = [1.0, 0.0, 0.0]  # one window of one step in the wrong direction
    tx = pn.scale_by_lookback(0.1, update_interval=1, window_growth=0)
    factors, _, _ = run(tx, steps, np.zeros((14, 3)))
    growth = [0, 1, 1, 1, 1, 2, 2, 2, 2, -1, 1, 1, 1, 1]
    np.testing.assert_allclose(np.log(factors), 0.1 * np.cumsum(growth), atol=1e-5)


def test_while_steps_ascend_the_multiplier_shrinks_to_its_minimum():
    steps = np.tile([1.0, 0.0, 0.0], (40, 1))
    tx = pn.scale_by_lookback(0.2, update_interval=1, window_growth=0, min_scale=0.01)
    factors, _, _ = run(tx, steps, np.zeros((40, 3)))
    np.testing.assert_allclose(factors[:3], np.exp([0.0, -0.2, -0.4]), rtol=1e-6)
    assert factors[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("adapt_steps", [0, 11, 12, 13])
def test_after_adapt_steps_the_multiplier_is_kept(adapt_steps):
    given = steps_and_targets(30)
    options = {"update_interval": 3, "window_growth": 0.0}
    kept, slopes, _ = run(
        pn.scale_by_lookback(0.2, adapt_steps=adapt_steps, **options), *given
    )
    always, _, _ = run(pn.scale_by_lookback(0.2, **options), *given)
    np.testing.assert_array_equal(kept[:adapt_steps], always[:adapt_steps])
    last = kept[adapt_steps - 1] if adapt_steps else 1.0
    np.testing.assert_array_equal(kept[adapt_steps:], last)
    assert len(np.unique(slopes[adapt_steps:])) == 1
    assert len(np.unique(always[13:])) > 1


@pytest.mark.parametrize(
    ("rate", "growth", "bound"), [(0.1, 0.0, 0.1), (0.2, 3.0, 0.5)]
)
def test_on_noise_the_multiplier_shrinks(rate, growth, bound):
    """Stochastic gradients of a quadratic, long after the start."""
    rng = np.random.default_rng(0)
    tx = pn.scale_by_lookback(rate, window_growth=growth)
    targets = jnp.float32(rng.normal(size=(6000, 3)))

    def step(carry, target):
        params, state = carry
        grads = jax.grad(loss)(params, target)
        steps = jax.tree.map(lambda g: -0.1 * g, grads)
        updates, state = tx.update(steps, state, params, value_fn=loss, target=target)
        return (optax.apply_updates(params, updates), state), state.factor

    carry = PARAMS, tx.init(PARAMS)
    _, factors = jax.jit(lambda c: jax.lax.scan(step, c, targets))(carry)
    assert np.exp(np.log(factors[-2000:]).mean()) < bound


def test_it_needs_no_derivative_of_the_loss():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: pytest.fail("differentiated"), lambda x, g: (x,))
    tx = pn.scale_by_lookback(update_interval=1)
    params = jnp.array(3.0)
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, value_fn=square))
    for _ in range(3):
        updates, state = update(jnp.array(-1.0), state, params)
        params = optax.apply_updates(params, updates)
    assert float(state.factor) > 1


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_neither_units_nor_a_constant_of_the_loss_matter(factor, shift):
    given = steps_and_targets(30)
    tx = pn.scale_by_lookback(update_interval=3)
    plain, _, _ = run(tx, *given)
    other, _, _ = run(tx, *given, factor=factor, shift=factor * shift)
    np.testing.assert_array_equal(other, plain)


def test_a_difference_within_the_rounding_of_the_loss_counts_as_zero():
    """At 1e9 the spacing of float32 is 64, and no step changes the loss by that."""
    steps, targets = steps_and_targets(12)
    tx = pn.scale_by_lookback(update_interval=3, window_growth=0)
    factors, slopes, _ = run(tx, steps, targets, shift=1e9)
    np.testing.assert_array_equal(factors, 1.0)
    np.testing.assert_array_equal(slopes, 0.0)


def test_an_update_has_one_conditional():
    """On an accelerator the host waits for the predicate of each."""
    tx = pn.scale_by_lookback()
    update = functools.partial(tx.update, value_fn=loss)
    text = str(jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS), PARAMS))
    assert text.count("cond[") == 1


def test_a_slope_that_is_not_finite_changes_nothing():
    steps, targets = steps_and_targets(9)
    targets[6] = np.nan
    tx = pn.scale_by_lookback(update_interval=3, window_growth=0)
    factors, slopes, _ = run(tx, steps, targets)
    assert slopes[6] == 0
    assert factors[6] == factors[5]
    assert np.all(np.isfinite(factors))


def test_with_the_rate_zero_nothing_is_measured_and_no_copy_is_kept():
    tx = pn.scale_by_lookback(0)
    state = tx.init(PARAMS)
    assert state.anchor is None

    def value_fn(params):
        pytest.fail("the loss was asked for")

    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    _, after = update(PARAMS, state, PARAMS)
    assert after.count == 1
    assert types_of(state) == types_of(after)


def test_with_the_rate_zero_the_multiplier_stays_one():
    steps, targets = steps_and_targets(9)
    factors, _, end = run(pn.scale_by_lookback(0.0), steps, targets)
    np.testing.assert_array_equal(factors, 1.0)
    np.testing.assert_allclose(end, flat(PARAMS) + steps.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        {"a": 0, "b": partitions.FROZEN},
        {"a": np.array([0, partitions.FROZEN]), "b": partitions.FROZEN},
    ],
    ids=["leaves", "entries"],
)
def test_changes_of_frozen_entries_are_ignored(labels):
    """Another optimizer moves them uphill, far more than we move downhill."""
    steps, targets = np.tile([-0.01, -5.0, 5.0], (2, 1)), np.zeros((2, 3))
    if isinstance(labels["a"], int):
        steps[:, 1] = 0.0  # all of it is ours
    tx = pn.scale_by_lookback(update_interval=1, param_labels=labels)
    with jax.enable_x64(True):  # what is not ours dominates the loss
        params = {name: x.astype(jnp.float64) for name, x in PARAMS.items()}
        factors, slopes, _ = run(tx, steps, targets, params)
    np.testing.assert_allclose(slopes[1], (1 - 0.6 * 0.01) * -0.01, rtol=1e-4)
    assert factors[1] > 1
    _, all_of_it, _ = run(pn.scale_by_lookback(update_interval=1), steps, targets)
    assert all_of_it[1] > 0


def test_leaves_of_integers_may_be_frozen():
    params = {"n": jnp.array([1, 2]), "w": jnp.ones(2)}
    labels = {"n": partitions.FROZEN, "w": 0}
    tx = pn.scale_by_lookback(update_interval=1, param_labels=labels)
    state = tx.init(params)
    assert state.anchor["n"] is None
    updates = {"n": jnp.array([0, 0]), "w": -0.1 * jnp.ones(2)}
    for _ in range(2):
        updates, state = tx.update(
            updates, state, params, value_fn=lambda p: jnp.sum(p["w"] ** 2 * p["n"])
        )
        params = optax.apply_updates(params, updates)
    assert updates["n"].dtype == jnp.int32
    assert state.factor == pytest.approx(np.exp(0.2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes_stay_in_a_cond(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": jnp.ones(3, dtype), "weak": jnp.asarray(2.0)}
        tx = pn.scale_by_lookback(jnp.asarray(0.1), update_interval=1)
        state = jax.jit(tx.init)(params)

        def value_fn(p):
            return jnp.sum(p["w"] ** 2) + p["weak"] ** 2

        @jax.jit
        def call(really, params, state):
            return jax.lax.cond(
                really,
                lambda: tx.update(params, state, params, value_fn=value_fn),
                lambda: (params, state),
            )

        for really in (True, False, True):
            updates, after = call(really, params, state)
            assert updates["w"].dtype == dtype
            assert types_of(state) == types_of(after)
            state = after
    assert not any(weak for _, _, weak in types_of(state))


def test_map_params_visits_the_anchor_alone():
    tx = pn.scale_by_lookback()
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    np.testing.assert_array_equal(flat(doubled.anchor), 2 * flat(PARAMS))
    assert doubled.factor == 1


def test_aux_is_dropped():
    tx = pn.scale_by_lookback(has_aux=True)
    updates, _ = tx.update(
        PARAMS, tx.init(PARAMS), PARAMS, value_fn=lambda p: (loss(p), "aux")
    )
    jax.tree.map(np.testing.assert_array_equal, updates, PARAMS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rate": -0.1}, "rate must not be negative"),
        ({"slope_position": -1}, "slope_position must not be negative"),
        ({"slope_position": 1.0}, "slope_position must be less than 1, got 1.0"),
        ({"min_scale": -1}, "min_scale must not be negative"),
        ({"max_scale": float("nan")}, "max_scale must not be negative"),
        ({"window_growth": -0.5}, "window_growth must not be negative"),
        ({"averaging_fraction": -1}, "averaging_fraction must not be negative"),
        ({"update_interval": 0}, "update_interval must be at least 1, got 0"),
    ],
)
def test_a_wrong_number_is_one_clear_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pn.scale_by_lookback(**kwargs)


def test_missing_arguments_are_one_clear_error():
    tx = pn.scale_by_lookback()
    update = functools.partial(tx.update, PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="params: scale_by_lookback needs"):
        update(value_fn=loss)
    with pytest.raises(ValueError, match="value_fn: scale_by_lookback needs"):
        update(PARAMS)
