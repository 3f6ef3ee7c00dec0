"""Running summaries against the weighted mean they are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from partnewton import Summary, averaging


def summaries(n, third=True, S=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(), (S,), (S, S)] + ([(S,)] if third else [])
    drawn = [[rng.normal(size=shape) for shape in shapes] for _ in range(n)]
    none = [] if third else [None]
    return [Summary(*(jnp.asarray(x, dtype) for x in row), *none) for row in drawn]


def averages(average, seen):
    """The averages after each of the summaries seen."""
    state = average.init(jax.tree.map(jnp.zeros_like, seen[0]))
    means = []
    for summary in seen:
        mean, state = average.update(summary, state)
        means.append(mean)
    return means


def assert_close(actual, expected, rtol=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_exponential_average_is_the_weighted_mean_of_all_summaries(decay, third):
    seen = summaries(5, third)
    for n, mean in enumerate(averages(averaging.exponential(decay), seen), start=1):
        weights = np.array([decay ** (n - i) for i in range(1, n + 1)])
        weights /= weights.sum()
        expected = jax.tree.map(
            lambda *xs, w=weights: sum(a * x for a, x in zip(w, xs, strict=True)),
            *seen[:n],
        )
        assert_close(mean, expected)


def test_the_first_average_is_the_first_summary():
    (first,) = summaries(1)
    (mean,) = averages(averaging.exponential(0.99), [first])
    assert_close(mean, first, rtol=1e-7)


def test_equal_summaries_average_to_themselves():
    (summary,) = summaries(1)
    for mean in averages(averaging.exponential(0.9), [summary] * 20):
        assert_close(mean, summary)


def test_without_an_average_the_newest_summary_is_used():
    seen = summaries(3)
    for mean, summary in zip(averages(averaging.none(), seen), seen, strict=True):
        assert mean is summary


def test_an_average_is_a_transformation_of_optax():
    seen = summaries(4)
    ours = averages(averaging.exponential(0.5), seen)
    theirs = averages(optax.ema(0.5), seen)
    for mean, expected in zip(ours, theirs, strict=True):
        assert_close(mean, expected)
    chained = optax.chain(averaging.exponential(0.5), averaging.none())
    assert_close(averages(chained, seen)[-1], ours[-1])


def test_the_state_keeps_its_types_and_the_decay_may_be_traced():
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            (summary,) = summaries(1, dtype=dtype)

            @jax.jit
            def second_state(decay, summary=summary):
                average = averaging.exponential(decay)
                first = average.init(summary)
                return first, average.update(summary, first)

            first, (mean, second) = second_state(jnp.asarray(0.5, dtype))
            assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, second)
            assert_close(mean, summary)


def test_no_field_is_named_like_those_that_optax_looks_up():
    (summary,) = summaries(1)
    state = averaging.exponential().init(summary)
    text = str(jax.tree_util.tree_flatten_with_path(state))
    for name in ("value", "grad'", "learning_rate"):
        assert name not in text


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_an_error(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        averaging.exponential(decay)


def test_each_field_may_have_a_decay_of_its_own():
    seen = summaries(4)
    decay = Summary(0.0, 0.5, 0.9, 0.2)
    mean = averages(averaging.exponential(decay), seen)[-1]
    for k, field in enumerate(Summary._fields):
        alone = averages(averaging.exponential(decay[k]), seen)[-1]
        np.testing.assert_allclose(
            getattr(mean, field), getattr(alone, field), rtol=1e-6
        )


def test_the_size_of_the_third_order_is_averaged_on_request():
    seen = summaries(4)
    ours = averages(averaging.exponential(0.7, absolute_third=True), seen)[-1]
    sizes = [x._replace(third=jnp.abs(x.third)) for x in seen]
    assert_close(ours, averages(averaging.exponential(0.7), sizes)[-1])
    assert np.all(ours.third > 0)


# --- uniform ---------------------------------------------------------------------


@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_the_uniform_average_is_the_mean_over_the_older_of_two_windows(period, third):
    seen = summaries(8, third)
    begin_current = begin_following = 0  # the windows as lists of what they have seen
    for n, mean in enumerate(
        averages(averaging.uniform(period, warm_up=0), seen), start=1
    ):
        if n % period == 0:
            begin_current, begin_following = begin_following, n
        expected = jax.tree.map(
            lambda *xs: np.mean(np.stack(xs), 0), *seen[begin_current:n]
        )
        assert_close(mean, expected)


def test_during_the_warm_up_the_gradient_alone_is_zero():
    seen = summaries(5)
    means = averages(averaging.uniform(2, warm_up=3), seen)
    without = averages(averaging.uniform(2, warm_up=0), seen)
    for n, (mean, other) in enumerate(zip(means, without, strict=True), start=1):
        gradient = np.zeros(3) if n <= 3 else other.gradient
        assert_close(mean, other._replace(gradient=jnp.asarray(gradient)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"warm_up": -1}, "warm_up must not be negative, got -1"),
    ],
)
def test_a_window_that_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        averaging.uniform(**arguments)


# --- relative --------------------------------------------------------------------


def scaled(summary, factor):
    return jax.tree.map(lambda x: factor * x, summary)


def test_the_relative_average_weighs_each_summary_by_its_inverse_gradient():
    seen = summaries(4)
    mean = averages(averaging.relative(averaging.exponential(0.5)), seen)[-1]
    norms = [np.linalg.norm(x.gradient) for x in seen]
    divided = [scaled(x, 1 / n) for x, n in zip(seen, norms, strict=True)]
    expected = scaled(averages(averaging.exponential(0.5), divided)[-1], norms[-1])
    assert_close(mean, expected._replace(value=seen[-1].value))


@pytest.mark.parametrize("factor", [1e-6, 1e6, 1e15])
def test_a_batch_with_a_huge_loss_has_no_larger_weight(factor):
    seen = summaries(6)
    exploded = [*seen[:3], scaled(seen[3], factor), *seen[4:]]
    average = averaging.relative(averaging.exponential(0.9))
    assert_close(averages(average, exploded)[-1], averages(average, seen)[-1])
    plain = averaging.exponential(0.9)
    drowned = averages(plain, exploded)[-1]
    assert not np.allclose(drowned.gradient, averages(plain, seen)[-1].gradient)


@pytest.mark.parametrize("shift", [-1e3, -1.0, 1e3])
def test_a_constant_added_to_the_loss_does_not_enter_a_relative_average(shift):
    seen = summaries(4)
    shifted = [x._replace(value=x.value + shift) for x in seen]
    average = averaging.relative(averaging.exponential(0.9))
    ours, theirs = averages(average, shifted)[-1], averages(average, seen)[-1]
    assert_close(ours._replace(value=theirs.value), theirs, rtol=1e-7)


def test_a_summary_without_gradient_enters_a_relative_average_as_it_is():
    (summary,) = summaries(1)
    summary = summary._replace(gradient=jnp.zeros(3))
    (mean,) = averages(averaging.relative(averaging.none()), [summary])
    assert_close(mean, summary)


def test_nonnegative_clips_the_result_and_not_the_state():
    average = averaging.nonnegative(averaging.exponential(0.5))
    state = average.init((jnp.zeros(2),))
    (first,), state = average.update((jnp.array([-3.0, 3.0]),), state)
    np.testing.assert_allclose(first, [0, 3])
    (second,), state = average.update((jnp.array([3.0, 3.0]),), state)
    np.testing.assert_allclose(second, [(-3 / 2 + 3) / 1.5, 3])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "average",
    [
        averaging.exponential(0.5),
        averaging.uniform(2, warm_up=0),
        averaging.relative(averaging.exponential(0.5, absolute_third=True)),
    ],
    ids=["exponential", "uniform", "relative"],
)
def test_a_third_order_that_is_not_finite_leaves_averages_finite(average, value):
    seen = [jax.tree.map(jnp.ones_like, summaries(1)[0])] * 6
    broken = [
        s._replace(third=s.third.at[1].set(value)) if i in (0, 3) else s
        for i, s in enumerate(seen)
    ]
    expected, found = averages(average, seen), averages(average, broken)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x._replace(third=x.third[::2]), y._replace(third=y.third[::2]))
        # Zero as long as nothing is known, and then between that and what is measured.
        assert 0 <= x.third[1] <= 1 if i else x.third[1] == 0
    assert found[-1].third[1] > 0.5


def test_an_exponential_average_ignores_a_third_order_that_is_not_finite():
    seen = summaries(3)
    last = seen[2]._replace(third=jnp.full(3, jnp.inf))
    found = averages(averaging.exponential(0.5), [*seen[:2], last])
    np.testing.assert_allclose(found[2].third, found[1].third, rtol=1e-6)
