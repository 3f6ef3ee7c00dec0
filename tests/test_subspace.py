"""Newton's method in a subspace of each subset."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import types_of
from support.selection import some

import partnewton as pn
from partnewton import partitions
from partnewton.subspace.basis import orthonormal
from partnewton.subspace.lbfgs import lbfgs_direction
from partnewton.subspace.model import damped_step, quadratic_model
from partnewton.subspace.search import search


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def newton(history=3, **kwargs):
    return optax.chain(
        pn.scale_by_subspace_newton(history, **kwargs), optax.scale(-1.0)
    )


each_optimizer = pytest.mark.parametrize(
    "make", some([newton, pn.subspace_newton], default=[pn.subspace_newton])
)


def trajectory(tx, loss, params, steps):
    """The parameters at the start and after each step, and the last state."""
    state, found = tx.init(params), [params]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        found.append(params)
    return found, state


def quadratic(seed=0, n=8):
    """A, b and x -> x'Ax/2 - b'x, with A positive definite."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A, b = vectors @ np.diag(np.geomspace(1, 30, n)) @ vectors.T, rng.normal(size=n)
    return A, b, lambda x: x @ jnp.asarray(A) @ x / 2 - jnp.asarray(b) @ x


def conjugate_gradients(A, b, steps):
    x, found = np.zeros_like(b), [np.zeros_like(b)]
    r = p = b
    for _ in range(steps):
        alpha = r @ r / (p @ A @ p)
        x, previous, r = x + alpha * p, r, r - alpha * (A @ p)
        p = r + r @ r / (previous @ previous) * p
        found.append(x)
    return np.array(found)


