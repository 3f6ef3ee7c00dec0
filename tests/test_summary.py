"""Summaries: the facts of the mathematics, and what the interface promises."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import models
from support.oracles import (
    CentralDifferences,
    Split,
    Tensors,
    assert_close,
    by_forward_mode,
    diagonal,
    quick_jit,
    split_from_labels,
    split_of,
)
from support.selection import some

import partnewton as pn
from partnewton.engines import ENGINES
from partnewton.partitions import FROZEN

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))
# By default the engine that is the default, where it is expensive to run both.
adjoint_by_default = pytest.mark.parametrize(
    "engine", some(sorted(ENGINES), default=["adjoint"])
)
each_model = pytest.mark.parametrize("name", some(models.MODELS, default=["mlp"]))


@pytest.fixture
def x64():
    """Float64 for the length of a test; float32 is what the others run in."""
    with jax.enable_x64(True):
        yield


def squares_and_frozen_entries(params):
    """Labels inside leaves: two subsets across all leaves, and entries in none."""
    split = split_of(params, lambda i, place: place % (2 if i else 3) - (i == 0))
    return split.tree(params)


PARTITIONS = {
    "per_tensor": pn.partitions.per_tensor,
    "whole": pn.partitions.whole,
    "weights_biases": pn.partitions.weights_biases,
    "per_layer": pn.partitions.per_layer,
    "by_path": pn.partitions.by_path([("kernel|qkv", "a"), ("bias", FROZEN), ("", 3)]),
    "blocks": pn.partitions.blocks(2),
    "alternate": pn.partitions.alternate(2),
    "squares": squares_and_frozen_entries,
}


def sixths(params):
    """Finer than all of the above: the places of entries modulo 6."""
    return split_of(params, lambda i, place: 6 * i + place % 6)


@functools.cache
def problem_and_oracle(name) -> tuple[models.Problem, Split, Tensors]:
    """A model, a fine partition of it, and all derivatives along that."""
    problem = models.make(name, jnp.float64)
    split = sixths(problem.params)
    return problem, split, by_forward_mode(problem, split)


@functools.cache
def summaries(name, engine) -> dict[str, pn.Summary]:
    """The summaries of a model over all partitions, from one compilation."""
    problem, _, _ = problem_and_oracle(name)

    def compute(params, direction):
        return {
            key: pn.summarize(
                problem.loss, params, direction, param_labels=labels, engine=engine
            )
            for key, labels in PARTITIONS.items()
        }

    return quick_jit(compute)(problem.params, problem.direction)


def in_batches(engine, batch_size):
    """The engine of a name with a number of subsets at once."""
    return dataclasses.replace(pn.engines.get(engine), batch_size=batch_size)


def summarize_mlp(engine, direction=None, params=None, **kwargs):
    """The summary of the MLP, in float64."""
    problem, _, _ = problem_and_oracle("mlp")
    direction = problem.direction if direction is None else direction
    params = problem.params if params is None else params
    return quick_jit(
        lambda p, u: pn.summarize(problem.loss, p, u, engine=engine, **kwargs)
    )(params, direction)


def assert_summaries_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_summaries_close(actual, expected, rtol):
    for field in expected._fields:
        want = getattr(expected, field)
        if want is not None:
            assert_close(getattr(actual, field), want, rtol, field)


# --- Against phi ---------------------------------------------------------------------


@adjoint_by_default
@each_model
def test_finite_differences_of_phi_agree(x64, name, engine):
    problem, split, _ = problem_and_oracle(name)
    differences = CentralDifferences(problem, split)
    for key, labels in PARTITIONS.items():
        coarse = split_from_labels(problem.params, labels(problem.params))
        expected = differences.tensors(split.incidence(coarse))
        summary = summaries(name, engine)[key]
        assert_close(summary.value, expected.value, 1e-14, key)
        assert_close(summary.gradient, expected.gradient, 1e-9, key)
        assert_close(summary.hessian, expected.hessian, 1e-7, key)
        assert_close(summary.third, expected.third, 1e-5, key)


@adjoint_by_default
@each_model
def test_merging_subsets_adds_entries(x64, name, engine):
    problem, split, fine = problem_and_oracle(name)
    for key, labels in PARTITIONS.items():
        coarse = split_from_labels(problem.params, labels(problem.params))
        expected = fine.merged(split.incidence(coarse))
        summary = summaries(name, engine)[key]
        assert_close(summary.gradient, expected.gradient, 1e-11, key)
        assert_close(summary.hessian, expected.hessian, 1e-11, key)
        assert_close(summary.third, diagonal(expected.third), 1e-11, key)


@adjoint_by_default
@each_model
def test_the_hessian_is_symmetric_to_the_last_bit(x64, name, engine):
    for key, summary in summaries(name, engine).items():
        np.testing.assert_array_equal(summary.hessian, summary.hessian.T, key)


@adjoint_by_default
@each_model
def test_axes_are_in_the_order_of_the_names(x64, name, engine):
    problem, _, _ = problem_and_oracle(name)
    gradient = quick_jit(jax.grad(problem.loss))(problem.params)
    products = jax.tree.map(lambda g, u: jnp.sum(g * u), gradient, problem.direction)
    by_name = dict(
        zip(pn.partitions.leaf_names(gradient), jax.tree.leaves(products), strict=True)
    )
    names = pn.subset_names(problem.params)
    expected = [by_name[x] for x in names]
    assert_close(summaries(name, engine)["per_tensor"].gradient, expected, 1e-12, "")


@adjoint_by_default
@each_model
def test_one_subset_an_entry_is_the_hessian_itself(x64, name, engine):
    problem, _, _ = problem_and_oracle(name)
    flat, unravel = ravel_pytree(problem.params)
    ones = jax.tree.map(jnp.ones_like, problem.params)

    def flat_loss(x):
        return problem.loss(unravel(x))

    summary = quick_jit(
        lambda p: pn.summarize(
            problem.loss,
            p,
            ones,
            param_labels=pn.partitions.per_element,
            third_order=False,
            engine=engine,
        )
    )(problem.params)
    oracle = quick_jit(lambda x: (jax.grad(flat_loss)(x), jax.hessian(flat_loss)(x)))
    gradient, hessian = oracle(flat)
    assert_close(summary.gradient, gradient, 1e-12, "gradient")
    assert_close(summary.hessian, hessian, 1e-12, "hessian")


# --- Closed forms --------------------------------------------------------------------


def quadratic():
    """1/2 x'Ax - b'x + 3 with x split over a dict; A is positive definite."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(7, 7))
    a, b = root @ root.T + np.eye(7), rng.normal(size=7)
    params = {"m": jnp.asarray(rng.normal(size=(2, 2))), "v": jnp.ones(3)}

    def loss(p):
        x = jnp.concatenate([p["m"].ravel(), p["v"]])
        return x @ a @ x / 2 - b @ x + 3.0

    return loss, params, a, b


