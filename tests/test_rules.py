"""Rules against closed forms, numpy, and a search over the model they minimise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import some

from partnewton import CubicStatus, Summary, averaging, rules, solve_cubic

DTYPES = (jnp.float32, jnp.float64)
RULES = {
    "cubic": rules.cubic,
    "newton": rules.newton,
    "diagonal": rules.diagonal,
    "robust": rules.robust,
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def drawn(seed=0, S=4, dtype=np.float64, scale=1.0):
    """A summary with a positive definite Hessian, in units of `scale` a subset."""
    rng = np.random.default_rng(seed)
    units = scale ** rng.uniform(-1, 1, S)
    root = rng.normal(size=(S, S)) + 2 * np.eye(S)
    gradient = rng.uniform(0.5, 2, S) * units
    hessian = units[:, None] * (root @ root.T) * units
    third = rng.normal(size=S) * units**3
    arrays = (np.array(1.0), gradient, hessian, third)
    return Summary(*(jnp.asarray(x, dtype) for x in arrays))


def one(g, h, t, dtype=jnp.float64):
    """The summary of a single subset."""
    arrays = (1.0, [g], [[h]], [t])
    return Summary(*(jnp.asarray(x, dtype) for x in arrays))


def as_float64(summary):
    return [None if x is None else np.asarray(x, np.float64) for x in summary[1:]]


def model_decrease(summary, eta, damping):
    """gradient . eta - eta' hessian eta / 2 - damping/6 ||D eta||^3, in numpy."""
    g, h, t = as_float64(summary)
    eta = np.asarray(eta, np.float64)
    cubic = np.sum((np.cbrt(np.abs(t)) * eta) ** 2) ** 1.5
    return g @ eta - eta @ h @ eta / 2 - damping / 6 * cubic


# --- newton ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("seed", some(range(3), default=[0]))
def test_newton_solves_the_linear_system(seed, ridge, dtype):
    summary = drawn(seed, dtype=dtype)
    g, h, _ = as_float64(summary)
    expected = np.linalg.solve(h + ridge * np.eye(len(g)), g)
    proposal = rules.newton(ridge, nonnegative=False)(summary)
    rtol = 1e-4 if dtype == jnp.float32 else 1e-10
    np.testing.assert_allclose(proposal.learning_rates, expected, rtol=rtol)
    np.testing.assert_allclose(
        proposal.predicted_decrease, model_decrease(summary, expected, 0.0), rtol=rtol
    )


@pytest.mark.parametrize("seed", range(3))
def test_newton_is_accurate_in_float32_when_subsets_differ_by_a_millionfold(seed):
    summary = drawn(seed, dtype=np.float32, scale=1e6)
    g, h, _ = as_float64(summary)
    proposal = rules.newton(nonnegative=False)(summary)
    # Compared in the units of each subset, where the system is well conditioned.
    units = np.sqrt(np.diag(h))
    expected = np.linalg.solve(h / np.outer(units, units), g / units)
    error = np.asarray(proposal.learning_rates, np.float64) * units - expected
    assert np.max(np.abs(error)) < 1e-4 * np.max(np.abs(expected))


@pytest.mark.slow
def test_newton_steps_to_the_saddle_point_of_an_indefinite_model():
    summary = Summary(jnp.ones(()), jnp.ones(2), jnp.diag(jnp.array([2.0, -4.0])), None)
    proposal = rules.newton(nonnegative=False)(summary)
    np.testing.assert_allclose(proposal.learning_rates, [0.5, -0.25])
    np.testing.assert_allclose(rules.newton()(summary).learning_rates, [0.5, 0.0])


def test_newton_gives_a_subset_without_gradient_and_curvature_the_rate_zero():
    hessian = jnp.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    summary = Summary(jnp.ones(()), jnp.array([3.0, 0.0, 3.0]), hessian, None)
    np.testing.assert_allclose(rules.newton()(summary).learning_rates, [1, 0, 1])


