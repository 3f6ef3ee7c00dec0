"""The full-batch problems against independent facts, and a very small run."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import some

sys.path.append(str(Path(__file__).parents[1]))  # at the end: it hides nothing

from benchmarks.full_batch import (
    elliptic,
    evolution,
    functions,
    neural_ode,
    problems,
    references,
    report,
    spin_chain,
)

PINNS = elliptic.EQUATIONS | evolution.EQUATIONS
CHEAP = ["regression", "wood"]


def make(name):
    if name == "neural_ode":
        pytest.importorskip("diffrax", reason='needs pip install ".[benchmarks]"')
    return problems.make(name)


# --- All problems -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", some(problems.PROBLEMS, default=CHEAP))
def test_everything_is_computed_in_the_dtype_of_the_parameters(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        problem = make(name)
        params = problem.init(jax.random.key(0), jnp.dtype(dtype))
        functions = (problem.loss, jax.grad(problem.loss))
        functions += tuple(f for f in (problem.residuals, problem.error) if f)
        shapes = [jax.eval_shape(f, params) for f in functions]
        dtypes = {x.dtype for x in jax.tree.leaves((params, shapes))}
        assert dtypes == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", some(problems.PROBLEMS, default=CHEAP))
def test_the_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        problem = make(name)
        params = problem.init(jax.random.key(1), jnp.float64)
        keys = iter(jax.random.split(jax.random.key(2), 100))
        v = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
        loss = jax.jit(problem.loss)
        value, slope = jax.jvp(problem.loss, (params,), (v,))
        h = 1e-5

        def moved(step):
            return float(loss(jax.tree.map(lambda x, d: x + step * d, params, v)))

        found = (moved(-2 * h) - 8 * moved(-h) + 8 * moved(h) - moved(2 * h)) / (12 * h)
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-8 * abs(value))


@pytest.mark.parametrize("name", some(problems.PROBLEMS, default=CHEAP))
def test_the_loss_is_the_mean_of_squares_and_no_less_than_the_minimum(name):
    with jax.enable_x64(True):
        problem = make(name)
        params = problem.init(jax.random.key(0), jnp.float64)
        loss = problem.loss(params)
        assert loss > problem.minimum
        if problem.residuals is not None:
            residuals = problem.residuals(params)
            np.testing.assert_allclose(loss, np.mean(np.square(residuals)))


@pytest.mark.parametrize("name", CHEAP)
def test_the_initial_parameters_of_both_dtypes_are_the_same(name):
    with jax.enable_x64(True):
        init = problems.make(name).init
        narrow, wide = (init(jax.random.key(3), x) for x in (jnp.float32, jnp.float64))
        for a, b in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# --- Equations ----------------------------------------------------------------------


def sine(a, b):
    return lambda x, y: jnp.sin(a * jnp.pi * x) * jnp.sin(b * jnp.pi * y)


def cole_hopf(x, t):
    """Burgers' solution by Gauss and Hermite's quadrature, differentiable by jax."""
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    nu = references.BURGERS_VISCOSITY
    # The gradient of the square root is infinite at t = 0.
    y = x[:, None] - jnp.sqrt(4 * nu * jnp.maximum(t, 1e-12))[:, None] * nodes
    logs = -jnp.cos(jnp.pi * y) / (2 * jnp.pi * nu) + np.log(weights)
    weight = jax.nn.softmax(logs, -1)
    return -jnp.sum(jnp.sin(jnp.pi * y) * weight, -1)


EXACT = {
    "poisson_1d": lambda x: jnp.sin(2 * jnp.pi * x) + 0.1 * jnp.sin(10 * jnp.pi * x),
    "poisson_2d": sine(1, 1),
    "helmholtz_2d": sine(1, 4),
    "burgers": cole_hopf,
    "heat_inverse": lambda x, t: evolution.heat(x, t, jnp),
}


@pytest.mark.parametrize("name", some(EXACT, default=["poisson_1d"]))
def test_the_exact_solution_has_no_residuals(name):
    with jax.enable_x64(True):
        equation = PINNS[name]()
        true = {"log_diffusivity": np.log(evolution.DIFFUSIVITY)}
        coefficients = {key: true[key] for key in equation.coefficients}
        blocks = equation.blocks(EXACT[name], jnp.float64, coefficients)
        for _, residual in blocks:
            np.testing.assert_allclose(residual, 0, atol=1e-6)
        points, values = equation.truth
        np.testing.assert_allclose(EXACT[name](*points), values, atol=1e-8)


@pytest.mark.slow
def test_a_wrong_function_has_residuals():
    with jax.enable_x64(True):
        for name, equation in PINNS.items():
            made = equation()
            coefficients = dict.fromkeys(made.coefficients, 0.0)
            blocks = made.blocks(
                lambda *z: 0.3 + z[0] ** 2 + z[-1], jnp.float64, coefficients
            )
            assert all(np.mean(np.square(r)) > 1e-3 for _, r in blocks), name


def test_the_reference_of_burgers_satisfies_the_equation():
    # Finite differences of fourth order, where the shock (of width 0.006) is resolved.
    h = 2e-4
    x, t = (z.ravel() for z in np.meshgrid([-0.6, -0.01, 0.003, 0.4], [0.2, 0.5, 0.9]))
    stencil = np.arange(-2, 3)
    u = references.burgers(x, t)
    along_x = np.stack([references.burgers(x + k * h, t) for k in stencil])
    along_t = np.stack([references.burgers(x, t + k * h) for k in stencil])
    first, second = (
        np.array([1, -8, 0, 8, -1]) / 12,
        np.array([-1, 16, -30, 16, -1]) / 12,
    )
    u_x, u_t = first @ along_x / h, first @ along_t / h
    residual = u_t + u * u_x - references.BURGERS_VISCOSITY * second @ along_x / h**2
    np.testing.assert_allclose(residual, 0, atol=2e-4 * np.abs(u_x).max())


def test_the_reference_of_burgers_has_its_initial_values_and_boundary():
    x = np.linspace(-1, 1, 41)
    zero = np.zeros_like(x)
    np.testing.assert_allclose(
        references.burgers(x, zero), -np.sin(np.pi * x), atol=1e-14
    )
    ends = references.burgers(np.array([-1.0, 1.0, 0.0]), np.array([0.7, 0.7, 0.7]))
    np.testing.assert_allclose(ends, 0, atol=1e-12)


def test_the_reference_of_allen_cahn_satisfies_the_equation():
    # Differences in t of the saved solutions, and in x by Fourier transforms.
    x, t, u = references.allen_cahn(saved=400)
    rows = slice(40, -2)
    step = t[1] - t[0]
    u_t = (u[38:-4] - 8 * u[39:-3] + 8 * u[41:-1] - u[42:]) / (12 * step)
    wave = 2 * np.pi * np.fft.rfftfreq(len(x), 2 / len(x))
    u_xx = np.fft.irfft(-(wave**2) * np.fft.rfft(u[rows]), len(x))
    right = 1e-4 * u_xx + 5 * u[rows] - 5 * u[rows] ** 3
    np.testing.assert_allclose(u_t, right, atol=2e-4)


def test_the_reference_of_allen_cahn_has_converged():
    # Half of the points, then half of the steps; as errors of solutions are reported.
    _, _, fine = references.allen_cahn()
    _, _, in_space = references.allen_cahn(points=512)
    _, _, in_time = references.allen_cahn(steps=1000)
    for coarse, of_fine in ((in_space, fine[:, ::2]), (in_time, fine)):
        assert np.linalg.norm(coarse - of_fine) < 2e-5 * np.linalg.norm(fine)


# --- Other problems -----------------------------------------------------------------


def pauli(chain_sites, matrix, site):
    out = np.eye(1)
    for i in reversed(range(chain_sites)):  # site 0 is the lowest bit
        out = np.kron(out, matrix if i == site else np.eye(2))
    return out


def test_the_ising_chain_is_that_of_pauli_matrices():
    n, field = 4, 0.7
    x, z = np.array([[0, 1], [1, 0]]), np.diag([1, -1])
    true = -sum(pauli(n, z, i) @ pauli(n, z, (i + 1) % n) for i in range(n))
    true = true - field * sum(pauli(n, x, i) for i in range(n))
    np.testing.assert_allclose(spin_chain.ising_chain(n, field).matrix(), true)


def test_the_heisenberg_chain_is_that_of_pauli_matrices():
    n = 6
    matrices = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]]) / 2
    true = sum(
        pauli(n, m, i) @ pauli(n, m, (i + 1) % n) for m in matrices for i in range(n)
    )
    energies = np.linalg.eigvalsh(true)
    found, states = np.linalg.eigh(spin_chain.heisenberg_chain(n).matrix())
    np.testing.assert_allclose(found[0], energies[0])
    assert np.ptp(np.sign(states[:, 0])) == 0  # the ground state has one sign


@pytest.mark.slow
def test_a_variational_energy_is_that_of_the_dense_hamiltonian():
    with jax.enable_x64(True):
        problem = problems.make("ising_rbm")
        params = problem.init(jax.random.key(0), jnp.float64)
        params = jax.tree.map(lambda x: x + 0.05, params)
        chain = spin_chain.ising_chain()
        z = chain.spins @ params["kernel"] + params["hidden"]
        psi = np.exp(chain.spins @ params["visible"]) * np.prod(np.cosh(z), -1)
        energy = psi @ chain.matrix() @ psi / (psi @ psi) / 10
        np.testing.assert_allclose(problem.loss(params), energy)
        assert energy > problem.minimum


@pytest.mark.slow
def test_the_marginal_likelihood_is_that_of_a_multivariate_normal_distribution():
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    with jax.enable_x64(True):
        problem = problems.make("gaussian_process")
        params = problem.init(jax.random.key(0), jnp.float64)
        found = problem.loss(params)
    x, y = datasets.load_diabetes(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))[:150]
    x, y = x[rows], y[rows]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    scales, amplitude, noise = (
        np.exp(params[k]) for k in ("log_lengthscales", "log_amplitude", "log_noise")
    )
    distance = (((x[:, None] - x[None]) / scales) ** 2).sum(-1)
    covariance = amplitude**2 * np.exp(-distance / 2) + (noise**2 + 1e-5) * np.eye(150)
    true = -stats.multivariate_normal(np.zeros(150), covariance).logpdf(y)
    true = true + 0.5 * np.sum((np.log(scales) - 1) ** 2)
    np.testing.assert_allclose(found, true / 150)


@pytest.mark.parametrize("name", ["digits_softmax", "gaussian_process"])
def test_the_minimum_is_that_of_an_independent_solver(name):
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy")
    with jax.enable_x64(True):
        problem = problems.make(name)
        params = problem.init(jax.random.key(5), jnp.float64)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        function = jax.jit(jax.value_and_grad(lambda z: problem.loss(unravel(z))))
        found = optimize.minimize(
            lambda z: jax.device_get(function(z)),
            np.asarray(flat),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "maxcor": 50, "ftol": 0.0, "gtol": 1e-9},
        )
    assert np.linalg.norm(found.jac) < 1e-7
    np.testing.assert_allclose(found.fun, problem.minimum, rtol=0, atol=2e-14)


@pytest.mark.parametrize("name", functions.FUNCTIONS)
def test_a_test_function_is_zero_at_its_solution_only(name):
    problem = problems.make(name)
    params = problem.init(jax.random.key(0), jnp.float32)
    solution = {
        leaf: jnp.full_like(params[leaf], value)
        for leaf, value in functions.SOLUTIONS[name].items()
    }
    assert problem.loss(solution) == 0
    assert problem.loss(params) > 1


def test_the_spirals_are_those_of_an_adaptive_solver():
    integrate = pytest.importorskip("scipy.integrate", reason="needs scipy")
    end, found = neural_ode.END, neural_ode.spiral()
    matrix = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    for i in range(found.shape[1]):
        true = integrate.solve_ivp(
            lambda t, y: y**3 @ matrix,
            (0, end),
            found[0, i],
            t_eval=np.linspace(0, end, len(found)),
            method="DOP853",
            rtol=1e-10,
            atol=1e-12,
        )
        np.testing.assert_allclose(found[:, i], true.y.T, atol=1e-7)


# --- Runs ---------------------------------------------------------------------------


def record(seconds, loss, **more):
    return {
        "seconds": seconds,
        "loss": loss,
        "minimum": 0.0,
        "budget": 10.0,
        "compile_seconds": 3.0,
        "gradient_seconds": 0.01,
        "evaluations": None,
    } | more


def test_a_value_at_equal_cost_is_the_last_one_within_the_budget():
    run = record([0.0, 2.0, 6.0, 8.0, 12.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    values = [report.value_at_end(run, axis) for _, axis in report.AXES.values()]
    assert values == [2.0, 3.0, 4.0]  # 10 s; 7 s after compiling; 250 gradients: 2.5 s
    run["evaluations"] = [0, 100, 240, 400, 500]
    assert report.value_at_end(run, report.AXES["gradients"][1]) == 3.0


def test_a_loss_that_is_not_finite_is_infinite():
    run = record([0.0, 2.0], [5.0, None])
    assert report.value_at_end(run, report.AXES["seconds"][1]) == np.inf


def test_the_seconds_to_a_target_are_those_of_the_first_point_below():
    run = record([0.0, 2.0, 6.0, 8.0], [5.0, 4.0, 5e-7, 5e-6])
    assert report.seconds_to_target(run) == 6.0
    assert report.seconds_to_target(run | {"minimum": -1.0}) == np.inf


@pytest.mark.slow
def test_a_small_run_is_stored_and_not_repeated(tmp_path):
    command_line = pytest.importorskip(
        "benchmarks.full_batch.command_line", reason="needs tqdm"
    )
    arguments = [
        *["--problems", "beale", "--optimizers", "lbfgs_10", "partition_newton"],
        *["--seeds", "1", "--seconds", "0.2", "--dtype", "float32"],
        *["--out", str(tmp_path)],
    ]
    assert command_line.main(arguments) == 0
    path = tmp_path / "runs_0.2s_cpu" / "beale.lbfgs_10.float32.0.json"
    found = json.loads(path.read_text("utf-8"))
    assert found["loss"][-1] < 1e-10 < found["loss"][0]
    assert found["evaluations"][-1] >= found["steps"][-1]
    assert (tmp_path / "beale.png").exists()
    before = path.stat().st_mtime_ns
    assert command_line.main(arguments) == 0
    assert path.stat().st_mtime_ns == before
    assert "| beale |" in (tmp_path / "full_batch.md").read_text("utf-8")