@each_engine
def test_a_quadratic_has_its_closed_form(x64, engine):
    loss, params, a, b = quadratic()
    x, _ = ravel_pytree(params)
    u = np.random.default_rng(1).normal(size=7)
    direction = {"m": jnp.asarray(u[:4].reshape(2, 2)), "v": jnp.asarray(u[4:])}
    labels = {"m": np.array([[0], [1]]), "v": "v"}
    parts = u * np.array(
        [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0] * 4 + [1] * 3]
    )
    summary = pn.summarize(loss, params, direction, param_labels=labels, engine=engine)
    np.testing.assert_allclose(summary.value, x @ a @ x / 2 - b @ x + 3, rtol=1e-13)
    np.testing.assert_allclose(summary.gradient, parts @ (a @ x - b), rtol=1e-12)
    np.testing.assert_allclose(summary.hessian, parts @ a @ parts.T, rtol=1e-12)
    assert_close(summary.third, np.zeros(3), 1e-13, "third", floor=1.0)


def polynomial(x):
    """The monomials of ``POLYNOMIAL``, over a dict of three scalars and a pair."""
    y = [x["a"], x["b"], x["c"][0], x["c"][1]]
    return sum(
        coefficient * math.prod(y[i] ** n for i, n in enumerate(powers) if n)
        for coefficient, powers in POLYNOMIAL
    )


