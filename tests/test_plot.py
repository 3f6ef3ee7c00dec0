"""Pictures: what the axes show, and that it can be read."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.selection import some

import partnewton as pn
from partnewton import plot
from partnewton.plot import curves


def summary_of(hessian):
    return SimpleNamespace(hessian=np.asarray(hessian))


def random_hessian(S, seed=0, scales=1.0):
    A = np.random.default_rng(seed).normal(size=(S, S))
    return scales * (A @ A.T) * np.reshape(scales, (-1, 1))


def names_of(S):
    return [f"encoder/layer_{s}/kernel" for s in range(S)]


def drawn(ax):
    """The masked array of a heat map."""
    (image,) = ax.get_images()
    return image.get_array()


# --- The correlation -------------------------------------------------------------


def test_correlation_of_a_two_by_two_matrix_in_closed_form():
    a, b, c = 2.0, -0.6, 8.0
    expected = [[1, b / 4], [b / 4, 1]]
    np.testing.assert_allclose(plot.correlation([[a, b], [b, c]]), expected)


def test_correlation_keeps_the_sign_of_negative_curvature():
    expected = [[-1, 3 / 6], [3 / 6, 1]]
    np.testing.assert_allclose(plot.correlation([[-4, 3], [3, 9]]), expected)


def test_correlation_does_not_see_the_scales_of_subsets():
    scales = np.array([1e-18, 1e-6, 1.0, 1e9])
    one = plot.correlation(random_hessian(4))
    other = plot.correlation(random_hessian(4, scales=scales))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert np.abs(one).max() <= 1 + 1e-12


def test_correlation_is_blank_where_there_is_no_curvature():
    values = plot.correlation([[0, 1, 2], [1, 4, 2], [2, 2, 4]])
    blank = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    np.testing.assert_array_equal(np.isnan(values), blank)
    np.testing.assert_allclose(values[1:, 1:], [[1, 0.5], [0.5, 1]])


def test_correlation_is_blank_where_the_hessian_is_not_finite():
    values = plot.correlation([[np.inf, 1, 2], [1, 4, np.nan], [2, np.nan, 4]])
    assert np.isnan(values[0]).all()
    assert np.isnan(values[1, 2])
    assert values[1, 1] == 1


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_correlation_wants_a_square_matrix(shape):
    with pytest.raises(ValueError, match=r"hessian must have shape \(S, S\)"):
        plot.correlation(np.ones(shape))


# --- The heat map ----------------------------------------------------------------


def test_heat_map_shows_the_correlation_on_a_symmetric_scale():
    hessian = random_hessian(4)
    ax = plot.hessian(summary_of(hessian), names_of(4))
    np.testing.assert_allclose(drawn(ax), plot.correlation(hessian))
    (image,) = ax.get_images()
    assert image.get_clim() == (-1, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == names_of(4)
    assert [label.get_text() for label in ax.get_xticklabels()] == names_of(4)


def test_heat_map_says_what_lies_beyond_its_scale():
    ax = plot.hessian(summary_of([[1, 3], [3, 4]]), ["a", "b"])
    assert "2 of 4 entries lie beyond ±1, up to 1.5" in ax.get_xlabel()
    assert "negative curvature in the plane of" in ax.get_xlabel()
    assert "grey" not in ax.get_xlabel()
    assert ax.get_images()[0].colorbar.extend == "max"


@pytest.mark.parametrize("seed", range(20))
def test_beyond_one_there_is_negative_curvature_in_the_plane_of_two_subsets(seed):
    A = np.random.default_rng(seed).normal(size=(2, 2))
    hessian = A + A.T
    if abs(plot.correlation(hessian)[0, 1]) > 1:
        assert np.linalg.eigvalsh(hessian)[0] < 0
    elif np.all(np.diagonal(hessian) > 0):
        assert np.linalg.eigvalsh(hessian)[0] > 0


def test_the_colour_bar_says_what_the_colours_mean():
    ax = plot.hessian(summary_of(random_hessian(5)), names_of(5))
    (image,) = ax.get_images()
    ticks = image.colorbar.ax.get_yticks()
    labels = [x.get_text() for x in image.colorbar.ax.get_yticklabels()]
    meaning = dict(zip(ticks, (" ".join(x.split()) for x in labels), strict=True))
    assert meaning[1] == "1 steps compete"
    assert meaning[-1] == "−1 steps help each other"


def test_the_signs_are_those_of_competing_and_helping_steps():
    """The decrease by a step in one subset, after a step in the other one was made."""
    for sign in (1.0, -1.0):
        hessian = np.array([[2.0, sign], [sign, 2.0]])
        step, slope = np.array([0.3, 0.0]), np.ones(2)
        first = slope[1] * 0.3 - hessian[1, 1] * 0.3**2 / 2
        second = (slope - hessian @ step)[1] * 0.3 - hessian[1, 1] * 0.3**2 / 2
        assert (second < first) == (plot.correlation(hessian)[0, 1] > 0)


def test_heat_map_of_a_sound_hessian_needs_no_remark():
    ax = plot.hessian(summary_of(random_hessian(5)), names_of(5))
    assert ax.get_xlabel() == ""
    assert ax.get_images()[0].colorbar.extend == "neither"


def test_heat_map_leaves_subsets_without_curvature_blank():
    ax = plot.hessian(summary_of([[0, 1], [1, 4]]), ["a", "b"])
    np.testing.assert_array_equal(drawn(ax).mask, [[1, 1], [1, 0]])
    assert "grey" in ax.get_xlabel()
    assert [text.get_text() for text in ax.texts] == ["1.00"]


def test_heat_map_of_nothing_but_zeros_is_blank():
    ax = plot.hessian(summary_of(np.zeros((3, 3))), names_of(3))
    ax.figure.draw_without_rendering()
    assert drawn(ax).mask.all()


@pytest.mark.parametrize("S", some([1, 4, 10, 60, 200], default=[1, 10, 60]))
def test_names_are_in_the_picture_and_do_not_overlap(S):
    ax = plot.hessian(summary_of(random_hessian(S)), names_of(S))
    ax.figure.draw_without_rendering()
    for labels, axis in ((ax.get_yticklabels(), 1), (ax.get_xticklabels(), 0)):
        boxes = [label.get_window_extent() for label in labels]
        starts = np.array([box.min[axis] for box in boxes])
        ends = np.array([box.max[axis] for box in boxes])
        order = np.argsort(starts)
        assert np.all(ends[order][:-1] <= starts[order][1:] + 1)
        assert min(box.x0 for box in boxes) >= 0
        assert min(box.y0 for box in boxes) >= 0
    numbers = len(ax.texts)
    assert numbers == (S * S if S <= 10 else 0)


def transformer_names(blocks):
    parts = ["norm/scale", "attention/query/kernel", "attention/out/kernel", "mlp/bias"]
    inside = [f"blocks/{i}/{part}" for i in range(blocks) for part in parts]
    return ["embed/embedding", *inside, "head/kernel", "head/bias"]


def test_layer_groups_are_runs_of_names_that_share_their_first_parts():
    expected = [("embed", 1), *((f"blocks/{i}", 4) for i in range(5)), ("head", 2)]
    assert plot.layer_groups(transformer_names(5)) == expected


@pytest.mark.parametrize(
    "names", [[], ["a"], ["a", "b"], ["a/kernel", "a/bias"], ["a/kernel", "b/kernel"]]
)
def test_one_group_or_one_for_each_name_is_no_grouping(names):
    assert plot.layer_groups(names) == []


def test_names_that_come_back_later_form_a_group_of_their_own():
    names = ["a/x", "a/y", "b/x", "b/y", "a/z", "a/w"]
    assert plot.layer_groups(names) == [("a", 2), ("b", 2), ("a", 2)]


def test_heat_map_has_lines_between_layer_groups():
    names = transformer_names(4)
    ax = plot.hessian(summary_of(random_hessian(len(names))), names)
    vertical = [line.get_xdata()[0] for line in ax.get_lines()[1::2]]
    horizontal = [line.get_ydata()[0] for line in ax.get_lines()[0::2]]
    assert vertical == horizontal == [0.5, 4.5, 8.5, 12.5, 16.5]
    assert not plot.hessian(summary_of(np.eye(2)), names_of(2)).get_lines()


def test_heat_map_wants_a_name_for_each_subset():
    with pytest.raises(ValueError, match="names: 3 names for 2 subsets"):
        plot.hessian(summary_of(np.eye(2)), names_of(3))


# --- Curves ----------------------------------------------------------------------


def test_learning_rates_are_drawn_on_a_logarithmic_axis():
    steps = np.arange(0, 50, 10)
    rates = {"kernel": np.full(5, 0.1), "bias": np.array([1, 2, np.nan, 4, 5])}
    ax = plot.learning_rates((steps, rates))
    assert ax.get_yscale() == "log"
    assert {text.get_text() for text in ax.texts} == {"kernel", "bias"}
    kernel, _, bias, _ = (line.get_ydata() for line in ax.get_lines())
    np.testing.assert_array_equal(kernel, rates["kernel"])
    np.testing.assert_array_equal(bias, rates["bias"])


@pytest.mark.parametrize("other", [0.0, -2.0])
def test_learning_rates_that_are_not_positive_are_drawn(other):
    ax = plot.learning_rates((range(3), {"kernel": [0.3, other, 1e-20]}))
    ax.figure.draw_without_rendering()
    assert ax.get_yscale() == "symlog"
    low, high = ax.get_ylim()
    assert low < min(other, 0)
    assert high > 0.3


def test_running_medians_leave_out_what_is_missing():
    values = np.array([1.0, 9.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    smooth = curves._running_median(values, 3)
    np.testing.assert_array_equal(smooth, [5, 5, 6, 3, 3, np.nan, np.nan])


@pytest.mark.parametrize("values", [np.zeros(3), np.full(3, np.nan)])
def test_learning_rates_without_any_positive_value_are_no_error(values):
    ax = plot.learning_rates((range(3), {"kernel": values}))
    ax.figure.draw_without_rendering()


def test_many_learning_rates_are_drawn_in_shades():
    rates = {name: np.full(3, 0.1) for name in names_of(60)}
    ax = plot.learning_rates((range(3), rates))
    ax.figure.draw_without_rendering()
    assert len({line.get_color() for line in ax.get_lines()}) == 60


def test_many_learning_rates_in_layer_groups_share_colours_and_entries():
    names = transformer_names(14)
    ax = plot.learning_rates((range(3), {name: np.full(3, 0.1) for name in names}))
    ax.figure.draw_without_rendering()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["embed", *(f"blocks/{i}" for i in range(14)), "head"]
    assert len({line.get_color() for line in ax.get_lines()}) == len(legend)
    colours = [line.get_color() for line in ax.get_lines()[1::2]]
    assert colours[1] == colours[2] == colours[3] == colours[4] != colours[5]


def test_names_at_the_ends_of_lines_do_not_overlap_and_are_in_the_picture():
    rates = {name: np.geomspace(1, 0.1, 5) for name in names_of(10)}
    ax = plot.learning_rates((range(5), rates))
    ax.figure.draw_without_rendering()
    boxes = sorted(map(Text.get_window_extent, ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 10
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0 + 1
    for box in boxes:
        assert box.x0 >= ax.get_window_extent().x1
        assert box.x1 <= ax.figure.bbox.x1 + 1
        assert box.y0 >= 0
        assert box.y1 <= ax.figure.bbox.y1 + 1


def test_few_lines_differ_in_colour_and_neighbours_in_dashes():
    rates = {name: np.full(3, 0.1) for name in names_of(8)}
    bold = plot.learning_rates((range(3), rates)).get_lines()[1::2]
    assert len({line.get_color() for line in bold}) == 8
    dashes = [line._dash_pattern for line in bold]
    assert all(one != two for one, two in itertools.pairwise(dashes))


@pytest.mark.parametrize("count", [11, 60, 200])
def test_the_legend_of_many_lines_hides_none_of_them(count):
    rates = {name: np.full(3, 0.1) for name in names_of(count)}
    ax = plot.learning_rates((range(3), rates))
    ax.figure.draw_without_rendering()
    box, figure = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert box.x0 >= ax.get_window_extent().x1
    assert box.y0 >= figure.y0 - 1
    assert box.y1 <= figure.y1 + 1
    assert box.x1 <= figure.x1 + 1


def test_decreases_are_points_with_the_line_that_they_should_be_on():
    predicted, actual = [0.4, np.nan, 0.2, 0.05], [0.3, 0.1, 0.1, 0.1]
    ax = plot.predicted_vs_actual((range(4), predicted, actual))
    (points,) = ax.collections
    shown = [[0.4, 0.3], [0.2, 0.1], [0.05, 0.1]]
    np.testing.assert_array_equal(points.get_offsets(), shown)
    np.testing.assert_array_equal(points.get_array(), [0, 2, 3])
    (diagonal,) = ax.get_lines()
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_steps_that_went_uphill_are_drawn_and_the_diagonal_stays_straight():
    ax = plot.predicted_vs_actual((range(3), [0.1, 0.2, 0.4], [-0.3, 0.1, 0.2]))
    ax.figure.draw_without_rendering()
    assert ax.get_xscale() == ax.get_yscale() == "symlog"
    thresholds = {axis.get_transform().linthresh for axis in (ax.xaxis, ax.yaxis)}
    assert len(thresholds) == 1
    assert ax.get_ylim()[0] < -0.3


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.nan, np.inf]])
def test_decreases_without_a_scale_are_no_error(values):
    steps = range(len(values))
    plot.predicted_vs_actual((steps, values, values)).figure.draw_without_rendering()


def test_decreases_must_be_as_many_as_the_predictions():
    with pytest.raises(ValueError, match="history: 3 steps, 3 predicted and 2 actual"):
        plot.predicted_vs_actual((range(3), [1, 2, 3], [1, 2]))


def test_learning_rates_want_a_value_for_each_step():
    with pytest.raises(ValueError, match="history: 'kernel' has 2 values for 3 steps"):
        plot.learning_rates((range(3), {"kernel": [0.1, 0.2]}))


def test_losses_draw_one_curve_each_and_leave_out_what_is_not_finite():
    histories = {"adam": ([0, 1], [2.0, 1.0]), "sgd": ([0, 1], [2.0, np.inf])}
    ax = plot.losses(histories, ylabel="test loss", log=False)
    ax.figure.draw_without_rendering()
    adam, sgd = ax.get_lines()
    assert adam.get_ydata().tolist() == [2, 1]
    np.testing.assert_array_equal(sgd.get_ydata(), [2, np.nan])
    assert ax.get_ylabel() == "test loss"
    assert ax.get_yscale() == "linear"


# --- Trees, reports and training runs ---------------------------------------------


def suggestion(size=7, **options):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(size, 2 * size))
    hessian = factor @ factor.T
    summary = pn.Summary(np.array(1.0), np.exp(rng.normal(size=size)), hessian, None)
    params = {f"tensor{s}": np.zeros(2, np.float32) for s in range(size)}
    return pn.suggest_partition(summary, params, **options)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_dendrogram_has_a_line_for_each_merge_at_its_loss(count):
    suggested = suggestion(count=count)
    ax = plot.dendrogram(suggested)
    ax.figure.draw_without_rendering()
    forks = [line.get_xdata() for line in ax.get_lines() if len(line.get_xdata()) == 4]
    lost = [max(merge.lost, 1e-4) for merge in suggested.merges]
    np.testing.assert_allclose([fork[1] for fork in forks], lost)
    colours = [x.get_color() for x in ax.get_lines() if len(x.get_xdata()) == 4]
    assert sum(colour != "0.6" for colour in colours) == 7 - count
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(labels) == sorted(suggested.names)


def test_the_lines_of_a_dendrogram_do_not_cross():
    suggested = suggestion(count=1)
    labels = plot.dendrogram(suggested).get_yticklabels()
    row = {label.get_text(): i for i, label in enumerate(labels)}
    for count in range(1, 8):  # the rows of each cluster are consecutive
        for cluster in suggested.cut(count=count).clusters:
            rows = sorted(row[suggested.names[s]] for s in cluster)
            assert rows == list(range(rows[0], rows[0] + len(rows)))


def training(steps=25):
    """States of an optimizer, one per refresh, and the decreases of the loss."""

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - 1.0) ** 2)

    x = jax.random.normal(jax.random.key(0), (16, 3))
    params = {"in": jnp.eye(3), "out": jnp.ones(3) / 9}
    rule = pn.rules.cubic()
    tx = optax.chain(pn.scale_by_partition_newton(rule), optax.scale(-1.0))
    state, states, actual = tx.init(params), [], []
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p, value_fn=loss))
    for _ in range(steps):
        updates, state = step(params, state)
        before, params = loss(params), optax.apply_updates(params, updates)
        states.append(state)
        actual.append(float(before - loss(params)))
    return states, actual


def test_a_dashboard_shows_the_run_in_one_call():
    states, actual = training()
    figure = plot.dashboard(states, actual_decrease=actual)
    figure.draw_without_rendering()
    loss, rates, matrix, decreases = figure.axes[:4]
    np.testing.assert_array_equal(loss.get_lines()[0].get_xdata(), range(25))
    found = [float(pn.newton_state(s).loss) for s in states]
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), found)
    assert len(rates.get_lines()) >= 4
    last = pn.newton_state(states[-1])
    np.testing.assert_allclose(drawn(matrix), plot.correlation(last.hessian))
    predicted = [float(pn.newton_state(s).predicted_decrease) for s in states]
    (points,) = decreases.collections
    np.testing.assert_allclose(points.get_offsets(), np.transpose([predicted, actual]))
    with pytest.raises(ValueError, match="25 steps"):
        plot.dashboard(states, actual_decrease=actual[1:])


@pytest.mark.slow
def test_a_dashboard_needs_only_the_small_state_and_no_decreases():
    states, _ = training(3)
    small = [jax.device_get(pn.newton_state(state)) for state in states]
    plot.dashboard(small).draw_without_rendering()
    with pytest.raises(ValueError, match="states is empty"):
        plot.dashboard([])


@pytest.mark.parametrize("count", [1, 4, 6])
def test_interactions_over_time_are_panels_with_the_first_and_the_last_state(count):
    states, _ = training()
    figure = plot.interactions_over_time(states, count=count)
    figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.get_images() and ax.get_title()]
    titles = [ax.get_title() for ax in panels]
    assert len(titles) == count
    assert titles[0] == "step 0"
    assert count == 1 or titles[-1] == "step 24"
    for ax, title in zip(panels, titles, strict=True):
        state = pn.newton_state(states[int(title.split()[1])])
        np.testing.assert_allclose(drawn(ax), plot.correlation(state.hessian))


# --- Composition -----------------------------------------------------------------

PICTURES = {
    "hessian": lambda ax: plot.hessian(summary_of(np.eye(3)), names_of(3), ax),
    "learning_rates": lambda ax: plot.learning_rates((range(2), {"a": [1, 2]}), ax),
    "predicted_vs_actual": lambda ax: plot.predicted_vs_actual(
        (range(2), [0.2, 0.1], [0.1, 0.1]), ax
    ),
    "losses": lambda ax: plot.losses({"adam": ([0, 1], [2.0, 1.0])}, ax),
    "dendrogram": lambda ax: plot.dendrogram(suggestion(3), ax),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_are_drawn_on_the_axes_they_are_given(picture):
    left, right = Figure(layout="constrained").subplots(1, 2)
    assert PICTURES[picture](right) is right
    assert not left.has_data()
    assert right.has_data()


@pytest.mark.slow
def test_pyplot_is_left_alone():
    code = (
        "import sys, types; from partnewton import plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot.hessian(types.SimpleNamespace(hessian=[[1.0]]), ['a'])\n"
        "plot.learning_rates(([0], {'a': [1.0]}))\n"
        "plot.losses({'a': ([0], [1.0])})\n"
        "plot.predicted_vs_actual(([0], [1.0], [1.0]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("picture", PICTURES)
def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "partnewton\[plot\]"'):
        PICTURES[picture](None)