def network(dtype, inputs=3):
    """A regression on 40 points; its parameters and its loss."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, inputs)), dtype)
    y = jnp.sin(2 * x[:, :1]) * x[:, 1:2]
    params = {
        "first": jnp.asarray(rng.normal(size=(inputs, 10)), dtype),
        "bias": jnp.zeros(10, dtype),
        "last": jnp.asarray(rng.normal(size=(10, 1)), dtype),
    }

    def loss(p):
        out = jnp.tanh(x @ p["first"] + p["bias"]) @ p["last"]
        return jnp.mean((out - y) ** 2)

    return params, loss


# --- equal to known methods ------------------------------------------------------


@pytest.mark.parametrize("history", [1, 3])
def test_the_gradient_and_the_last_step_give_conjugate_gradients(x64, history):
    A, b, loss = quadratic()
    tx = newton(history, param_labels=partitions.whole, damping=1e-16)
    found, _ = trajectory(tx, loss, jnp.zeros(len(b)), 6)
    expected = conjugate_gradients(A, b, 6)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-8, atol=1e-10)


def test_without_history_it_is_steepest_descent_with_exact_steps(x64):
    A, b, loss = quadratic()
    tx = newton(0, param_labels=partitions.whole, damping=1e-16)
    found, _ = trajectory(tx, loss, jnp.zeros(len(b)), 3)
    x = np.zeros_like(b)
    for actual in found[1:]:
        g = A @ x - b
        x = x - g @ g / (g @ A @ g) * g
        np.testing.assert_allclose(actual, x, rtol=1e-10)


def test_one_subset_per_entry_is_newtons_method(x64):
    A, b, loss = quadratic()
    tx = newton(0, param_labels=partitions.per_element, damping=1e-16)
    found, _ = trajectory(tx, loss, jnp.ones(len(b)), 1)
    np.testing.assert_allclose(found[1], np.linalg.solve(A, b), rtol=1e-8)


@pytest.mark.slow
def test_a_trajectory_does_not_depend_on_the_scale_of_a_subset(x64):
    params, loss = network(jnp.float64)
    scales = {"first": 2.0**40, "bias": 1.0, "last": 2.0**-30}
    scaled = jax.tree.map(lambda x, c: c * x, params, scales)

    def scaled_loss(p):
        return loss(jax.tree.map(lambda x, c: x / c, p, scales))

    found, _ = trajectory(newton(2), loss, params, 5)
    other, _ = trajectory(newton(2), scaled_loss, scaled, 5)
    for x, y in zip(found, other, strict=True):
        y = jax.tree.map(lambda x, c: x / c, y, scales)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), x, y)


@pytest.mark.slow
def test_a_direction_without_the_length_of_a_step_only_spans(x64):
    """It increases the loss in full, and five times shortened."""
    params, loss = network(jnp.float64)
    huge = newton(1, direction=optax.scale(1e200))
    # Another multiple of the gradient adds nothing to the span.
    found, state = trajectory(huge, loss, params, 4)
    plain, other = trajectory(newton(1), loss, params, 4)
    np.testing.assert_allclose(state[0].loss, other[0].loss, rtol=1e-8)
    np.testing.assert_allclose(found[-1]["first"], plain[-1]["first"], rtol=1e-5)
    assert state[0].summary_count == 4


def test_a_direction_that_decreases_the_loss_is_the_step(x64):
    """Gradient descent by 1 / L, with a summary at the first update only."""
    A, _, loss = quadratic()
    rate = 1 / np.linalg.eigvalsh(A).max()
    found, state = trajectory(
        newton(1, direction=optax.scale(rate)), loss, jnp.ones(8), 5
    )
    for x, y in itertools.pairwise(found[1:]):
        np.testing.assert_allclose(y, x - rate * jax.grad(loss)(x), rtol=1e-10)
    assert state[0].summary_count == 1
    np.testing.assert_allclose(state[0].decrease, loss(found[-2]) - loss(found[-1]))


@pytest.mark.slow
def test_a_direction_that_is_too_long_is_shortened(x64):
    """The parabola through both values and the slope is a quadratic loss itself."""
    _, _, loss = quadratic()
    tx = newton(1, direction=optax.scale(0.5))
    found, state = trajectory(tx, loss, jnp.ones(8), 2)
    x, gradient = found[1], jax.grad(loss)(found[1])
    exact = (gradient @ gradient) / (
        gradient @ jax.jvp(jax.grad(loss), (x,), (gradient,))[1]
    )
    assert 0.05 < exact < 0.25
    np.testing.assert_allclose(found[2], x - exact * gradient, rtol=1e-8)
    assert state[0].summary_count == 1


# --- descent -----------------------------------------------------------------------


@each_optimizer
def test_the_loss_decreases_at_each_step(x64, make):
    params, loss = network(jnp.float64)
    found, state = trajectory(make(), loss, params, 60)
    losses = np.array([loss(p) for p in found])
    assert np.all(np.diff(losses) < 0)
    assert losses[-1] < 1e-3 * losses[0]
    assert state[0].refused_count == 0
    np.testing.assert_allclose(state[0].loss, losses[-2], rtol=1e-10)
    np.testing.assert_allclose(state[0].decrease, losses[-2] - losses[-1], rtol=1e-6)


def test_a_step_beyond_the_validity_of_the_model_is_shortened():
    def loss(x):  # has a step of 300 by its curvature at 0.001, and its minimum at 1
        return -x * jnp.exp(-(x**2) / 2) - 0.1 * jnp.tanh(x)

    x = jnp.float32(0.001)
    tx = pn.scale_by_subspace_newton(history=0)
    gradient, state = jax.grad(loss)(x), tx.init(x)
    step, _ = tx.update(gradient, state, x, value_fn=loss)
    assert loss(x - step) < loss(x) - 0.3
    assert abs(step) < 3


@pytest.mark.slow
@each_optimizer
def test_negative_curvature_is_left(x64, make):
    """x = 1e-3, y = 0 is next to the saddle of x^4 / 4 - x^2 / 2 + y^2."""

    def loss(p):
        return p["x"] ** 4 / 4 - p["x"] ** 2 / 2 + (p["y"] - 1) ** 2

    params = {"x": jnp.array(1e-3), "y": jnp.array(0.0)}
    found, _ = trajectory(make(), loss, params, 30)
    np.testing.assert_allclose(found[-1]["x"], 1, rtol=1e-6)
    np.testing.assert_allclose(found[-1]["y"], 1, rtol=1e-6)


def test_slopes_decide_where_the_loss_has_no_digits_left():
    """A constant of 1e6 hides every decrease below 0.06 in float32."""
    A, b, loss = quadratic()
    tx = newton(1)
    hidden = lambda x: 1e6 + loss(x.astype(jnp.float32)).astype(jnp.float32)  # noqa: E731
    found, _ = trajectory(tx, hidden, jnp.zeros(len(b)), 30)
    np.testing.assert_allclose(found[-1], np.linalg.solve(A, b), rtol=1e-3, atol=1e-4)


@jax.custom_jvp
def with_errors(x):
    """x with relative errors of 2 %, as rounding errors of a residual can be."""
    return x * (1 + 0.02 * jnp.sin(1e6 * x))


with_errors.defjvp(lambda x, dx: (with_errors(*x), *dx))


@each_optimizer
def test_slopes_decide_below_rounding_errors_that_a_residual_amplifies(make):
    """Near the minimum, differences of the loss are errors only."""
    A, b, loss = quadratic()
    hidden = lambda x: with_errors(10 + loss(x))  # noqa: E731
    found, _ = trajectory(make(), hidden, jnp.zeros(len(b)), 40)
    np.testing.assert_allclose(found[-1], np.linalg.solve(A, b), rtol=1e-3, atol=1e-4)


def searched(value_at, slope_at):
    """The trial for the loss 1 - x + x^2 / 2, whose values and slopes are given."""
    model = quadratic_model(1.0, jnp.ones((1, 1)), jnp.ones((1, 1, 1, 1)))
    one = jnp.float32(1)
    return search(model, 1e-3 * one, one, value_at, lambda x: slope_at(x[0]), 0 * one)


def test_slopes_decide_where_they_contradict_the_loss():
    """The noise, unknown so far, is 0.25."""
    trial = searched(lambda x: jnp.float32(1.25), lambda x: x - x**2)
    np.testing.assert_allclose(trial.decrease, trial.predicted_decrease, rtol=1e-5)
    np.testing.assert_allclose(trial.noise - trial.decrease, 0.25, rtol=1e-5)
    assert trial.eta[0] > 0


def test_the_loss_decides_at_a_kink():
    """Slopes that change their sign between two points tell nothing of rounding."""
    trial = searched(lambda x: 1 + x[0], lambda x: -x)
    assert trial.decrease == 0
    assert trial.noise == 0
    np.testing.assert_array_equal(trial.eta, 0)


@pytest.mark.slow
def test_a_physics_informed_network_in_float32():
    """u'' = -sin(x) on [0, pi] with u = 0 at both ends."""
    x = jnp.linspace(0, jnp.pi, 41)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": 1.5 * jax.random.normal(keys[0], (16,)),
        "bias": jnp.linspace(-2, 2, 16),
        "out": jax.random.normal(keys[1], (16,)) / 4,
    }

    def u(p, t):
        return t * (jnp.pi - t) * (jnp.tanh(p["in"] * t + p["bias"]) @ p["out"])

    def loss(p):
        second = jax.grad(jax.grad(u, 1), 1)
        return jnp.mean((jax.vmap(lambda t: second(p, t))(x) + jnp.sin(x)) ** 2)

    found, _ = trajectory(pn.subspace_newton(), loss, params, 200)
    assert loss(found[-1]) < 1e-6 * loss(params)


def test_a_step_below_the_last_digit_of_the_parameters_is_refused():
    weights = jnp.array([1.0, 10.0])
    tx = newton(0, direction=optax.scale(1e-12))
    loss, x = (lambda x: jnp.sum(weights * x**2)), jnp.array([1.0, 2.0])
    (_, x, *_), state = trajectory(tx, loss, x, 1)  # in the subspace
    updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
    assert np.any(x != 0)
    np.testing.assert_array_equal(updates, 0)
    assert state[0].refused_count == 1
    assert state[0].decrease == 0
    np.testing.assert_array_equal(state[0].learning_rates, 0)


# --- harmless ------------------------------------------------------------------------


@each_optimizer
def test_at_a_stationary_point_nothing_moves(make):
    found, state = trajectory(make(), lambda x: jnp.sum(x**2), jnp.zeros(3), 3)
    np.testing.assert_array_equal(found[-1], 0)
    assert state[0].notfinite_count == 0


@pytest.mark.slow
def test_a_constant_and_a_linear_loss():
    found, _ = trajectory(newton(), lambda x: jnp.float32(3.0), jnp.ones(3), 2)
    np.testing.assert_array_equal(found[-1], 1)
    found, _ = trajectory(newton(), lambda x: jnp.sum(x), jnp.ones(3), 2)
    assert np.all(np.isfinite(found[-1]))
    assert np.sum(found[-1]) < 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@each_optimizer
def test_a_parameter_without_influence_stays_small(x64, make, dtype):
    """A shift of all logits: its slope and its curvature are rounding errors."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 5)), dtype)
    target = jax.nn.softmax(jnp.asarray(rng.normal(size=40), dtype))
    params = {"w": jnp.ones((5, 1), dtype), "shift": jnp.zeros((), dtype)}

    def loss(p):
        logits = jnp.tanh(x @ p["w"])[:, 0] + p["shift"]
        return -jnp.sum(target * jax.nn.log_softmax(logits))

    found, _ = trajectory(make(), loss, params, 15)
    assert max(abs(float(p["shift"])) for p in found) < 1
    assert loss(found[-1]) < loss(params)