POLYNOMIAL = [(2.0, (2, 1, 1, 0)), (-1.0, (1, 3, 0, 0)), (0.5, (0, 0, 2, 3))]


def derivative_of_polynomial(x, u, indices):
    """D^d of the polynomial along the entries `indices`, by the rule for powers."""
    total = 0.0
    for coefficient, powers in POLYNOMIAL:
        term = coefficient
        for i, power in enumerate(powers):
            n = indices.count(i)
            term *= math.perm(power, n) * (x[i] ** (power - n) if n <= power else 0)
        total += term
    return total * math.prod(u[i] for i in indices)


@pytest.mark.slow
@adjoint_by_default
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivative_tensors_of_a_polynomial_have_their_closed_form(x64, order, engine):
    x, u = [1.5, -0.5, 2.0, 0.75], [1.0, -2.0, 0.5, 3.0]
    tensors = pn.derivative_tensors(
        polynomial,
        {"a": jnp.asarray(x[0]), "b": jnp.asarray(x[1]), "c": jnp.asarray(x[2:])},
        {"a": jnp.asarray(u[0]), "b": jnp.asarray(u[1]), "c": jnp.asarray(u[2:])},
        order=order,
        param_labels=pn.partitions.per_element,
        engine=engine,
    )
    assert [t.shape for t in tensors] == [(4,) * d for d in range(1, order + 1)]
    for d, tensor in enumerate(tensors, start=1):
        expected = np.empty((4,) * d)
        for indices in np.ndindex(*expected.shape):
            expected[indices] = derivative_of_polynomial(x, u, indices)
        np.testing.assert_allclose(tensor, expected, rtol=1e-13, atol=1e-13)


# The reference differentiates phi as the oracle does: one model is enough for it.
TENSORS = [*(("adjoint", name) for name in models.MODELS), ("jvp_of_grad", "mlp")]


@pytest.mark.parametrize(
    "case", some(TENSORS, default=[("adjoint", "mlp")]), ids=lambda case: "-".join(case)
)
def test_derivative_tensors_agree_with_phi_and_with_the_summary(x64, case):
    engine, name = case
    problem, split, fine = problem_and_oracle(name)
    labels = PARTITIONS["squares"](problem.params)
    coarse = split_from_labels(problem.params, labels)
    expected = fine.merged(split.incidence(coarse))
    tensors, aux = quick_jit(
        lambda p, u: pn.derivative_tensors(
            lambda p: (problem.loss(p), {"seven": 7.0}),
            p,
            u,
            order=3,
            param_labels=labels,
            engine=in_batches(engine, 2),
            has_aux=True,
        )
    )(problem.params, problem.direction)
    assert aux == {"seven": 7.0}
    for tensor, want in zip(tensors, expected[1:], strict=True):
        assert_close(tensor, want, 1e-11, name)
        np.testing.assert_array_equal(tensor, tensor.T)
    summary = summaries(name, engine)["squares"]
    assert_close(summary.third, diagonal(np.asarray(tensors[2])), 1e-11, name)


@each_engine
def test_an_unused_leaf_has_zero_derivatives(x64, engine):
    params = {"idle": jnp.ones(3), "used": jnp.ones(2)}
    summary = pn.summarize(
        lambda p: jnp.sum(p["used"] ** 3), params, params, engine=engine
    )
    np.testing.assert_array_equal(summary.gradient, [0.0, 6.0])
    np.testing.assert_array_equal(summary.hessian, [[0.0, 0.0], [0.0, 12.0]])
    np.testing.assert_array_equal(summary.third, [0.0, 12.0])


