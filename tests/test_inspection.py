"""The report: each of its numbers against an independent one, and its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import some

import partnewton as pn
from partnewton import plot, rules

PARAMS = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}


def loss(params):
    a, b = params["a"], params["b"]
    return jnp.sum(a**2) + jnp.sum(a) * b + b**2


def rough(params):
    return jnp.sum(jnp.sin(params["a"])) * jnp.exp(params["b"] / 4)


def test_the_decrease_predicted_by_newtons_method_on_a_quadratic_is_the_actual_one():
    found = pn.report(loss, PARAMS, rule=rules.newton(), measure_cost=False)
    np.testing.assert_allclose(
        found.predicted_decrease, found.actual_decrease, rtol=1e-5
    )
    assert found.cost is None
    assert found.summary.third is None


@pytest.mark.parametrize("rule", [None, rules.cubic(10.0)])
def test_its_numbers_are_those_of_the_functions_that_it_calls(rule):
    direction = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
    found = pn.report(rough, PARAMS, direction, rule=rule)
    summary = pn.summarize(rough, PARAMS, direction)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.summary, summary
    )
    proposal = (rule or rules.robust())(summary)
    np.testing.assert_allclose(found.learning_rates, proposal.learning_rates, rtol=1e-4)
    a, b = found.learning_rates
    moved = {"a": PARAMS["a"] - a * direction["a"], "b": PARAMS["b"] - b * 2.0}
    actual = rough(PARAMS) - rough(moved)
    np.testing.assert_allclose(found.actual_decrease, actual, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.direction_rms, [np.sqrt(1.25 / 2), 2.0], rtol=1e-6)
    np.testing.assert_array_equal(found.entries, [2, 1])
    expected = plot.correlation(summary.hessian)
    np.testing.assert_allclose(found.interactions, expected, rtol=1e-5)
    assert found.cost > 0


def test_by_default_the_direction_is_the_gradient():
    one = pn.report(loss, PARAMS, measure_cost=False)
    two = pn.report(loss, PARAMS, jax.grad(loss)(PARAMS), measure_cost=False)
    jax.tree.map(np.testing.assert_array_equal, one.summary, two.summary)


def test_other_partitions_and_frozen_leaves():
    params = PARAMS | {"count": jnp.array(3)}
    labels = {"a": np.array([0, 1]), "b": "b", "count": pn.partitions.FROZEN}
    found = pn.report(loss, params, param_labels=labels, measure_cost=False)
    assert found.names == ("a[0]", "a[1]", "b")
    np.testing.assert_array_equal(found.entries, [1, 1, 1])
    assert found.actual_decrease > 0


@pytest.mark.parametrize("count", some([1, 12, 80], default=[12]))
def test_the_table_has_a_line_for_each_subset_and_at_most_100_columns(count):
    name = "a_module_with_a_long_name_{}/attention/query/projection/kernel"
    params = {name.format(i): jnp.full(1000, float(i)) for i in range(count)}

    def value(params):
        return sum(jnp.sum(jnp.sin(x)) for x in params.values()) ** 2 * 1e-30

    found = pn.report(value, params, rule=rules.robust(), measure_cost=False)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 6 + min(count, 60) + (count > 60)
    assert lines[-4].startswith("... and 20 more") == (count > 60)


def test_the_strongest_interactions_are_in_the_table():
    def value(params):
        a, b, c = params["a"], params["b"], params["c"]
        return a**2 + b**2 + c**2 + 1.9 * a * b

    params = {k: jnp.array(1.0) for k in "abc"}
    found = pn.report(value, params, measure_cost=False)
    rows = str(found).splitlines()[-6:-3]
    assert [row.split()[-2:] for row in rows[:2]] == [["1:", "0.95"], ["0:", "0.95"]]
    assert rows[2].endswith("none")


def test_its_picture_shows_the_interactions_and_the_steps():
    found = pn.report(loss, PARAMS, measure_cost=False)
    figure = found.plot()
    figure.draw_without_rendering()
    matrix, steps = figure.axes[:2]
    (image,) = matrix.get_images()
    np.testing.assert_allclose(image.get_array(), found.interactions)
    (points,) = (line for line in steps.get_lines() if line.get_marker() == "o")
    expected = found.learning_rates * found.direction_rms
    np.testing.assert_allclose(points.get_xdata(), expected, rtol=1e-6)


@pytest.mark.slow
def test_rates_that_are_negative_or_zero_are_marked():
    def value(params):
        return sum(x**2 for x in params.values())

    params = {k: jnp.array(1.0) for k in "abc"}
    direction = {"a": jnp.array(1.0), "b": jnp.array(-1.0), "c": jnp.array(0.0)}
    rule = rules.cubic(nonnegative=False)
    found = pn.report(value, params, direction, rule=rule, measure_cost=False)
    np.testing.assert_allclose(found.learning_rates, [1, -1, 0], atol=1e-6)
    legend = found.plot().axes[1].get_legend()
    assert {x.get_text() for x in legend.get_texts()} == {"negative rate", "rate zero"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((loss, PARAMS, {"a": jnp.ones(2)}), "direction has no leaf 'b'"),
        ((lambda p: p["a"], PARAMS, PARAMS), "value_fn must return a scalar"),
        ((lambda p: p["a"], PARAMS), "value_fn must return a scalar"),
    ],
)
def test_errors_are_those_of_summarize(arguments, message):
    with pytest.raises(ValueError, match=message):
        pn.report(*arguments)


def test_aux_is_ignored():
    found = pn.report(lambda p: (loss(p), p), PARAMS, measure_cost=False, has_aux=True)
    expected = pn.report(loss, PARAMS, measure_cost=False)
    np.testing.assert_array_equal(found.learning_rates, expected.learning_rates)
    assert found.actual_decrease == expected.actual_decrease
    with pytest.raises(TypeError, match="pass has_aux=True if it returns"):
        pn.report(lambda p: (loss(p), p), PARAMS)