@each_optimizer
def test_what_is_not_finite_never_reaches_the_parameters(make):
    params, loss = network(jnp.float32)
    tx = make()

    def scaled(p, scale):
        return scale * loss(p)

    @jax.jit
    def step(params, state, scale):
        grads = jax.grad(scaled)(params, scale)
        updates, state = tx.update(grads, state, params, value_fn=scaled, scale=scale)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for scale in (1.0, 1.0, jnp.nan, jnp.inf):
        before = params
        params, state = step(params, state, scale)
        if not np.isfinite(scale):
            jax.tree.map(np.testing.assert_array_equal, params, before)
    assert state[0].notfinite_count == 2
    after, state = step(params, state, 1.0)
    assert loss(after) < loss(params)


@pytest.mark.slow
def test_a_step_that_leaves_the_domain_is_shortened(x64):
    found, state = trajectory(
        newton(1, damping=1e-10),
        lambda x: jnp.sum(x - jnp.log(x)),
        jnp.full(2, 50.0),
        20,
    )
    np.testing.assert_allclose(found[-1], 1, rtol=1e-6)
    assert state[0].notfinite_count == 0


@pytest.mark.slow
@each_optimizer
def test_frozen_leaves_and_entries_stay(make):
    mask = np.array([0, -1, 0])
    labels = {"a": mask, "b": 1, "steps": partitions.FROZEN, "f": partitions.FROZEN}
    params = {
        "a": jnp.ones(3),
        "b": jnp.ones(2),
        "steps": jnp.arange(3),
        "f": jnp.ones(2),
    }

    def loss(p):
        return jnp.sum(p["a"] ** 4) + jnp.sum(p["f"]) * jnp.sum(p["b"] ** 2 + p["a"][0])

    tx = make(param_labels=labels)
    state = tx.init(params)
    grads = jax.grad(loss, allow_int=True)(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
    assert params["a"][1] == 1
    assert params["a"][0] != 1
    np.testing.assert_array_equal(params["f"], 1)
    np.testing.assert_array_equal(params["steps"], np.arange(3))


@pytest.mark.slow
def test_a_scan_and_a_loop_agree_and_the_state_keeps_its_types(x64):
    params, loss = network(jnp.float64)
    tx = pn.subspace_newton(param_labels=partitions.blocks(2))
    found, state = trajectory(tx, loss, params, 6)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    (scanned, last), _ = jax.lax.scan(step, start, None, length=6)
    assert types_of(last) == types_of(state) == types_of(start[1])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), scanned, found[-1]
    )