# --- The two ends: Cauchy and Newton -------------------------------------------------


@adjoint_by_default
@each_model
def test_one_subset_is_steepest_descent_with_the_step_of_cauchy(x64, name, engine):
    problem, _, _ = problem_and_oracle(name)
    gradient = quick_jit(jax.grad(problem.loss))(problem.params)
    g, unravel = ravel_pytree(gradient)
    x, _ = ravel_pytree(problem.params)
    slope = jax.grad(lambda x: problem.loss(unravel(x)))
    hg = quick_jit(lambda x, g: jax.jvp(slope, (x,), (g,))[1])(x, g)
    summary = quick_jit(
        lambda p, u: pn.summarize(
            problem.loss, p, u, param_labels=pn.partitions.whole, engine=engine
        )
    )(problem.params, gradient)
    rates = pn.rules.newton(nonnegative=False)(summary).learning_rates
    np.testing.assert_allclose(rates, [(g @ g) / (g @ hg)], rtol=1e-10)


@pytest.mark.slow
@adjoint_by_default
def test_one_subset_an_entry_is_newtons_step_in_any_direction(x64, engine):
    loss, params, a, b = quadratic()
    x, unravel = ravel_pytree(params)
    direction = unravel(jnp.asarray(np.random.default_rng(2).uniform(0.1, 2.0, 7)))
    summary = pn.summarize(
        loss,
        params,
        direction,
        param_labels=pn.partitions.per_element,
        third_order=False,
        engine=engine,
    )
    rates = pn.rules.newton(nonnegative=False)(summary).learning_rates
    minimum = x - rates * ravel_pytree(direction)[0]
    np.testing.assert_allclose(minimum, np.linalg.solve(a, b), rtol=1e-9)


# --- Scaling -------------------------------------------------------------------------


@adjoint_by_default
@pytest.mark.parametrize("factor", some([-1.0, 0.25, 8.0, 3.0], default=[3.0]))
def test_the_summary_is_homogeneous_in_the_direction(x64, factor, engine):
    problem, _, _ = problem_and_oracle("mlp")
    before = summarize_mlp(engine)
    after = summarize_mlp(engine, jax.tree.map(lambda u: factor * u, problem.direction))
    expected = pn.Summary(
        before.value,
        factor * before.gradient,
        factor**2 * before.hessian,
        factor**3 * before.third,
    )
    if factor == 3.0:  # not a power of two: rounded
        assert_summaries_close(after, expected, rtol=1e-14)
    else:
        assert_summaries_equal(after, expected)


@pytest.mark.slow
@adjoint_by_default
def test_the_summary_is_linear_in_the_loss(x64, engine):
    problem, _, _ = problem_and_oracle("mlp")

    def other(p):
        return jnp.sum(jnp.sin(p["layer_0"]["kernel"])) * p["layer_2"]["bias"][0]

    def summarize(loss):
        return pn.summarize(loss, problem.params, problem.direction, engine=engine)

    both = summarize(lambda p: 0.5 * problem.loss(p) - 2.0 * other(p))
    expected = jax.tree.map(
        lambda x, y: 0.5 * x - 2.0 * y, summarize(problem.loss), summarize(other)
    )
    assert_summaries_close(both, expected, rtol=1e-13)


