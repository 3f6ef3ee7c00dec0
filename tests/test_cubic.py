"""The cubic subproblem, against 60 digits and against its own mathematics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import cubic_reference
from support.cubic_reference import FAMILIES, Problem
from support.selection import some

from partnewton.cubic import CubicStatus, _solver, solve_cubic

GAP = {np.float64: 1e-6, np.float32: 1e-3}  # of the model, relative to its minimum
SIZES = ((1, 3), (2, 4), (5, 4), (12, 2), (30, 1))  # S, how many of each family
NAMES = [family.__name__ for family in FAMILIES]
# One of each kind: a minimum inside, negative curvature, a kernel, the hard case.
SOME = ["positive_definite", "indefinite", "kernel_without_minimum", "near_hard"]
each_family = pytest.mark.parametrize("family", some(NAMES, default=SOME))


def solve(problem, dtype=np.float64):
    """The solution as numpy arrays, of arguments in `dtype`."""
    with jax.enable_x64(dtype == np.float64):
        solution = solve_cubic(*(jnp.asarray(a, dtype) for a in problem.arguments))
        return jax.tree.map(np.asarray, solution)


def solve_in_float32_arithmetic(problem):
    """What runs on TPU."""
    arguments = (jnp.asarray(a, jnp.float32) for a in problem.arguments)
    solution = jax.jit(_solver._minimise_in_own_dtype)(*arguments)
    return jax.tree.map(np.asarray, solution)


@functools.cache
def problems(family, dtype, sizes=SIZES):
    """Problems of a family, with their minima."""
    generated = [
        problem.astype(dtype)
        for S, count in sizes
        for problem in cubic_reference.problems(S, count)
        if problem.family == family
    ]
    return [(problem, cubic_reference.minimise(problem)) for problem in generated]


def assert_solves(problem, reference, solution, gap):
    assert np.all(np.isfinite(solution.learning_rates))
    value = cubic_reference.model(problem, solution.learning_rates)
    assert value <= 0
    assert value - reference.minimum <= gap * abs(reference.minimum)
    assert solution.status != CubicStatus.INVALID
    frozen = solution.status == CubicStatus.KERNEL_FROZEN
    assert frozen == (not reference.kernel_positive_definite)
    image = problem.scale.astype(float) * solution.learning_rates
    np.testing.assert_allclose(solution.radius, np.linalg.norm(image), rtol=gap)
    largest = float(np.finfo(solution.model_decrease.dtype).max)
    decrease = min(-float(value), largest)
    assert float(solution.model_decrease) == pytest.approx(decrease, rel=gap, abs=0)


# The minimum, against the reference.


@pytest.mark.slow
@each_family
def test_the_step_attains_the_minimum_in_float64(family):
    for problem, reference in problems(family, np.float64):
        assert_solves(problem, reference, solve(problem), GAP[np.float64])


@each_family
def test_the_step_attains_the_minimum_in_float32(family):
    for problem, reference in problems(family, np.float32):
        solution = solve(problem, np.float32)
        assert solution.learning_rates.dtype == np.float32
        assert_solves(problem, reference, solution, GAP[np.float32])


@pytest.mark.slow
@each_family
def test_float32_arithmetic_throughout_attains_the_minimum(family):
    for problem, reference in problems(family, np.float32):
        solution = solve_in_float32_arithmetic(problem)
        assert_solves(problem, reference, solution, GAP[np.float32])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["indefinite", "spread_scale", "near_hard"])
def test_a_hundred_subsets_attain_the_minimum(family):
    for problem, reference in problems(family, np.float32, ((100, 1),)):
        assert_solves(problem, reference, solve(problem), GAP[np.float64])
        for solution in (
            solve(problem, np.float32),
            solve_in_float32_arithmetic(problem),
        ):
            assert_solves(problem, reference, solution, GAP[np.float32])


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_two_hundred_subsets_satisfy_the_optimality_conditions(family):
    problem = next(
        p for p in cubic_reference.problems(200, 1, seed=1) if p.family == family
    )
    solution = solve(problem)
    g, H, d, damping = problem.arguments
    eta, r = solution.learning_rates, solution.radius
    live = np.ones(200, bool)
    if solution.status == CubicStatus.KERNEL_FROZEN:
        live = d > 0
        assert not np.any(eta[~live])
    M = H + damping / 2 * r * np.diag(d**2)
    s = 1 / np.sqrt(np.maximum(np.abs(np.diag(M)), np.abs(np.diag(H))) + (d == 0))
    s = np.where(np.diag(M) == 0, 1, s)
    size = s * (np.abs(M) @ np.abs(eta) + np.abs(g))
    assert np.all((s * np.abs(M @ eta - g))[live] <= 1e-6 * np.max(size))
    scaled = (s[:, None] * M * s)[np.ix_(live, live)]
    assert np.linalg.eigvalsh(scaled)[0] >= -1e-9


# The mathematics.


def test_one_subset_solves_a_quadratic_equation():
    for g, h, d, damping in [
        (2, 3, 1, 4),
        (-2, 3, 2, 1),
        (2, -3, 1, 0.5),
        (1, 0, 1, 2),
    ]:
        solution = solve(
            Problem(np.array([g]), np.array([[h]]), np.array([d]), damping)
        )
        # h x + damping/2 d^3 x^2 = |g|
        x = (-h + np.sqrt(h * h + 2 * damping * d**3 * abs(g))) / (damping * d**3)
        np.testing.assert_allclose(solution.learning_rates, [np.sign(g) * x])


def test_without_damping_the_step_is_newtons():
    g, H, d, _, _ = cubic_reference.positive_definite(np.random.default_rng(0), 7)
    newton = np.linalg.solve(H, g)
    for problem in Problem(g, H, d, 0.0), Problem(g, H, 0 * d, 1.0):
        solution = solve(problem)
        np.testing.assert_allclose(solution.learning_rates, newton)
        np.testing.assert_allclose(solution.model_decrease, g @ newton / 2)
        assert solution.status == CubicStatus.INTERIOR


def test_newtons_step_to_a_saddle_point_is_rejected():
    solution = solve(Problem(np.ones(2), np.diag([1.0, -1.0]), np.ones(2), 0.0))
    assert solution.status == CubicStatus.KERNEL_FROZEN
    assert not np.any(solution.learning_rates)


def test_a_frozen_kernel_leaves_the_others_their_own_minimum():
    problem = cubic_reference.kernel_without_minimum(np.random.default_rng(0), 6)
    others = Problem(
        problem.gradient[1:],
        problem.hessian[1:, 1:],
        problem.scale[1:],
        problem.damping,
    )
    solution, expected = solve(problem), solve(others)
    assert solution.status == CubicStatus.KERNEL_FROZEN
    assert solution.learning_rates[0] == 0
    np.testing.assert_allclose(
        solution.learning_rates[1:], expected.learning_rates, rtol=1e-6
    )


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_a_direction_without_any_bound_is_frozen(curvature):
    H = np.diag([curvature, 2.0])
    solution = solve(Problem(np.ones(2), H, np.array([0.0, 1.0]), 1e-9))
    assert solution.status == CubicStatus.KERNEL_FROZEN
    np.testing.assert_allclose(solution.learning_rates, [0, 0.5])


def test_a_singular_kernel_is_frozen():
    solution = solve(Problem(np.ones(3), np.ones((3, 3)), np.array([0, 0, 1]), 1.0))
    assert solution.status == CubicStatus.KERNEL_FROZEN
    assert not np.any(solution.learning_rates[:2])
    assert solution.learning_rates[2] > 0


def test_inactive_subsets_stay_at_zero_and_leave_the_others_alone():
    problem = cubic_reference.indefinite(np.random.default_rng(0), 5)
    rows = np.array([0, 2, 3, 5, 6])
    g, d, H = np.zeros(7), np.zeros(7), np.zeros((7, 7))
    g[rows], d[rows], H[np.ix_(rows, rows)] = problem[0], problem[2], problem[1]
    solution, expected = solve(Problem(g, H, d, problem.damping)), solve(problem)
    assert solution.status == CubicStatus.INTERIOR
    assert not np.any(solution.learning_rates[[1, 4]])
    np.testing.assert_allclose(
        solution.learning_rates[rows], expected.learning_rates, rtol=1e-6
    )


def test_at_a_stationary_point_of_positive_curvature_the_step_is_zero():
    problem = cubic_reference.positive_definite(np.random.default_rng(0), 5)
    solution = solve(problem._replace(gradient=np.zeros(5)))
    assert solution.status == CubicStatus.INTERIOR
    assert not np.any(solution.learning_rates)
    assert solution.radius == solution.model_decrease == 0


def test_at_a_saddle_point_the_step_follows_the_negative_curvature():
    # h x + damping/2 x^2 = 0 along the second subset
    solution = solve(Problem(np.zeros(2), np.diag([1.0, -3.0]), np.ones(2), 2.0))
    assert solution.status == CubicStatus.HARD_CASE
    np.testing.assert_allclose(np.abs(solution.learning_rates), [0, 3], atol=1e-12)


def test_the_hard_case_completes_the_step_with_the_null_vector():
    # The shift is 3, the step along the first subset 1 / (1 + 3), the radius 3.
    solution = solve(Problem(np.array([1.0, 0]), np.diag([1.0, -3.0]), np.ones(2), 2.0))
    assert solution.status == CubicStatus.HARD_CASE
    expected = [0.25, np.sqrt(9 - 0.25**2)]
    np.testing.assert_allclose(np.abs(solution.learning_rates), expected, rtol=1e-12)
    np.testing.assert_allclose(solution.radius, 3, rtol=1e-12)


def test_only_the_symmetric_part_of_the_hessian_counts():
    problem = cubic_reference.indefinite(np.random.default_rng(0), 6)
    skew = np.triu(np.round(8 * problem.hessian), 1)
    skew = skew - skew.T
    H = np.round(8 * problem.hessian)
    once = solve(problem._replace(hessian=H))
    twice = solve(problem._replace(hessian=H + skew))
    np.testing.assert_array_equal(once.learning_rates, twice.learning_rates)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_family
def test_rescaled_subsets_get_the_same_bits(family, dtype):
    rng = np.random.default_rng(1)
    for S in 1, 4, 9:
        p = next(
            p for p in cubic_reference.problems(S, 1) if p.family == family
        ).astype(dtype)
        if family == "wild_units":  # already as wild as float32 allows
            p = cubic_reference.indefinite(rng, S).astype(dtype)
        c = (2.0 ** rng.integers(-20, 20, S)).astype(dtype)
        rescaled = Problem(c * p[0], c[:, None] * p[1] * c, c * p[2], p.damping)
        once, again = solve(p, dtype), solve(rescaled, dtype)
        np.testing.assert_array_equal(once.learning_rates, c * again.learning_rates)
        for a, b in zip(once[1:], again[1:], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", some([np.float32, np.float64], default=[np.float32]))
@each_family
@pytest.mark.parametrize("k", some([-8, -3, 1, 10], default=[-3]))
def test_a_rescaled_objective_gets_the_same_bits(family, k, dtype):
    for S in 1, 4, 9:
        p = next(
            p for p in cubic_reference.problems(S, 1) if p.family == family
        ).astype(dtype)
        factor = 2.0**k
        rescaled = Problem(
            *(dtype(factor) * a for a in p[:2]), p.scale, factor * p.damping
        )
        once, again = solve(p, dtype), solve(rescaled, dtype)
        np.testing.assert_array_equal(once.learning_rates, again.learning_rates)
        decrease = once.model_decrease
        if max(decrease, again.model_decrease) < np.finfo(dtype).max:
            assert factor * decrease == again.model_decrease
        assert once.status == again.status


def test_float32_problems_may_leave_the_range_of_float32_inside():
    c = np.array([1e-18, 1.0, 1e18])
    p = cubic_reference.indefinite(np.random.default_rng(0), 3)
    p = Problem(c * p[0], c[:, None] * p[1] * c, c * p[2], 1e-9).astype(np.float32)
    assert_solves(p, cubic_reference.minimise(p), solve(p, np.float32), 1e-3)


# The arguments.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["gradient", "hessian", "scale", "damping"])
def test_an_argument_that_is_not_finite_gives_zeros(argument, value):
    problem = cubic_reference.indefinite(np.random.default_rng(0), 4)
    array = np.array(getattr(problem, argument), float)
    array.flat[-1] = value
    for dtype in GAP:
        solution = solve(problem._replace(**{argument: array}), dtype)
        assert solution.status == CubicStatus.INVALID
        assert not np.any(solution.learning_rates)
        assert solution.radius == solution.model_decrease == 0


@pytest.mark.parametrize(("argument", "value"), [("scale", [1, -1]), ("damping", -1)])
def test_negative_arrays_give_zeros(argument, value):
    problem = Problem(np.ones(2), np.eye(2), np.ones(2), 1.0)
    solution = solve(problem._replace(**{argument: np.array(value)}))
    assert solution.status == CubicStatus.INVALID
    assert not np.any(solution.learning_rates)


@pytest.mark.parametrize("damping", [-1, -0.5])
def test_a_negative_damping_raises(damping):
    with pytest.raises(ValueError, match=f"damping must not be negative.*{damping}"):
        solve_cubic(jnp.ones(2), jnp.eye(2), jnp.ones(2), damping)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((), (1, 1), (1,), ()), r"gradient must have .*\(S,\).*\(\)"),
        (((0,), (0, 0), (0,), ()), r"gradient must have .*\(S,\).*\(0,\)"),
        (((2,), (2, 3), (2,), ()), r"hessian must have .*\(2, 2\).*\(2, 3\)"),
        (((2,), (2, 2), (3,), ()), r"scale must have .*\(2,\).*\(3,\)"),
        (((2,), (2, 2), (2,), (1,)), r"damping must have .*\(\).*\(1,\)"),
    ],
)
def test_shapes_that_do_not_fit_raise(shapes, message):
    with pytest.raises(ValueError, match=message):
        solve_cubic(*(jnp.ones(shape) for shape in shapes))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.float32])
def test_narrow_arguments_give_a_float32_solution(dtype):
    g, H = jnp.array([2, 4], dtype), jnp.array([[2, 0], [0, 8]], dtype)
    solution = solve_cubic(g, H, jnp.zeros(2, dtype), 1)
    np.testing.assert_array_equal(solution.learning_rates, [1, 0.5])
    assert [a.dtype for a in solution] == 3 * [jnp.float32] + [jnp.int32]
    assert not any(a.weak_type for a in solution)


def test_lists_and_python_numbers_are_arguments():
    solution = solve_cubic([2.0], [[4]], [0], 1)
    np.testing.assert_array_equal(solution.learning_rates, [0.5])


def test_float64_arguments_give_a_float64_solution():
    with jax.enable_x64(True):
        solution = solve_cubic(jnp.ones(2), jnp.eye(2), jnp.ones(2, jnp.float32), 1.0)
        assert [a.dtype for a in solution] == 3 * [jnp.float64] + [jnp.int32]


# The transformations.


@pytest.fixture(scope="module")
def batch():
    """Problems of every family, stacked, and their solutions one by one."""
    stacked = [p.astype(np.float32) for p in cubic_reference.problems(6, 1)]
    arguments = tuple(
        jnp.asarray(np.stack([p[i] for p in stacked]), jnp.float32) for i in range(4)
    )
    solutions = [solve(p, np.float32) for p in stacked]
    return arguments, jax.tree.map(lambda *a: np.stack(a), *solutions)


def _scan(*arguments):
    return jax.lax.scan(lambda _, a: (None, solve_cubic(*a)), None, arguments)[1]


def _cond(*arguments):
    def zeros(*arguments):
        return jax.tree.map(jnp.zeros_like, solve_cubic(*arguments))

    def solve_if(*arguments):
        return jax.lax.cond(arguments[-1] >= 0, solve_cubic, zeros, *arguments)

    return jax.vmap(solve_if)(*arguments)


@pytest.mark.parametrize(
    "solve_all",
    [
        jax.vmap(solve_cubic),
        jax.jit(jax.vmap(solve_cubic)),
        jax.vmap(jax.jit(solve_cubic)),
        jax.jit(jax.vmap(jax.jit(solve_cubic))),
        _scan,
        jax.jit(_scan),
        _cond,
        jax.jit(_cond),
    ],
    ids=[
        "vmap",
        "jit-vmap",
        "vmap-jit",
        "jit-vmap-jit",
        "scan",
        "jit-scan",
        "cond",
        "jit-cond",
    ],
)
def test_transformations_of_jax_give_the_same_solutions(solve_all, batch):
    arguments, expected = batch
    solution = solve_all(*arguments)
    np.testing.assert_array_equal(solution.status, expected.status)
    np.testing.assert_allclose(solution.radius, expected.radius, rtol=1e-6)
    np.testing.assert_allclose(
        solution.model_decrease, expected.model_decrease, rtol=1e-6
    )
    well_posed = [i for i, name in enumerate(NAMES) if "hard" not in name]
    np.testing.assert_allclose(
        np.asarray(solution.learning_rates)[well_posed],
        expected.learning_rates[well_posed],
        rtol=1e-3,
    )


@pytest.mark.slow
def test_the_batch_may_be_in_one_argument(batch):
    (g, H, d, damping), expected = batch
    g = jnp.stack([g[0], 2 * g[0]])
    solution = jax.jit(jax.vmap(solve_cubic, (0, None, None, None)))(
        g, H[0], d[0], damping[0]
    )
    np.testing.assert_allclose(
        solution.learning_rates[0], expected.learning_rates[0], rtol=1e-5
    )


@pytest.mark.slow
def test_float64_problems_are_solved_under_transformations_too():
    with jax.enable_x64(True):
        stacked = list(cubic_reference.problems(4, 1))
        arguments = [jnp.asarray(np.stack([p[i] for p in stacked])) for i in range(4)]
        solution = jax.jit(jax.vmap(solve_cubic))(*arguments)
        expected = [solve(p).learning_rates for p in stacked]
        well_posed = [i for i, name in enumerate(NAMES) if "hard" not in name]
        np.testing.assert_allclose(
            np.asarray(solution.learning_rates)[well_posed],
            np.array(expected)[well_posed],
            rtol=1e-6,
        )


def test_new_values_do_not_recompile():
    g, H, d = jnp.ones(3), jnp.eye(3), jnp.ones(3)
    solve_cubic(g, H, d, 1.0)
    compiled = _solver._solve._cache_size()
    solve_cubic(2 * g, -H, 0 * d, 3)
    solve_cubic(2 * g, -H, 0 * d, jnp.float32(2))
    assert _solver._solve._cache_size() == compiled


def test_a_long_scan_of_solutions_stays_finite():
    def step(g, _):
        solution = solve_cubic(g, -jnp.eye(3), jnp.ones(3), 1.0)
        return g * 1e-4, solution.learning_rates

    _, eta = jax.lax.scan(step, jnp.array([1.0, 2.0, 3.0]), length=20)
    assert np.all(np.isfinite(eta))
    np.testing.assert_allclose(np.linalg.norm(eta[5:], axis=1), 2, rtol=1e-4)


# The derivatives.


def _derivative_problems():
    """Four subsets: positive definite, indefinite, and with zeros in D."""
    rng = np.random.default_rng(5)
    definite = cubic_reference.positive_definite(rng, 4)
    indefinite = cubic_reference.indefinite(rng, 4)
    zeros = cubic_reference.positive_definite(rng, 4)
    zeros = zeros._replace(scale=np.array([0.0, 1.0, 0.0, 0.7]))
    return [p._replace(damping=3.0) for p in (definite, indefinite, zeros)]


def _outcome(*arguments):
    return solve_cubic(*arguments)[:3]


def _directions():
    """A direction in each argument, symmetric in the Hessian, none where D is zero."""
    rng = np.random.default_rng(6)
    dH = rng.normal(size=(4, 4))
    dd = np.array([0.0, 0.5, 0.0, -1.0])
    return rng.normal(size=4), dH + dH.T, dd, rng.normal()


@pytest.mark.parametrize("dtype", some([np.float64, np.float32], default=[np.float32]))
def test_forward_derivatives_are_those_of_finite_differences(dtype):
    with jax.enable_x64(True):
        tangents = [jnp.asarray(a) for a in _directions()]
        solution = jax.jit(_outcome)

        @jax.jit
        def forward(*arguments):
            directions = [t.astype(arguments[0].dtype) for t in tangents]
            return jax.jvp(_outcome, arguments, tuple(directions))[1]

        for problem in _derivative_problems():
            arguments = [jnp.asarray(a) for a in problem.arguments]
            there, back = (
                solution(
                    *(a + step * t for a, t in zip(arguments, tangents, strict=True))
                )
                for step in (1e-5, -1e-5)
            )
            expected = [(a - b) / 2e-5 for a, b in zip(there, back, strict=True)]
            found = forward(*(a.astype(dtype) for a in arguments))
            rtol = 1e-6 if dtype == np.float64 else 1e-3
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == dtype
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.slow
def test_reverse_derivatives_are_the_transpose_of_forward_derivatives_under_vmap():
    with jax.enable_x64(True):
        problems = _derivative_problems()
        arguments = [jnp.asarray(np.stack([p[i] for p in problems])) for i in range(4)]
        tangents = tuple(jnp.asarray(a) for a in _directions())
        weights = jnp.array([1.0, -2.0, 0.5, 3.0])

        def scalar(*arguments):
            eta, radius, decrease = _outcome(*arguments)
            return eta @ weights + 2 * radius - decrease

        gradients = jax.jit(jax.vmap(jax.grad(scalar, (0, 1, 2, 3))))(*arguments)
        _, forward = jax.jit(jax.vmap(lambda *a: jax.jvp(scalar, a, tangents)))(
            *arguments
        )
        reverse = sum(
            jnp.sum((gradient * t).reshape(3, -1), 1)
            for gradient, t in zip(gradients, tangents, strict=True)
        )
        np.testing.assert_allclose(reverse, forward, rtol=1e-10)


@pytest.mark.slow
def test_in_the_hard_case_the_returned_minimiser_is_differentiated():
    # eta = (g / 4, +- sqrt(9 - g^2 / 16)), as the shift stays 3.
    arguments = (jnp.array([1.0, 0]), jnp.diag(jnp.array([1.0, -3.0])), jnp.ones(2))
    with jax.enable_x64(True):
        arguments = [a.astype(jnp.float64) for a in arguments]
        direction = jnp.array([1.0, 0.0])

        def rates(g):
            return solve_cubic(g, *arguments[1:], 2.0).learning_rates

        eta, deta = jax.jvp(rates, (arguments[0],), (direction,))
        expected = [0.25, -(1 / 16) / float(eta[1])]
        np.testing.assert_allclose(deta, expected, rtol=1e-9)


@pytest.mark.slow
def test_subsets_that_do_not_move_have_the_derivative_zero():
    problem = Problem(np.ones(2), np.diag([-1.0, 2.0]), np.array([0.0, 1.0]), 1.0)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(a) for a in problem.arguments]
        jacobian = jax.jacrev(lambda *a: _outcome(*a)[0], (0, 1, 2))(*arguments)
        for x in jax.tree.leaves(jacobian):
            assert np.all(np.isfinite(x))
            assert not np.any(x[0])
        invalid = jax.grad(lambda g: jnp.sum(_outcome(g, *arguments[1:])[0]))
        np.testing.assert_array_equal(invalid(jnp.array([jnp.nan, 1.0])), 0)
