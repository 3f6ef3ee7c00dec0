"""Every engine, on every problem of the zoo, against the derivatives of phi."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.oracles import (
    FROZEN,
    Split,
    Tensors,
    assert_close,
    by_forward_mode,
    diagonal,
    quick_jit,
    split_of,
)
from support.selection import some

import partnewton as pn
from partnewton import engines
from partnewton.engines import ENGINES
from partnewton.engines.adjoint import lowerings

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))

# Those that run by default. Each operation by itself is in test_adjoint_operations.py,
# branches are in test_branches.py, calls of jax in test_adjoint_transformations.py.
SOME = (
    "mlp",
    "convolutional_network",
    "a_weight_used_three_times",
    "scan_over_layers",
    "while_loop_on_data",
    "custom_vjp",
)

# What an engine cannot do, and why: {(engine, name of the problem): reason}.
CANNOT: dict[tuple[str, str], str] = {}


def each_problem_with_each_engine(default):
    """Parametrises a test by (name, engine), with what is known to fail marked so.

    Args:
      default: the problems that run by default, those of the reference at most one.
    """
    cases = []
    for name in models.NAMES:
        for engine in sorted(ENGINES):
            reason = CANNOT.get((engine, name))
            marks = [pytest.mark.xfail(reason=reason)] if reason else []
            if name not in (default if engine == "adjoint" else default[:1]):
                marks.append(pytest.mark.slow)
            cases.append(pytest.param(name, engine, marks=marks))
    return pytest.mark.parametrize(("name", "engine"), cases)


def squares(params) -> Split:
    """A chequerboard on each leaf; all other partitions below are coarser."""
    return split_of(params, lambda i, place: 2 * i + place % 2)


def partial(params) -> Split:
    """Two subsets across all leaves, an entry here and there and a leaf frozen."""
    last = len(jax.tree.leaves(params)) - 1

    def label(i, place):
        if i == last > 1:
            return FROZEN
        return np.where((i == 0) & (place % 2 == 1), FROZEN, (i + place) % 2)

    return split_of(params, label)


SPLITS = {
    "squares": squares,
    "partial": partial,
    "per_tensor": lambda params: split_of(params, lambda i, _: i),
    "whole": lambda params: split_of(params, lambda i, _: 0),
}


# Inside of leaves and of whole leaves: programs of the adjoint engine differ most.
MOST_DIFFERENT = ("partial", "per_tensor")


@functools.cache
def oracle(name) -> tuple[models.Problem, Tensors]:
    """The problem in float64 and its derivatives along the finest of the splits."""
    if name == "convolutional_network" and jax.default_backend() != "cpu":
        pytest.skip("jax says that max pooling has no precise second derivative here.")
    with jax.enable_x64(True):
        problem = models.make(name, jnp.float64)
        return problem, by_forward_mode(problem, squares(problem.params))


def summaries(problem, engine, splits) -> dict[str, pn.Summary]:
    """Summaries over some splits, from one compilation."""
    trees = {key: SPLITS[key](problem.params).tree(problem.params) for key in splits}

    def compute(params, direction):
        return {
            key: pn.summarize(
                problem.loss, params, direction, param_labels=tree, engine=engine
            )
            for key, tree in trees.items()
        }

    return quick_jit(compute)(problem.params, problem.direction)


def assert_summary_is(summary, expected, fine, tolerances, what):
    """Within tolerances relative to the largest entry over the finest of the splits."""
    value, gradient, hessian, third = tolerances
    size_of_hessian = float(np.max(np.abs(fine.hessian)))
    floors = {
        "gradient": float(np.max(np.abs(fine.gradient))),
        "hessian": size_of_hessian,
        # Third derivatives may vanish where what they are computed from does not.
        "third": max(1e-2 * size_of_hessian, float(np.max(np.abs(fine.third)))),
    }
    expected = expected._replace(third=diagonal(expected.third))
    assert_close(summary.value, expected.value, value, f"{what}: value")
    for field, rtol in {
        "gradient": gradient,
        "hessian": hessian,
        "third": third,
    }.items():
        actual, want = getattr(summary, field), getattr(expected, field)
        assert_close(actual, want, rtol, f"{what}: {field}", floors[field])


@each_problem_with_each_engine(default=SOME)
def test_summaries_are_the_derivatives_of_phi(name, engine):
    problem, fine = oracle(name)
    finest = squares(problem.params)
    splits = SPLITS
    if name not in SOME:
        splits = MOST_DIFFERENT if engine == "adjoint" else ["partial"]
    with jax.enable_x64(True):
        found = summaries(problem, engine, splits)
    for key, summary in found.items():
        expected = fine.merged(finest.incidence(SPLITS[key](problem.params)))
        tolerances = [max(x, problem.rounding) for x in (1e-13, 1e-9, 1e-9, 1e-9)]
        assert_summary_is(summary, expected, fine, tolerances, key)
        np.testing.assert_array_equal(summary.hessian, summary.hessian.T, key)


@pytest.mark.parametrize("name", some(models.NAMES, default=["mlp"]))
def test_float32_is_close_to_float64(name):
    exact, fine = oracle(name)
    problem = models.make(name, jnp.float32)
    summary = summaries(problem, "adjoint", ["squares"])["squares"]
    assert {x.dtype for x in summary} == {np.dtype(np.float32)}
    tolerances = [max(x, exact.rounding) for x in (1e-5, 2e-5, 1e-4, 5e-4)]
    assert_summary_is(summary, fine, fine, tolerances, name)


WITH_LOWERINGS = ["attention", "convolutional_network", "lstm"]


@pytest.mark.parametrize("name", some(WITH_LOWERINGS, default=["attention"]))
def test_summaries_without_lowerings_are_the_derivatives_of_phi(name):
    problem, fine = oracle(name)
    with jax.enable_x64(True), lowerings.disabled():
        summary = summaries(problem, "adjoint", ["squares"])["squares"]
    assert_summary_is(summary, fine, fine, (1e-13, 1e-9, 1e-9, 1e-9), name)


# Problems that are about zeros.
VANISHING = ("a_leaf_with_zero_gradient", "a_linear_loss_and_an_unused_leaf")


@pytest.mark.parametrize(
    "name", some(sorted({*models.NAMES} - {*VANISHING}), default=SOME)
)
def test_problems_have_derivatives_of_every_kind(name):
    """An oracle of zeros would agree with an engine of zeros."""
    _, fine = oracle(name)
    assert np.mean(fine.gradient != 0) > 0.8
    assert np.mean(fine.hessian != 0) >= 0.5
    assert np.mean(diagonal(fine.third) != 0) >= 0.5


@each_engine
def test_engines_have_one_signature(engine):
    for function in ("summarize", "derivative_tensors"):
        ours, reference = (
            inspect.signature(getattr(ENGINES[name], function)).parameters
            for name in (engine, "jvp_of_grad")
        )
        assert list(ours) == list(reference)


@each_engine
def test_engines_are_found_by_name(engine):
    assert engines.get(engine) is ENGINES[engine]


def test_auto_is_an_engine_and_other_names_are_not():
    assert engines.get("auto") in ENGINES.values()
    with pytest.raises(ValueError, match=r"engine must be one of 'auto', .*'jvp_of_"):
        engines.get("Auto")