@pytest.mark.slow
@adjoint_by_default
def test_a_change_of_units_leaves_the_step_as_it_is(x64, engine):
    problem, _, _ = problem_and_oracle("mlp")
    leaves, treedef = jax.tree.flatten(problem.params)
    a = np.array([0.02, 3.0, 1.0, 40.0, 0.5, 7.0])  # theta_s = a_s theta'_s
    units = jax.tree.unflatten(treedef, list(a))

    def loss_in_units(p):
        return problem.loss(jax.tree.map(jnp.multiply, p, units))

    def summarize(loss, params):
        gradient = jax.grad(loss)(params)
        return gradient, pn.summarize(loss, params, gradient, engine=engine)

    u, ours = quick_jit(lambda p: summarize(problem.loss, p))(problem.params)
    params_in_units = jax.tree.map(jnp.divide, problem.params, units)
    v, theirs = quick_jit(lambda p: summarize(loss_in_units, p))(params_in_units)
    expected = pn.Summary(
        ours.value,
        a**2 * ours.gradient,
        np.outer(a**2, a**2) * ours.hessian,
        a**6 * ours.third,
    )
    for field in expected._fields:  # entry by entry: they differ by many magnitudes
        np.testing.assert_allclose(
            getattr(theirs, field), getattr(expected, field), rtol=1e-9, err_msg=field
        )
    for rule in (
        pn.rules.cubic(nonnegative=False),
        pn.rules.cubic(30.0, nonnegative=False),
        pn.rules.newton(nonnegative=False),
        pn.rules.diagonal(nonnegative=False),
    ):
        eta, eta_in_units = rule(ours).learning_rates, rule(theirs).learning_rates
        assert np.all(eta != 0)
        for s, scale in enumerate(a):
            step = eta[s] * jax.tree.leaves(u)[s]
            same_step = scale * eta_in_units[s] * jax.tree.leaves(v)[s]
            np.testing.assert_allclose(same_step, step, rtol=1e-7)
    assert len(leaves) == len(a)


# --- Under the transformations of jax ------------------------------------------------


@each_engine
def test_a_summary_is_the_same_with_and_without_jit(x64, engine):
    problem, _, _ = problem_and_oracle("mlp")
    eager = pn.summarize(problem.loss, problem.params, problem.direction, engine=engine)
    assert_summaries_close(summarize_mlp(engine), eager, rtol=1e-14)


@adjoint_by_default
def test_summaries_vmap_over_parameters(x64, engine):
    problem, _, _ = problem_and_oracle("mlp")
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p - 1]), problem.params)

    @quick_jit
    @jax.vmap
    def batched(params):
        return pn.summarize(problem.loss, params, problem.direction, engine=engine)

    together = batched(stack)
    for i in range(3):
        params = jax.tree.map(lambda p, i=i: p[i], stack)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_summaries_close(one, summarize_mlp(engine, params=params), rtol=1e-13)


@pytest.mark.slow
@adjoint_by_default
def test_summaries_run_inside_scan_and_cond(engine):
    problem = models.make("mlp", jnp.float32)

    def summary_at(params):
        return pn.summarize(problem.loss, params, problem.direction, engine=engine)

    def step(params, wanted):
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(summary_at, params)
        )
        summary = jax.lax.cond(wanted, summary_at, lambda _: empty, params)
        return jax.tree.map(lambda p: 0.9 * p, params), summary

    wanted = jnp.array([True, False, True])
    _, found = quick_jit(lambda p: jax.lax.scan(step, p, wanted))(problem.params)
    assert not np.any(found.hessian[1])
    later = jax.tree.map(lambda p: 0.9 * (0.9 * p), problem.params)
    expected = quick_jit(jax.vmap(summary_at))(
        jax.tree.map(lambda *x: jnp.stack(x), problem.params, later)
    )
    at_wanted = jax.tree.map(lambda x: x[wanted], found)
    assert_summaries_close(at_wanted, expected, rtol=1e-4)


# --- Number types --------------------------------------------------------------------


@adjoint_by_default
@pytest.mark.parametrize(
    "dtype", some([jnp.float16, jnp.bfloat16, jnp.float32], default=[jnp.bfloat16])
)
def test_low_precision_is_as_accurate_as_its_digits(dtype, engine):
    low = models.make("mlp", dtype)
    summary = quick_jit(
        lambda p, u: pn.summarize(low.loss, p, u, engine=engine)
    )(low.params, low.direction)  # fmt: skip
    assert {x.dtype for x in summary} == {np.dtype(np.float32)}
    with jax.enable_x64(True):
        rounded = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (low.params, low.direction)
        )
        problem = models.make("mlp", jnp.float64)
        problem = problem._replace(params=rounded[0], direction=rounded[1])
        split = split_of(problem.params, lambda i, _: i)
        exact = by_forward_mode(problem, split)
    digits = float(jnp.finfo(dtype).eps)
    assert_close(summary.value, exact.value, 2 * digits, "value")
    assert_close(summary.gradient, exact.gradient, 8 * digits, "gradient")
    assert_close(summary.hessian, exact.hessian, 8 * digits, "hessian")
    assert_close(summary.third, diagonal(exact.third), 16 * digits, "third")