# --- its parts -----------------------------------------------------------------------


def test_a_basis_is_orthonormal_per_subset_and_drops_dependent_vectors():
    rng = np.random.default_rng(0)
    params = [jnp.zeros((4, 6)), jnp.zeros(30)]
    partition = partitions.partition_of(params, [0, np.repeat([1, 2], 15)])
    u, v = (
        [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in params]
        for _ in range(2)
    )
    close = [x + 1e-4 * y for x, y in zip(u, v, strict=True)]
    double = [2e-30 * x for x in u]
    stacked = orthonormal([u, close, double, v], partition)
    basis = [[x[k] for x in stacked] for k in range(4)]
    gram = np.array([[partition.inner(p, q) for p in basis] for q in basis])
    for s in range(3):
        # What is left of the second vector spans v; u, twice u and v are dependent.
        np.testing.assert_allclose(gram[:2, :2, s], np.eye(2), atol=1e-5)
        np.testing.assert_array_equal(gram[2, :, s], 0)
    exact = [np.concatenate([np.ravel(x) for x in w])[:24] for w in (u, v)]
    plane = np.linalg.qr(np.array(exact, float).T)[0]
    second = np.ravel(basis[1][0])
    assert np.linalg.norm(second - plane @ (plane.T @ second)) < 1e-2


