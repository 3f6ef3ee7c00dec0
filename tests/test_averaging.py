"""Running summaries against the weighted mean they are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
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


def test_no_average_hands_on_the_newest_summary():
    seen = summaries(3)
    for mean, summary in zip(averages(averaging.none(), seen), seen, strict=True):
        assert mean is summary


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