@pytest.mark.slow
@adjoint_by_default
def test_the_sums_are_in_float64_if_an_active_leaf_is(x64, engine):
    params = {
        "double": jnp.ones(2, jnp.float64),
        "half": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones(2, jnp.float32),
    }

    def loss(p):
        return jnp.sum(p["double"] * p["half"] * p["single"] ** 2)

    def dtypes(**labels):
        labels = {"double": 0, "half": 1, "single": 2} | labels
        summary = pn.summarize(loss, params, params, param_labels=labels, engine=engine)
        return {x.dtype.name for x in summary}

    assert dtypes() == {"float64"}
    assert dtypes(half=FROZEN) == {"float64"}
    assert dtypes(double=FROZEN) == {"float32"}
    assert dtypes(double=FROZEN, single=FROZEN) == {"float32"}


@adjoint_by_default
def test_a_mixed_tree_has_exact_derivatives(x64, engine):
    params = {
        "half": jnp.array([1.0, 2.0], jnp.bfloat16),
        "single": jnp.array([3.0, -1.0], jnp.float32),
    }
    summary = pn.summarize(
        lambda p: jnp.sum(p["half"].astype(jnp.float32) * p["single"] ** 2),
        params,
        params,
        engine=engine,
    )
    np.testing.assert_array_equal(summary.gradient, [11.0, 22.0])
    np.testing.assert_array_equal(summary.hessian, [[0.0, 22.0], [22.0, 22.0]])
    np.testing.assert_array_equal(summary.third, [0.0, 0.0])


@each_engine
def test_the_direction_is_cast_to_the_type_of_the_parameters(x64, engine):
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.bfloat16)}
    direction = {"a": np.array([1, 2]), "b": np.array([1.0, 1.001])}
    summary = pn.summarize(
        lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"].astype(jnp.float32) ** 2),
        params,
        direction,
        engine=engine,
    )
    assert summary.gradient.dtype == np.float32
    np.testing.assert_array_equal(summary.gradient, [6.0, 4.0])  # 1.001 rounds to 1


@each_engine
def test_numpy_arrays_and_numbers_are_parameters_too(engine):
    params = {"a": np.array([1.0, 2.0], np.float32), "b": 3.0}
    summary = pn.summarize(
        lambda p: jnp.sum(p["a"]) * p["b"] ** 2, params, params, engine=engine
    )
    np.testing.assert_array_equal(summary.gradient, [27.0, 54.0])
    np.testing.assert_array_equal(summary.hessian, [[0.0, 54.0], [54.0, 54.0]])


# --- Options -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pn.engines.Adjoint, pn.engines.JvpOfGrad])
def test_a_batch_of_no_subsets_is_an_error(kind):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        kind(batch_size=0)


@pytest.mark.slow
@each_engine
@pytest.mark.parametrize("batch_size", [1, 3, 6, 100])
def test_the_batch_size_changes_no_number(x64, batch_size, engine):
    summary = summarize_mlp(in_batches(engine, batch_size))
    assert_summaries_close(summary, summarize_mlp(engine), rtol=1e-14)


@adjoint_by_default
def test_without_third_order_there_is_no_third(x64, engine):
    summary = summarize_mlp(engine, third_order=False)
    assert summary.third is None
    expected = summarize_mlp(engine)._replace(third=None)
    assert_summaries_close(summary, expected, rtol=1e-14)