def test_newton_on_a_singular_hessian_is_not_finite_and_a_ridge_repairs_it():
    summary = Summary(jnp.ones(()), jnp.array([1.0, 2.0]), jnp.ones((2, 2)), None)
    assert not np.all(np.isfinite(rules.newton()(summary).learning_rates))
    assert np.all(np.isfinite(rules.newton(0.1)(summary).learning_rates))


# --- diagonal --------------------------------------------------------------------

CASES = {
    "convex": (1.3, 2.0, 0.7),
    "convex, against the direction": (-1.3, 2.0, 0.7),
    "convex, negative third": (1.3, 2.0, -0.7),
    "flat": (1.3, 0.0, 0.7),
    "concave": (1.3, -2.0, 0.7),
    "concave, against the direction": (-1.3, -2.0, 0.7),
    "nearly quadratic": (1.3, 2.0, 1e-9),
    "nearly linear": (1.3, 1e-9, 0.7),
    "quadratic": (1.3, 2.0, 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_diagonal_beats_every_rate_on_a_fine_grid(case, damping, dtype):
    summary = one(*CASES[case], dtype)
    proposal = rules.diagonal(damping, nonnegative=False)(summary)
    found = float(proposal.learning_rates[0])
    around = np.linspace(-3, 3, 6001) * max(abs(found), 1e-3)
    grid = np.concatenate([around, np.geomspace(1e-6, 1e6, 500)])
    best = max(model_decrease(summary, [x], damping) for x in grid)
    decrease = model_decrease(summary, [found], damping)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-12
    assert decrease >= best - tolerance * abs(best)
    # A grid of this step comes so near to the best, so a wrong rate would show.
    assert decrease <= best + 1e-5 * abs(best)
    np.testing.assert_allclose(proposal.predicted_decrease, decrease, rtol=10 * 1e-6)
    assert proposal.status == CubicStatus.INTERIOR


@pytest.mark.parametrize("case", CASES)
def test_diagonal_is_equivariant_over_the_range_of_float32(case):
    g, h, t = CASES[case]
    expected = rules.diagonal(nonnegative=False)(one(g, h, t)).learning_rates
    for scale in (1e-9, 1e-3, 1e3, 1e9):
        summary = one(g * scale, h * scale**2, t * scale**3, jnp.float32)
        rates = rules.diagonal(nonnegative=False)(summary).learning_rates
        np.testing.assert_allclose(rates * scale, expected, rtol=1e-5)


def test_diagonal_ignores_interactions():
    summary = drawn(1)
    alone = summary._replace(hessian=jnp.diag(jnp.diagonal(summary.hessian)))
    np.testing.assert_array_equal(
        rules.diagonal()(summary).learning_rates,
        rules.diagonal()(alone).learning_rates,
    )


def test_diagonal_minimises_each_subset_by_itself():
    summary = drawn(2)
    together = rules.diagonal(0.3, nonnegative=False)(summary)
    for s in range(4):
        single = one(summary.gradient[s], summary.hessian[s, s], summary.third[s])
        rates = rules.diagonal(0.3, nonnegative=False)(single).learning_rates
        np.testing.assert_allclose(together.learning_rates[s], rates[0], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [0.0, -2.0])
def test_diagonal_gives_a_subset_without_a_minimum_the_rate_zero(h, dtype):
    arrays = (1.0, [1.0, 1.0], [[h, 0.0], [0.0, 2.0]], [0.0, 0.0])
    proposal = rules.diagonal()(Summary(*(jnp.asarray(x, dtype) for x in arrays)))
    np.testing.assert_allclose(proposal.learning_rates, [0.0, 0.5])
    assert proposal.status == CubicStatus.KERNEL_FROZEN


@pytest.mark.parametrize("h", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("t", [0.0, 0.7])
def test_diagonal_without_a_gradient_does_not_move(h, t):
    proposal = rules.diagonal()(one(0.0, h, t))
    np.testing.assert_array_equal(proposal.learning_rates, [0.0])
    np.testing.assert_array_equal(proposal.predicted_decrease, 0.0)


# --- cubic -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", some([0.1, 1.0, 10.0], default=[1.0]))
@pytest.mark.parametrize("seed", some(range(2), default=[0]))
def test_cubic_is_stationary_for_the_cubic_model(seed, damping, dtype):
    summary = drawn(seed, dtype=dtype)
    g, h, t = as_float64(summary)
    proposal = rules.cubic(damping, nonnegative=False)(summary)
    eta = np.asarray(proposal.learning_rates, np.float64)
    d = np.cbrt(np.abs(t))
    matrix = h + damping / 2 * np.linalg.norm(d * eta) * np.diag(d**2)
    assert np.linalg.eigvalsh(matrix)[0] > 0
    rtol = 1e-3 if dtype == jnp.float32 else 1e-8
    np.testing.assert_allclose(matrix @ eta, g, rtol=rtol)
    decrease = model_decrease(summary, eta, damping)
    np.testing.assert_allclose(proposal.predicted_decrease, decrease, rtol=rtol)


def test_cubic_returns_the_solution_of_solve_cubic():
    summary = drawn(3)
    proposal = rules.cubic(2.0, nonnegative=False)(summary)
    scale = jnp.cbrt(jnp.abs(summary.third))
    solution = solve_cubic(summary.gradient, summary.hessian, scale, 2.0)
    np.testing.assert_array_equal(proposal.learning_rates, solution.learning_rates)
    np.testing.assert_array_equal(proposal.status, solution.status)
    np.testing.assert_allclose(
        proposal.predicted_decrease, solution.model_decrease, rtol=1e-9
    )


@pytest.mark.parametrize("g", [1.3, -1.3])
@pytest.mark.parametrize("h", [2.0, -2.0])
def test_cubic_and_diagonal_agree_on_one_subset(g, h):
    summary = one(g, h, 0.7)
    for damping in (0.1, 1.0):
        theirs = rules.cubic(damping, nonnegative=False)(summary)
        ours = rules.diagonal(damping, nonnegative=False)(summary)
        np.testing.assert_allclose(
            theirs.learning_rates, ours.learning_rates, rtol=1e-6
        )


def test_cubic_without_third_order_is_newton():
    summary = drawn(4)._replace(third=jnp.zeros(4))
    np.testing.assert_allclose(
        rules.cubic(nonnegative=False)(summary).learning_rates,
        rules.newton(nonnegative=False)(summary).learning_rates,
        rtol=1e-8,
    )


# --- all rules -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(DTYPES, default=[jnp.float32]))
@pytest.mark.parametrize("name", RULES)
def test_negative_rates_are_set_to_zero_unless_told_not_to(name, dtype):
    rule = RULES[name]
    hessian = jnp.diag(jnp.array([2.0, 4.0]))
    summary = Summary(jnp.ones(()), jnp.array([1.0, -1.0]), hessian, jnp.ones(2))
    summary = Summary(*(jnp.asarray(x, dtype) for x in summary))
    free = rule(nonnegative=False)(summary).learning_rates
    assert free[0] > 0
    assert free[1] < 0
    np.testing.assert_array_equal(rule()(summary).learning_rates, [free[0], 0.0])


@pytest.mark.parametrize("name", [name for name in RULES if name != "robust"])
def test_the_predicted_decrease_is_that_of_the_clipped_rates(name):
    hessian = jnp.array([[2.0, 1.0], [1.0, 4.0]])
    summary = Summary(jnp.ones(()), jnp.array([1.0, -2.0]), hessian, jnp.ones(2))
    proposal = RULES[name]()(summary)
    assert proposal.learning_rates[1] == 0
    seen = summary
    if name == "diagonal":
        seen = summary._replace(hessian=jnp.diag(jnp.diagonal(hessian)))
    expected = model_decrease(seen, proposal.learning_rates, float(name != "newton"))
    np.testing.assert_allclose(proposal.predicted_decrease, expected, rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", some(DTYPES, default=[jnp.float32]))
def test_rates_have_the_dtype_of_the_summary(name, dtype):
    proposal = RULES[name](0.5)(drawn(0, dtype=dtype))
    assert proposal.learning_rates.dtype == dtype
    assert proposal.predicted_decrease.dtype == dtype
    assert jnp.issubdtype(jnp.result_type(proposal.status), jnp.integer)


@pytest.mark.parametrize("name", RULES)
def test_the_parameter_of_a_rule_may_be_traced(name):
    summary = drawn(0)
    traced = jax.jit(lambda x: RULES[name](x)(summary))(0.5)
    concrete = RULES[name](0.5)(summary)
    for x, y in zip(traced, concrete, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    other = RULES[name](50.0)(summary)
    assert not np.allclose(other.learning_rates, concrete.learning_rates, rtol=1e-3)


@pytest.mark.parametrize("name", some(RULES, default=["cubic", "newton"]))
def test_rules_can_be_mapped_over_summaries(name):
    summaries = [drawn(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *summaries)
    together = jax.vmap(RULES[name]())(stacked)
    for i, summary in enumerate(summaries):
        alone = RULES[name]()(summary)
        np.testing.assert_allclose(
            together.learning_rates[i], alone.learning_rates, rtol=1e-6
        )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("number", [-1, -0.5, np.float32(-1.0), float("nan")])
def test_a_negative_parameter_is_an_error(name, number):
    argument = "ridge" if name == "newton" else "damping"
    with pytest.raises(ValueError, match=f"{argument} must not be negative"):
        RULES[name](number)


def test_only_newton_does_without_the_third_order():
    assert rules.needs_third_order(rules.cubic())
    assert rules.needs_third_order(rules.diagonal())
    assert not rules.needs_third_order(rules.newton())
    assert rules.needs_third_order(lambda summary: None)
    assert not rules.needs_third_order(rules.Rule(lambda summary: None, False))


# --- robust ----------------------------------------------------------------------


def robust_model(summary, damping, floor):
    """|hessian| and D of the robust rule, in float64 numpy."""
    g, h, t = as_float64(summary)
    diagonal = np.abs(np.diag(h))
    if not diagonal.any():
        diagonal = np.abs(h).sum(1)
    alone = np.sum(g**2 / diagonal)
    least = alone ** (1 / 3) * np.maximum(np.sqrt(diagonal / alone), np.abs(g) / alone)
    D = np.maximum(np.cbrt(np.abs(t)), floor * least)
    values, vectors = np.linalg.eigh(h / np.outer(D, D))
    absolute = (vectors * np.abs(values)) @ vectors.T * np.outer(D, D)
    return g, absolute, D


def indefinite(seed=0, S=4, dtype=np.float64):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(S, S))
    arrays = (1.0, rng.normal(size=S), root + root.T, rng.normal(size=S))
    return Summary(*(jnp.asarray(x, dtype) for x in arrays))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floor", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("damping", some([0.3, 1.0], default=[1.0]))
@pytest.mark.parametrize("seed", some(range(3), default=[0]))
def test_robust_is_stationary_for_its_own_model(seed, damping, floor, dtype):
    summary = indefinite(seed, dtype=dtype)
    g, h, D = robust_model(summary, damping, floor)
    proposal = rules.robust(damping, floor=floor, nonnegative=False)(summary)
    eta = np.asarray(proposal.learning_rates, np.float64)
    matrix = h + damping / 2 * np.linalg.norm(D * eta) * np.diag(D**2)
    rtol = 1e-3 if dtype == jnp.float32 else 1e-7
    np.testing.assert_allclose(matrix @ eta, g, rtol=rtol, atol=rtol)
    decrease = g @ eta - eta @ h @ eta / 2 - damping / 6 * np.sum((D * eta) ** 2) ** 1.5
    np.testing.assert_allclose(proposal.predicted_decrease, decrease, rtol=rtol)
    assert decrease > 0


@pytest.mark.parametrize("shrinkage", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("max_ratio", some([1.5, 5.0, np.inf], default=[1.5]))
@pytest.mark.parametrize("seed", some(range(4), default=[0]))
def test_robust_shrinks_rates_towards_the_best_common_rate(seed, shrinkage, max_ratio):
    with jax.enable_x64(True):
        summary = indefinite(seed, dtype=jnp.float64)
        summary = summary._replace(gradient=jnp.abs(summary.gradient))
        g, h, D = robust_model(summary, 1.0, 1.0)
        alone = np.asarray(rules.robust()(summary).learning_rates)
        proposal = rules.robust(shrinkage=shrinkage, max_ratio=max_ratio)(summary)

    def decrease(eta):
        return g @ eta - eta @ h @ eta / 2 - np.linalg.norm(D * eta) ** 3 / 6

    # The stationary point in t of the decrease along (1, ..., 1), by bisection.
    low, high = 0.0, 1e3
    for _ in range(200):
        t = (low + high) / 2
        slope = g.sum() - t * h.sum() - t**2 / 2 * np.linalg.norm(D) ** 3
        low, high = (t, high) if slope > 0 else (low, t)
    expected = np.minimum((1 - shrinkage) * alone + shrinkage * t, max_ratio * t)
    np.testing.assert_allclose(proposal.learning_rates, expected, rtol=1e-6)
    np.testing.assert_allclose(
        proposal.predicted_decrease, decrease(expected), rtol=1e-6, atol=1e-9
    )
    assert np.all(expected > 0), "no subset stays behind"


def test_robust_shrinks_rates_to_zero_where_the_direction_ascends():
    gradient = jnp.array([1.0, -3.0])
    summary = Summary(jnp.ones(()), gradient, jnp.eye(2), jnp.zeros(2))
    alone = rules.robust()(summary).learning_rates
    half = rules.robust(shrinkage=0.5)(summary).learning_rates
    np.testing.assert_allclose(half, alone / 2, rtol=1e-6)


def test_robust_shrinkage_leaves_a_dead_subset_at_zero():
    gradient = jnp.array([1.0, 0.0])
    hessian = jnp.diag(gradient)
    summary = Summary(jnp.ones(()), gradient, hessian, jnp.zeros(2))
    rates = rules.robust(shrinkage=1.0)(summary).learning_rates
    assert rates[0] > 0
    assert rates[1] == 0


def test_robust_bounds_the_step_where_the_third_order_is_zero():
    summary = one(1.0, 1e-3, 0.0)  # Newton's step would be 1000
    newton = rules.cubic()(summary).learning_rates
    ours = rules.robust()(summary).learning_rates
    np.testing.assert_allclose(newton, [1000.0])
    # In units of Newton's step x: x + x^2 / 2 = 1.
    np.testing.assert_allclose(ours, 1000 * (np.sqrt(3) - 1), rtol=1e-6)


def test_robust_replaces_negative_curvature_by_its_absolute_value():
    for t in (0.0, 0.3):
        np.testing.assert_allclose(
            rules.robust()(one(1.3, -2.0, t)).learning_rates,
            rules.robust()(one(1.3, 2.0, t)).learning_rates,
            rtol=1e-9,
        )


@pytest.mark.parametrize("shift", [-5.0, -1.0, 1e3])
def test_robust_does_not_depend_on_a_constant_added_to_the_loss(shift):
    summary = indefinite(1)
    shifted = summary._replace(value=summary.value + shift)
    for x, y in zip(rules.robust()(summary), rules.robust()(shifted), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4, 1e12])
def test_robust_rates_do_not_depend_on_the_scale_of_the_loss(scale):
    summary = indefinite(2)
    larger = jax.tree.map(lambda x: scale * x, summary)
    np.testing.assert_allclose(
        rules.robust()(larger).learning_rates,
        rules.robust()(summary).learning_rates,
        rtol=1e-6,
    )


def test_robust_is_equivariant_when_subsets_are_rescaled():
    summary = indefinite(3)
    c = jnp.array([1e-4, 1.0, 30.0, 1e5])
    rescaled = Summary(
        summary.value,
        c * summary.gradient,
        c[:, None] * summary.hessian * c,
        c**3 * summary.third,
    )
    np.testing.assert_allclose(
        c * rules.robust()(rescaled).learning_rates,
        rules.robust()(summary).learning_rates,
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_robust_gives_a_dead_subset_the_rate_zero(dtype):
    summary = indefinite(4, dtype=dtype)
    dead = jnp.array([1.0, 0.0, 1.0, 1.0], dtype)
    summary = Summary(
        summary.value,
        dead * summary.gradient,
        dead[:, None] * summary.hessian * dead,
        dead * summary.third,
    )
    rates = rules.robust(nonnegative=False)(summary).learning_rates
    assert np.all(np.isfinite(rates))
    assert rates[1] == 0
    assert np.all(rates[np.array([0, 2, 3])] != 0)


def test_robust_bounds_a_subset_without_curvature_by_the_others():
    summary = Summary(
        jnp.ones(()), jnp.ones(2), jnp.diag(jnp.array([2.0, 0.0])), jnp.zeros(2)
    )
    proposal = rules.robust()(summary)
    assert np.all(np.isfinite(proposal.learning_rates))
    assert 0 < proposal.predicted_decrease < 3 * 0.5  # N = 1/2


@pytest.mark.parametrize("dtype", DTYPES)
def test_robust_scales_by_the_rows_where_the_diagonal_is_zero(dtype):
    """As of a piecewise linear network with a piecewise linear loss."""
    summary = indefinite(3, dtype=dtype)
    hessian = summary.hessian - jnp.diag(jnp.diagonal(summary.hessian))
    summary = summary._replace(hessian=hessian, third=jnp.zeros(4, dtype))
    g, h, D = robust_model(summary, 1.0, 1.0)
    eta = rules.robust(nonnegative=False)(summary).learning_rates
    eta = np.asarray(eta, np.float64)
    slope = -g + h @ eta + 0.5 * np.linalg.norm(D * eta) * D**2 * eta
    np.testing.assert_allclose(
        slope, 0, atol=np.abs(g).max() * 200 * np.finfo(dtype).eps
    )


def test_robust_without_any_curvature_gives_zero_rates():
    summary = Summary(jnp.ones(()), jnp.ones(2), jnp.zeros((2, 2)), jnp.zeros(2))
    np.testing.assert_array_equal(rules.robust()(summary).learning_rates, [0, 0])
    # With one common rate there is a step to shorten, for those who evaluate the loss.
    rates = rules.robust(shrinkage=0.5)(summary).learning_rates
    np.testing.assert_array_equal(rates, [0.5, 0.5])


@pytest.mark.parametrize("name", ["floor", "shrinkage", "max_ratio"])
def test_a_negative_number_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        rules.robust(**{name: -1.0})


# --- with_noise_floor ------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(DTYPES, default=[jnp.float32]))
def test_subsets_whose_slope_is_rounding_are_ignored(dtype):
    summary = drawn(1, dtype=dtype)
    slope = 60 * np.finfo(dtype).eps * float(jnp.max(summary.gradient))
    lost = summary._replace(gradient=summary.gradient.at[2].set(-slope))
    rates = rules.with_noise_floor(rules.robust())(lost).learning_rates
    rest = np.array([0, 1, 3])
    without = Summary(
        summary.value,
        summary.gradient[rest],
        summary.hessian[np.ix_(rest, rest)],
        summary.third[rest],
    )
    expected = rules.robust()(without).learning_rates
    rtol = 1e-4 if dtype == jnp.float32 else 1e-10
    np.testing.assert_allclose(rates[rest], expected, rtol=rtol)
    assert rates[2] == 0


@pytest.mark.parametrize("name", RULES)
def test_slopes_above_rounding_are_left_alone(name):
    summary = drawn(1)
    least = 70 * np.finfo(np.float64).eps * float(jnp.max(summary.gradient))
    for gradient in (
        summary.gradient,
        summary.gradient.at[2].set(least),
        jnp.zeros(4),
    ):
        summary = summary._replace(gradient=gradient)
        rule = RULES[name]()
        seen = rules.with_noise_floor(rule)
        assert rules.needs_third_order(seen) == rules.needs_third_order(rule)
        np.testing.assert_array_equal(
            seen(summary).learning_rates, rule(summary).learning_rates
        )


def test_a_slope_that_is_not_finite_is_not_hidden():
    summary = drawn(1)
    broken = summary._replace(gradient=summary.gradient.at[2].set(jnp.nan))
    rates = rules.with_noise_floor(rules.newton())(broken).learning_rates
    assert not np.all(np.isfinite(rates))


def test_a_negative_noise_floor_is_an_error():
    with pytest.raises(ValueError, match="eps_multiple must not be negative"):
        rules.with_noise_floor(rules.robust(), -1.0)


# --- derivatives -----------------------------------------------------------------

DIFFERENTIABLE = {
    "cubic": lambda damping: rules.cubic(damping, nonnegative=False),
    "newton": lambda ridge: rules.newton(ridge, nonnegative=False),
    "diagonal": lambda damping: rules.diagonal(damping, nonnegative=False),
    "robust": lambda damping: rules.robust(damping, nonnegative=False),
    "robust, shrinkage": lambda damping: rules.robust(
        damping, shrinkage=0.5, max_ratio=2.0
    ),
    "with noise floor": lambda x: rules.with_noise_floor(
        rules.robust(x, shrinkage=0.5)
    ),
}


def weighted(name):
    """A number that depends on all rates and on the decrease."""

    def function(summary, damping):
        proposal = DIFFERENTIABLE[name](damping)(summary)
        weights = jnp.array([1.0, -2.0, 0.5, 3.0], proposal.learning_rates.dtype)
        return jnp.sum(weights * proposal.learning_rates) - proposal.predicted_decrease

    return function


def along(summary, seed=0):
    """A direction in the numbers of a summary and in the damping."""
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), summary)
    symmetric = direction.hessian + direction.hessian.T
    return direction._replace(hessian=symmetric), jnp.asarray(0.3)


@pytest.mark.parametrize("name", some(DIFFERENTIABLE, default=["cubic", "diagonal"]))
def test_derivatives_are_those_of_finite_differences(name):
    function = weighted(name)
    value = jax.jit(function)
    forward = jax.jit(lambda x, t: jax.jvp(function, x, t)[1])
    for seed in range(3):
        point = (indefinite(seed), jnp.asarray(0.7))
        tangent = along(point[0], seed)
        there, back = (
            value(*jax.tree.map(lambda x, t, h=h: x + h * t, point, tangent))
            for h in (1e-6, -1e-6)
        )
        expected = (there - back) / 2e-6
        np.testing.assert_allclose(forward(point, tangent), expected, rtol=1e-5)
        narrow = jax.tree.map(lambda x: x.astype(jnp.float32), (point, tangent))
        np.testing.assert_allclose(forward(*narrow), expected, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_reverse_mode_is_the_transpose_of_forward_mode_under_vmap(name):
    function = weighted(name)
    summaries = jax.tree.map(lambda *x: jnp.stack(x), *map(indefinite, range(3)))
    tangent = along(indefinite())
    damping = jnp.asarray(0.7)

    @jax.jit
    @jax.vmap
    def both(summary):
        gradient = jax.grad(function, (0, 1))(summary, damping)
        _, forward = jax.jvp(function, (summary, damping), tangent)
        products = jax.tree.map(lambda x, t: jnp.sum(x * t), gradient, tangent)
        return sum(jax.tree.leaves(products)), forward

    np.testing.assert_allclose(*both(summaries), rtol=1e-9)


@pytest.mark.parametrize("name", some(DIFFERENTIABLE, default=["cubic", "diagonal"]))
def test_derivatives_are_finite_where_the_rates_are_not_smooth(name):
    zero = jnp.zeros(4)
    summary = indefinite(1)
    dead = jnp.array([1.0, 0.0, 1.0, 1.0])
    dead = summary._replace(
        gradient=dead * summary.gradient,
        hessian=dead[:, None] * summary.hessian * dead,
        third=dead * summary.third,
    )
    gradient = jax.jit(jax.grad(weighted(name), (0, 1)))
    summaries = [dead, summary._replace(third=zero)]
    if name != "newton":  # which has no derivative where the Hessian is singular
        summaries.append(jax.tree.map(jnp.zeros_like, summary))
    for case in summaries:
        for x in jax.tree.leaves(gradient(case, jnp.asarray(0.7))):
            assert np.all(np.isfinite(x))


# --- a third order that is not finite ----------------------------------------------


@pytest.mark.parametrize("value", some([np.inf, -np.inf, np.nan], default=[np.nan]))
@pytest.mark.parametrize("name", ["cubic", "diagonal", "robust"])
def test_a_third_order_that_is_not_finite_counts_as_none(name, value):
    summary = drawn(1)
    broken = summary._replace(third=summary.third.at[2].set(value))
    without = summary._replace(third=summary.third.at[2].set(0))
    rule = jax.jit(RULES[name]())
    for x, y in zip(rule(broken), rule(without), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.all(rule(broken).learning_rates > 0)


# --- arguments that are not finite -------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
@pytest.mark.parametrize("field", ["gradient", "hessian", "damping"])
def test_robust_says_that_an_argument_is_not_finite(field, shrinkage):
    for value in (np.nan, np.inf):
        summary, damping = drawn(1), jnp.asarray(1.0)
        if field == "damping":
            damping = jnp.asarray(value)
        else:
            array = getattr(summary, field)
            summary = summary._replace(**{field: array.at[2].set(value)})
        proposal = rules.robust(damping, shrinkage=shrinkage)(summary)
        np.testing.assert_array_equal(proposal.learning_rates, 0)
        assert proposal.predicted_decrease == 0
        assert proposal.status == CubicStatus.INVALID


def test_robust_without_damping_divides_by_the_magnitudes():
    summary = indefinite(1)
    g, h, _ = robust_model(summary, 1.0, 1.0)
    proposal = rules.robust(0.0, nonnegative=False)(summary)
    np.testing.assert_allclose(proposal.learning_rates, np.linalg.solve(h, g))
    assert proposal.status == CubicStatus.INTERIOR
    singular = summary._replace(hessian=jnp.ones((4, 4)))
    proposal = rules.robust(0.0)(singular)
    np.testing.assert_array_equal(proposal.learning_rates, 0)
    assert proposal.status == CubicStatus.KERNEL_FROZEN


@pytest.mark.parametrize("dtype", some(DTYPES, default=[jnp.float32]))
@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e12, 1e30])
def test_robust_ends_with_any_damping(damping, dtype):
    summary = indefinite(1, dtype=dtype)
    g, h, D = robust_model(summary, damping, 1.0)
    damping = jnp.asarray(damping, dtype)
    proposal = jax.jit(lambda x: rules.robust(x, nonnegative=False)(summary))(damping)
    eta = np.asarray(proposal.learning_rates, np.float64)
    matrix = h + float(damping) / 2 * np.linalg.norm(D * eta) * np.diag(D**2)
    rtol = 1e-3 if dtype == jnp.float32 else 1e-7
    np.testing.assert_allclose(matrix @ eta, g, rtol=rtol, atol=rtol)


def test_robust_without_a_floor_freezes_what_nothing_bounds():
    summary = drawn(1)._replace(third=jnp.array([1.0, 0.0, 1.0, 1.0]))
    proposal = rules.robust(floor=0.0)(summary)
    assert proposal.status == CubicStatus.KERNEL_FROZEN
    assert proposal.learning_rates[1] == 0
    assert np.all(proposal.learning_rates[np.array([0, 2, 3])] != 0)


# --- strict modes ------------------------------------------------------------------

STRICT = {
    **{name: rule() for name, rule in RULES.items()},
    "with_noise_floor": rules.with_noise_floor(rules.robust(shrinkage=0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", STRICT)
def test_rules_work_in_all_strict_modes_of_jax(name, jit):
    rule = jax.jit(STRICT[name]) if jit else STRICT[name]
    summary = indefinite(1, dtype=jnp.float32)
    average = averaging.relative(averaging.exponential(absolute_third=True))
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.enable_checks(True),
    ):
        for case in (
            summary,
            summary._replace(third=jnp.zeros(4, jnp.float32)),
            summary._replace(gradient=summary.gradient.at[2].set(1e-9)),
        ):
            mean, _ = average.update(case, average.init(case))
            assert np.all(np.isfinite(rule(mean).learning_rates))
        nothing = jax.tree.map(jnp.zeros_like, summary)
        np.testing.assert_array_equal(rule(nothing).learning_rates, 0)