def test_a_damped_step_solves_its_equations(x64):
    rng = np.random.default_rng(0)
    K, S = 2, 3
    H = rng.normal(size=(K * S, K * S))
    H = H @ H.T + np.eye(K * S)
    g = rng.normal(size=K * S)
    model = quadratic_model(
        jnp.array(1.0), jnp.asarray(g.reshape(K, S)), jnp.asarray(H.reshape(K, S, K, S))
    )
    blocks = np.einsum("ksls->kls", H.reshape(K, S, K, S))
    D2 = np.tile(np.linalg.norm(blocks, axis=(0, 1)), K)
    largest = np.max(np.linalg.eigvals(H / D2).real)
    eta, decrease = damped_step(model, jnp.array(0.1))
    expected = np.linalg.solve(H + 0.1 * largest * np.diag(D2), g)
    np.testing.assert_allclose(eta, expected, rtol=1e-10)
    np.testing.assert_allclose(decrease, g @ expected - expected @ H @ expected / 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"history": -1}, ValueError, "history must not be negative"),
        ({"history": 1.5}, TypeError, "history must be an integer"),
        ({"damping": 0.0}, ValueError, "damping must be positive"),
        ({"direction": optax.sgd}, TypeError, "direction must be"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        pn.scale_by_subspace_newton(**arguments)


def test_missing_arguments_of_the_update():
    tx, x = pn.scale_by_subspace_newton(), jnp.ones(2)
    with pytest.raises(ValueError, match="params: scale_by_subspace_newton"):
        tx.update(x, tx.init(x))
    with pytest.raises(ValueError, match="value_fn: scale_by_subspace_newton"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="updates"):
        tx.update(jnp.ones(3), tx.init(x), x, value_fn=jnp.sum)


@pytest.mark.slow
def test_the_direction_of_lbfgs_is_that_of_optax(x64):
    """Where the curvature is positive, and whatever the steps are."""
    _, b, loss = quadratic()
    ours, theirs = lbfgs_direction(3), optax.scale_by_lbfgs(3, scale_init_precond=True)
    x = {"x": jnp.ones(len(b))}
    state, other = ours.init(x), theirs.init(x)
    for i in range(6):
        grads = jax.grad(lambda p: loss(p["x"]))(x)
        direction, state = ours.update(grads, state, x)
        expected, other = theirs.update(grads, other, x)
        if i > 0:  # the first one is a multiple of the gradient
            np.testing.assert_allclose(direction["x"], expected["x"], rtol=1e-8)
        step = {"x": 0.01 * jnp.cos(i + jnp.arange(len(b)))}
        x = jax.tree.map(lambda p, u, v: p - 0.02 * u + v, x, grads, step)


def test_updates_that_are_not_finite_do_not_change_the_state_of_lbfgs():
    tx, x = lbfgs_direction(2), jnp.arange(1.0, 4.0)
    state = tx.init(x)
    for t in (1.0, 0.5):
        _, state = tx.update(t * x, state, t * x)
    _, kept = tx.update(x.at[1].set(jnp.nan), state, 0.2 * x)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