@adjoint_by_default
@pytest.mark.parametrize("transform", some([lambda f: f, jax.jit], default=[jax.jit]))
def test_aux_is_returned_unchanged(x64, transform, engine):
    problem, _, _ = problem_and_oracle("mlp")

    def loss(p):
        aux = {"count": jnp.arange(3), "norm": jnp.sum(p["layer_0"]["bias"] ** 2)}
        return problem.loss(p), (aux, None)

    summary, (aux, nothing) = transform(
        lambda p: pn.summarize(loss, p, problem.direction, has_aux=True, engine=engine)
    )(problem.params)
    assert nothing is None
    np.testing.assert_array_equal(aux["count"], np.arange(3))
    norm = jnp.sum(problem.params["layer_0"]["bias"] ** 2)
    np.testing.assert_allclose(aux["norm"], norm, rtol=1e-15)
    assert_summaries_close(summary, summarize_mlp(engine), rtol=1e-14)


def test_auto_is_one_of_the_engines(x64):
    assert pn.engines.get("auto") in ENGINES.values()
    summary = summarize_mlp("auto")
    assert_summaries_close(summary, summarize_mlp("jvp_of_grad"), rtol=1e-12)


# --- Frozen leaves -------------------------------------------------------------------


@each_engine
def test_frozen_leaves_reach_the_loss_as_they_are(engine):
    params = {
        "count": np.int32(3),
        "key": jax.random.key(0),
        "still": jnp.ones(2),
        "w": jnp.ones(2),
    }
    seen = []

    def loss(p):
        seen.append({name: type(p[name]) for name in ("count", "key", "still")})
        noise = jax.random.normal(p["key"], (2,))
        return jnp.sum((p["w"] * p["still"] + noise) ** p["count"])

    labels = {"count": FROZEN, "key": FROZEN, "still": FROZEN, "w": "w"}
    summary = pn.summarize(loss, params, params, param_labels=labels, engine=engine)
    assert summary.gradient.shape == (1,)
    assert seen
    for kinds in seen:  # nothing is traced, so nothing is differentiated
        assert kinds == {name: type(params[name]) for name in kinds}


@each_engine
def test_frozen_entries_do_not_move(x64, engine):
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    direction = {"w": jnp.array([1.0, jnp.nan, 1.0])}
    summary = pn.summarize(
        lambda p: jnp.prod(p["w"]) ** 2,
        params,
        direction,
        param_labels={"w": np.array([0, FROZEN, 1])},
        engine=engine,
    )
    np.testing.assert_allclose(summary.hessian, [[72.0, 48.0], [48.0, 8.0]])


# --- Cost ----------------------------------------------------------------------------


def count(jaxpr, primitive, in_loops):
    """How often a primitive occurs in a jaxpr, inside or outside of its loops."""

    def jaxprs_of(eqn):
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield inner

    total = 0
    for eqn in jaxpr.eqns:
        loop = eqn.primitive.name in ("scan", "while")
        if not in_loops and eqn.primitive.name == primitive:
            total += 1
        for inner in jaxprs_of(eqn):
            if loop and in_loops:
                total += count(inner, primitive, True) + count(inner, primitive, False)
            elif not loop:
                total += count(inner, primitive, in_loops)
    return total


def test_the_reference_evaluates_the_loss_once_for_all_products_with_the_hessian():
    problem = models.make("mlp", jnp.float32)
    assert count(jax.make_jaxpr(problem.loss)(problem.params), "tanh", False) == 2

    def hessian(params):
        return pn.summarize(
            problem.loss,
            params,
            problem.direction,
            third_order=False,
            engine="jvp_of_grad",
        )

    jaxpr = jax.make_jaxpr(hessian)(problem.params)
    assert count(jaxpr, "tanh", in_loops=False) == 2
    assert count(jaxpr, "dot_general", in_loops=True) > 0
    assert count(jaxpr, "tanh", in_loops=True) == 0


