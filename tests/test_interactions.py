"""Suggested partitions: costs of merging against brute force, and known structures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import some

import partnewton as pn
from partnewton.partitions import FROZEN


def random_summary(size, seed=0, noise=0.0):
    """A summary with a positive definite Hessian and a positive Newton decrease."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(size, 2 * size))
    scale = np.exp(rng.normal(size=size))
    hessian = scale[:, None] * (factor @ factor.T / size + np.eye(size)) * scale
    gradient = scale * (1 + noise * rng.normal(size=size))
    return pn.Summary(np.array(1.0), gradient, hessian, None)


def params_of(size):
    return {f"tensor{s}": np.zeros(3, np.float32) for s in range(size)}


def decrease(summary, clusters):
    """The decrease of the quadratic model if clusters share a rate, by brute force."""
    members = np.zeros((len(summary.gradient), len(clusters)))
    for c, cluster in enumerate(clusters):
        members[list(cluster), c] = 1
    g, h = members.T @ summary.gradient, members.T @ summary.hessian @ members
    return g @ np.linalg.solve(h, g) / 2


def clusters_after(suggested, made):
    return suggested.cut(count=len(suggested.names) - made).clusters


# --- The costs ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_each_merge_is_the_difference_of_the_minima(seed):
    summary = random_summary(6, seed)
    suggested = pn.suggest_partition(summary, params_of(6))
    whole = decrease(summary, [(s,) for s in range(6)])
    for made, merge in enumerate(suggested.merges, start=1):
        left = decrease(summary, clusters_after(suggested, made))
        np.testing.assert_allclose(merge.lost, 1 - left / whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_each_merge_is_the_cheapest_one(seed):
    summary = random_summary(6, seed)
    suggested = pn.suggest_partition(summary, params_of(6))
    for made in range(5):
        before = clusters_after(suggested, made)
        candidates = [
            decrease(summary, [x for x in before if x not in (a, b)] + [a + b])
            for a, b in itertools.combinations(before, 2)
        ]
        after = decrease(summary, clusters_after(suggested, made + 1))
        np.testing.assert_allclose(after, max(candidates), rtol=1e-9)


def test_the_costs_of_several_summaries_are_averaged_relative_to_their_decreases():
    many = [random_summary(5, seed) for seed in range(4)]
    many[1] = many[1]._replace(
        gradient=1e3 * many[1].gradient, hessian=1e3 * many[1].hessian
    )
    suggested = pn.suggest_partition(many, params_of(5), count=3)
    finest = [(s,) for s in range(5)]
    lost = [1 - decrease(s, suggested.clusters) / decrease(s, finest) for s in many]
    np.testing.assert_allclose(suggested.lost, np.mean(lost), rtol=1e-6)
    stacked = pn.Summary(
        *(np.stack(x) for x in list(zip(*many, strict=True))[:3]), None
    )
    again = pn.suggest_partition(stacked, params_of(5), count=3)
    assert again.clusters == suggested.clusters


def test_the_tree_is_invariant_under_the_scale_of_the_loss():
    summary = random_summary(6)
    scaled = summary._replace(
        gradient=1e-20 * summary.gradient, hessian=1e-20 * summary.hessian
    )
    one, two = (pn.suggest_partition(s, params_of(6)) for s in (summary, scaled))
    assert [m[:2] for m in one.merges] == [m[:2] for m in two.merges]


def test_losses_do_not_decrease_along_the_tree():
    lost = [
        m.lost for m in pn.suggest_partition(random_summary(9), params_of(9)).merges
    ]
    assert lost == sorted(lost)
    assert lost[0] >= 0
    assert lost[-1] <= 1


# --- Known structures -----------------------------------------------------------------


def quadratic(curvatures):
    """A loss with one curvature per tensor: tensors of equal curvature share a rate."""

    def loss(params):
        return sum(c * jnp.sum(params[k] ** 2) / 2 for k, c in curvatures.items())

    keys = jax.random.split(jax.random.key(0), len(curvatures))
    params = {
        k: jax.random.normal(x, (4,)) for k, x in zip(curvatures, keys, strict=True)
    }
    return loss, params


def test_tensors_with_equal_curvatures_are_found():
    curvatures = {"a": 1.0, "b": 100.0, "c": 1.0, "d": 7.0, "e": 100.0, "f": 1.0}
    loss, params = quadratic(curvatures)
    summary = pn.summarize(loss, params, jax.grad(loss)(params))
    suggested = pn.suggest_partition(summary, params, max_lost=1e-4)
    found = {tuple(suggested.names[s] for s in x) for x in suggested.clusters}
    assert found == {("a", "c", "f"), ("b", "e"), ("d",)}
    assert suggested.lost < 1e-5


def test_two_factors_of_one_product_are_merged_and_an_independent_tensor_is_not():
    def loss(params):
        product = (
            params["left"] * params["right"]
        )  # only their sum of logarithms counts
        return jnp.log(product) ** 2 + 30 * (params["other"] - 1) ** 2

    params = {"left": jnp.array(2.0), "right": jnp.array(2.0), "other": jnp.array(2.0)}
    summary = pn.summarize(loss, params, jax.grad(loss)(params))
    suggested = pn.suggest_partition(summary, params, count=2)
    assert suggested.labels["left"] == suggested.labels["right"]
    assert suggested.labels["left"] != suggested.labels["other"]
    assert suggested.lost < 1e-3


@pytest.mark.slow
def test_the_summary_of_the_suggestion_keeps_the_predicted_decrease():
    loss, params = quadratic({"a": 1.0, "b": 2.0, "c": 50.0, "d": 80.0})
    grads = jax.grad(loss)(params)
    fine = pn.summarize(loss, params, grads)
    suggested = pn.suggest_partition(fine, params, count=2)
    coarse = pn.summarize(loss, params, grads, param_labels=suggested)
    newton = pn.rules.newton()
    kept = newton(coarse).predicted_decrease / newton(fine).predicted_decrease
    np.testing.assert_allclose(kept, 1 - suggested.lost, rtol=1e-5)


@pytest.mark.parametrize("normalize", some(["rms", "norm", None], default=["rms"]))
def test_a_state_is_that_of_the_direction_before_it_was_normalised(normalize):
    loss, params = quadratic({"a": 1.0, "b": 1.0, "c": 30.0})
    params = params | {"a": 5 * params["a"]}
    grads = jax.grad(loss)(params)
    expected = pn.suggest_partition(pn.summarize(loss, params, grads), params)
    tx = pn.scale_by_partition_newton(normalize=normalize)
    _, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    found = pn.suggest_partition(state, params)
    assert found.clusters == expected.clusters == ((0, 1), (2,))
    np.testing.assert_allclose(
        [x.lost for x in found.merges], [x.lost for x in expected.merges], atol=1e-5
    )
    if normalize:
        wrong = pn.suggest_partition(state.summary, params)
        assert wrong.clusters != expected.clusters
    again = pn.suggest_partition([state, state, state], params)
    assert again.clusters == expected.clusters
    stacked = jax.tree.map(lambda *x: jnp.stack(x), state, state, state)
    assert pn.suggest_partition(stacked, params).clusters == expected.clusters


def test_what_is_neither_a_summary_nor_a_state_is_an_error_that_says_what_to_pass():
    loss, params = quadratic({"a": 1.0, "b": 2.0})
    report = pn.report(loss, params, measure_cost=False)
    with pytest.raises(TypeError, match=r"got Report\. Pass its attribute summary"):
        pn.suggest_partition(report, params)
    state = pn.partition_newton().init(params)
    with pytest.raises(TypeError, match=r"^summaries must be .* newton_state\(state\)"):
        pn.suggest_partition(state, params)


def test_an_indefinite_hessian_has_the_costs_of_its_absolute_value():
    summary = random_summary(3)
    signs = np.array([1.0, -1.0, 1.0])
    diagonal = np.diag(np.diagonal(summary.hessian))
    one = summary._replace(hessian=diagonal)
    two = summary._replace(hessian=diagonal * signs)
    found = [pn.suggest_partition(s, params_of(3)).merges for s in (one, two)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_subsets_without_curvature_are_merged_last():
    summary = random_summary(4)
    hessian = summary.hessian.copy()
    hessian[1], hessian[:, 1] = 0, 0
    suggested = pn.suggest_partition(summary._replace(hessian=hessian), params_of(4))
    assert suggested.merges[-1].second == 1
    assert suggested.merges[-1].lost == 1
    assert (1,) in suggested.cut(count=2).clusters
    assert suggested.cut(count=1).clusters == ((0, 1, 2, 3),)
    flat = summary._replace(hessian=np.zeros((4, 4)))
    flat = pn.suggest_partition(flat, params_of(4))
    assert flat.clusters == ((0,), (1,), (2,), (3,))
    assert flat.cut(count=1).clusters == ((0, 1, 2, 3),)


def test_a_rate_that_is_noise_is_named():
    rng = np.random.default_rng(0)
    many = [
        pn.Summary(
            np.array(1.0),
            np.array([1.0, 1.0, 0.3 * rng.normal()]),
            np.diag([1.0, 2.0, 1.0]) * rng.uniform(0.1, 10),
            None,
        )
        for _ in range(40)
    ]
    suggested = pn.suggest_partition(many, params_of(3))
    assert suggested.noisy == ("tensor2",)
    assert "vary more than their mean: tensor2" in str(suggested)
    assert pn.suggest_partition(many[:2], params_of(3)).noisy == ()


# --- As a value for param_labels ------------------------------------------------------


def test_a_suggestion_is_a_partition_of_an_optimizer():
    loss, params = quadratic({"a": 1.0, "b": 1.0, "c": 30.0})
    grads = jax.grad(loss)(params)
    suggested = pn.suggest_partition(pn.summarize(loss, params, grads), params)
    assert pn.subset_names(params, suggested) == ("a +1", "c")
    tx = pn.partition_newton(param_labels=suggested)
    state = tx.init(params)
    _, state = tx.update(grads, state, params, value_fn=loss)
    assert list(pn.learning_rates(state)) == ["a +1", "c"]


def test_labels_inside_leaves_and_frozen_entries_are_kept():
    params = {
        "a": np.zeros(4, np.float32),
        "b": np.zeros(2, np.float32),
        "c": params_of(1),
    }
    labels = {"a": np.array([0, 1, FROZEN, 0]), "b": "b", "c": FROZEN}
    assert pn.subset_names(params, labels) == ("a[0]", "a[1]", "b")
    hessian = np.diag([1.0, 50.0, 1.0])
    summary = pn.Summary(np.array(1.0), np.ones(3), hessian, None)
    suggested = pn.suggest_partition(summary, params, param_labels=labels)
    found = suggested(params)
    np.testing.assert_array_equal(found["a"], [0, 1, FROZEN, 0])
    assert found["b"] == 0
    assert found["c"] == {"tensor0": FROZEN}
    assert len(pn.subset_names(params, suggested)) == 2


def test_a_suggestion_for_other_parameters_is_an_error():
    suggested = pn.suggest_partition(random_summary(3), params_of(3))
    with pytest.raises(ValueError, match=r"^params: a partition into 4 subsets"):
        suggested(params_of(4))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"gradient": np.ones(2)}, {}, "^summaries: the partition of params has 3"),
        (
            {"hessian": np.ones((1, 3, 3))},
            {},
            "^summaries: the partition of params has",
        ),
        ({"gradient": np.full(3, np.nan)}, {}, "not finite"),
        ({"gradient": np.zeros(3)}, {}, "no decrease is predicted"),
        ({}, {"count": 4}, "^count must be from 1 to 3, got 4"),
        ({}, {"max_lost": -1.0}, "^max_lost must"),
        ({}, {"min_eigenvalue": 0.0}, "^min_eigenvalue must"),
    ],
)
def test_errors_name_the_argument(change, options, message):
    summary = random_summary(3)._replace(**change)
    with pytest.raises(ValueError, match=message):
        pn.suggest_partition(summary, params_of(3), **options)


def test_no_summaries_and_an_ambiguous_cut_are_errors():
    with pytest.raises(ValueError, match=r"^summaries is empty"):
        pn.suggest_partition([], params_of(3))
    with pytest.raises(ValueError, match="either max_lost or count"):
        pn.suggest_partition(random_summary(3), params_of(3)).cut()


def test_a_strong_interaction_is_not_sufficient_for_a_common_rate():
    hessian = np.array([[1.0, 0.99], [0.99, 1.0]])
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    lost = [
        pn.suggest_partition(
            pn.Summary(np.array(1.0), np.array(slopes), hessian, None), params, count=1
        ).lost
        for slopes in ([1.0, 1.0], [1.0, 0.5])
    ]
    assert lost[0] < 1e-6
    assert lost[1] > 0.9