@each_engine
def test_the_hessian_is_that_of_one_trace_of_the_loss(engine):
    """No engine calls value_fn once a subset: tracing a large model is slow."""
    problem = models.make("mlp", jnp.float32)
    calls = []

    def loss(p):
        calls.append(p)
        return problem.loss(p)

    jax.make_jaxpr(
        lambda p: pn.summarize(loss, p, problem.direction, engine=engine)
    )(problem.params)  # fmt: skip
    assert len(calls) <= 3 < len(jax.tree.leaves(problem.params))


# --- Mistakes ------------------------------------------------------------------------


def _loss(p):
    return jnp.sum(p["a"] ** 2) * p["b"]["c"]


def good():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones(())}}
    return {"value_fn": _loss, "params": params, "direction": params}


@pytest.mark.parametrize("function", [pn.summarize, pn.derivative_tensors])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value_fn": 3.0}, TypeError, r"value_fn must be a function .* got float"),
        (
            {"value_fn": lambda p: p["a"]},
            ValueError,
            r"value_fn must return a scalar loss, got shape \(3,\)",
        ),
        (
            {"value_fn": lambda p: p["a"].size},
            TypeError,
            r"value_fn must return a real floating point loss, got dtype int",
        ),
        (
            {"value_fn": lambda p: jnp.sum(p["a"]) * 1j},
            TypeError,
            r"value_fn must return a real floating point loss, got dtype complex64",
        ),
        (
            {"value_fn": lambda p: None},
            TypeError,
            r"value_fn must return a scalar loss",
        ),
        (
            {"value_fn": lambda p: (_loss(p), 1.0)},
            TypeError,
            r"value_fn must return a scalar loss, got a tuple; pass has_aux=True",
        ),
        (
            {"has_aux": True},
            TypeError,
            r"value_fn must return a pair \(loss, aux\) because has_aux=True, got",
        ),
        (
            {"has_aux": True, "value_fn": lambda p: (_loss(p), 1.0, 2.0)},
            TypeError,
            r"value_fn must return a pair \(loss, aux\)",
        ),
        (
            {"direction": {"a": jnp.ones(3)}},
            ValueError,
            r"direction has no leaf 'b/c', but params has one",
        ),
        (
            {"direction": {"a": jnp.ones(3), "b": {"c": 1.0}, "d": 1.0}},
            ValueError,
            r"direction has a leaf 'd', but params has none",
        ),
        (
            {"direction": {"a": jnp.ones((3, 1)), "b": {"c": 1.0}}},
            ValueError,
            r"direction: the leaf 'a' has shape \(3, 1\), but in params .* \(3,\)",
        ),
        (
            {"direction": {"a": jnp.ones(3) * 1j, "b": {"c": 1.0}}},
            TypeError,
            r"direction: the leaf 'a' has dtype complex64",
        ),
        (
            {"params": {"a": jnp.ones(3, complex), "b": {"c": jnp.ones(())}}},
            TypeError,
            r"params: the leaf 'a' has dtype complex",
        ),
        (
            {"params": {"a": jnp.ones(3), "b": {"c": jnp.ones((), int)}}},
            TypeError,
            r"params: the leaf 'b/c' has dtype int",
        ),
        ({"param_labels": {"a": "x"}}, ValueError, r"param_labels: the leaf 'b/c'"),
        ({"engine": "fast"}, ValueError, r"engine must be one of 'auto', .*got 'fast'"),
        ({"engine": pn.engines.Adjoint}, TypeError, r"engine must be a name or an"),
    ],
)
def test_arguments_that_do_not_fit_raise(function, transform, change, error, message):
    arguments = good() | change
    static = {k: v for k, v in arguments.items() if k not in ("params", "direction")}
    with pytest.raises(error, match=message):
        transform(lambda p, u: function(params=p, direction=u, **static))(
            arguments["params"], arguments["direction"]
        )


@pytest.mark.parametrize("order", [0, -1])
def test_an_order_below_one_raises(order):
    with pytest.raises(ValueError, match=f"order must be at least 1, got {order}"):
        pn.derivative_tensors(**good(), order=order)
