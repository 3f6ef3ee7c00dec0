"""The dense quasi-Newton direction."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.selection import some

import partnewton as pn


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def quadratic(n=6):
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = vectors @ np.diag(np.geomspace(1, 100, n)) @ vectors.T
    return jnp.asarray((A + A.T) / 2)


def states(A, points, tx=None):
    """The outgoing updates and the states at some points, for the loss x'Ax/2."""
    tx = pn.scale_by_broyden() if tx is None else tx
    state, found = tx.init(points[0]), []
    for x in points:
        direction, state = tx.update(A @ x, state, x)
        found.append((direction, state))
    return found


def factor(state):
    return np.asarray(state.scale * state.matrix + state.columns.T @ state.rows)


def inverse_hessian(state):
    return factor(state) @ factor(state).T


def dfp(H, s, y):
    """The update of Nocedal and Wright, Numerical Optimization, (6.15)."""
    Hy = H @ y
    return H - np.outer(Hy, Hy) / (y @ Hy) + np.outer(s, s) / (s @ y)


def bfgs(H, s, y):
    """The update of Nocedal and Wright, Numerical Optimization, (6.17)."""
    rho, identity = 1 / (s @ y), np.eye(len(s))
    left = identity - rho * np.outer(s, y)
    return left @ H @ left.T + rho * np.outer(s, s)


def test_the_first_pair_of_its_own_steps_is_one_of_bfgs(x64):
    A = quadratic()
    x = jnp.ones(6)
    tx = pn.scale_by_broyden()
    direction, state = tx.update(A @ x, tx.init(x), x)
    step = -0.1 * direction
    _, state = tx.update(A @ (x + step), state, x + step)
    s, y = np.asarray(step), np.asarray(A @ step)
    H = bfgs(np.eye(6) * (s @ y) / (y @ y), s, y)
    np.testing.assert_allclose(inverse_hessian(state), H, rtol=1e-9, atol=1e-12)


def test_other_steps_than_its_own_are_pairs_of_davidon_fletcher_powell(x64):
    A = quadratic()
    points = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)))
    found = states(A, points)
    s, y = points[1] - points[0], A @ (points[1] - points[0])
    H = np.eye(6) * (s @ y) / (y @ y)
    for n in range(1, 5):
        s = points[n] - points[n - 1]
        H = dfp(H, np.asarray(s), np.asarray(A @ s))
        direction, state = found[n]
        np.testing.assert_allclose(inverse_hessian(state), H, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(direction, H @ (A @ points[n]), rtol=1e-8)


def own_steps(A, lengths):
    """The points and states of steps along its own directions."""
    tx = pn.scale_by_broyden()
    x = jnp.ones(len(A))
    state, found = tx.init(x), []
    for t in lengths:
        direction, state = tx.update(A @ x, state, x)
        found.append((x, direction, state))
        x = x - t * direction
    return found


@pytest.mark.parametrize("t", [0.2, 1.0, 1.7])
def test_pairs_of_its_own_steps_satisfy_the_secant_equation(x64, t):
    """H y = s, H is symmetric positive definite, and the direction is H g."""
    A = quadratic()
    found = own_steps(A, [0.1, 1.0, t, t, t])
    for (x, _, _), (z, direction, state) in itertools.pairwise(found):
        H, s = inverse_hessian(state), z - x
        np.testing.assert_allclose(H @ (A @ s), s, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(H, H.T, rtol=1e-10, atol=1e-14)
        assert np.linalg.eigvalsh(H).min() > 0
        np.testing.assert_allclose(direction, H @ (A @ z), rtol=1e-7, atol=1e-12)


def test_the_update_of_its_own_steps_is_in_broydens_class(x64):
    """H' restricted to the complement of y is a multiple of H, plus a rank of one."""
    A = quadratic()
    found = own_steps(A, [0.1, 1.0, 0.4, 0.4])
    (x, _, old), (z, _, new) = found[2], found[3]
    H, s = inverse_hessian(old), np.asarray(z - x)
    y = np.asarray(A) @ s
    rest = inverse_hessian(new) - np.outer(s, s) / (s @ y)
    Hy, yHy = H @ y, y @ H @ y
    v = np.sqrt(yHy) * (s / (s @ y) - Hy / yHy)
    basis = [H - np.outer(Hy, Hy) / yHy, np.outer(v, v)]
    columns = np.stack([b.ravel() for b in basis], axis=1)
    (inverse_tau, ratio), *_ = np.linalg.lstsq(columns, rest.ravel(), rcond=None)
    np.testing.assert_allclose(columns @ [inverse_tau, ratio], rest.ravel(), atol=1e-12)
    # Self-scaling makes H larger, and its update is not that of BFGS.
    assert inverse_tau > 1.001
    assert ratio / inverse_tau > 0


def minimised(dtype, steps):
    """Rosenbrock's function of ten variables, by full steps or shorter ones."""

    def loss(x):
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    x = jnp.zeros(10, dtype)
    tx = pn.subspace_newton(direction=pn.scale_by_broyden())
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        return x + updates, state

    for _ in range(steps):
        x, state = step(x, state)
    return x, state


@pytest.mark.parametrize(
    "dtype", some([jnp.float32, jnp.float64], default=[jnp.float32])
)
def test_a_curved_valley_is_followed_to_its_end(x64, dtype):
    x, state = minimised(dtype, 150)
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    np.testing.assert_allclose(x, 1, rtol=tolerance)
    assert state[0].direction.matrix.dtype == dtype


def test_without_a_step_or_with_a_wrong_curvature_the_matrix_is_kept(x64):
    A = quadratic()
    points = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)))
    tx = pn.scale_by_broyden()
    state = states(A, points, tx)[-1][1]
    again, kept = tx.update(A @ points[-1], state, points[-1])
    np.testing.assert_array_equal(factor(kept), factor(state))
    np.testing.assert_allclose(again, state.direction, rtol=1e-12)
    _, kept = tx.update(-A @ points[0], state, points[0])
    np.testing.assert_array_equal(factor(kept), factor(state))


def test_after_five_other_steps_in_a_row_the_matrix_starts_anew(x64):
    A = quadratic()
    points = jnp.asarray(np.random.default_rng(1).normal(size=(7, 6)))
    counts = [int(state.count) for _, state in states(A, points)]
    assert counts == [0, 1, 2, 3, 4, 0, 1]
    _, state = states(A, points)[-1]
    s = points[-1] - points[-2]
    y = A @ s
    H = dfp(np.eye(6) * (s @ y) / (y @ y), np.asarray(s), np.asarray(y))
    np.testing.assert_allclose(inverse_hessian(state), H, rtol=1e-9, atol=1e-12)


def test_a_direction_is_one_of_descent_even_if_the_matrix_is_not_finite():
    tx, x = pn.scale_by_broyden(), jnp.ones(3)
    _, state = tx.update(x, tx.init(x), x)
    state = state._replace(count=jnp.int32(5), matrix=jnp.full((3, 3), jnp.nan))
    direction, state = tx.update(x, state, x)
    assert direction @ x > 0
    assert state.count == 0


@pytest.mark.parametrize("curvature", [1e-20, 1e-16])
def test_curvatures_whose_squares_underflow_do_not_make_the_direction_infinite(
    curvature,
):
    """At the end of a float32 run y'y is 0, or s'y y'H y is, although y is not."""
    tx, x = pn.scale_by_broyden(), jnp.full(3, 1e-3)
    state = tx.init(x)
    for _ in range(6):
        direction, state = tx.update(jnp.float32(curvature) * x, state, x)
        assert np.all(np.isfinite(direction))
        assert np.all(np.isfinite(factor(state)))
        x = 0.9 * x


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_updates_that_are_not_finite_do_not_change_the_state(x64, steps):
    A = quadratic()
    points = jnp.asarray(np.random.default_rng(1).normal(size=(steps + 1, 6)))
    tx, state = pn.scale_by_broyden(), None
    state = states(A, points, tx)[-1][1] if steps else tx.init(points[0])
    for bad in (jnp.nan, jnp.inf):
        _, kept = tx.update(points[-1].at[2].set(bad), state, points[-1] + 1)
        jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_pairs_are_added_to_the_matrix_at_the_first_and_at_every_fourth_pair(x64):
    """In between the matrix does not change, so that nothing has to write it."""
    found = own_steps(quadratic(), [0.1, 1.0] + 9 * [0.4])
    for (_, _, old), (_, _, new) in itertools.pairwise(found[1:]):
        is_written = new.count % 4 == 1
        assert is_written == np.any(new.matrix != old.matrix)
        assert is_written == (not np.any(new.columns))


def test_a_matrix_without_pending_pairs_is_not_copied_in_a_loop():
    """A branch that returns the matrix unchanged must not cost a pass over it."""
    tx, x = pn.scale_by_broyden(), jnp.ones(7)

    @jax.jit
    def descend(x, state):
        def step(_, carry):
            x, state = carry
            direction, state = tx.update(x, state, x)
            return x - 0.1 * direction, state

        return jax.lax.fori_loop(0, 9, step, (x, state))

    text = descend.lower(x, tx.init(x)).compile().as_text()
    body = [line for line in text.splitlines() if "f32[7,7]{1,0} copy(" in line]
    assert len(body) <= 1, body  # of the argument, before the loop


def test_nothing_selects_between_two_matrices():
    """A selection would read the old matrix and write the new one once more."""
    x = jnp.ones(7)

    def selections(tx):
        update = jax.make_jaxpr(tx.update)(x, tx.init(x), x)
        return str(update).count("f32[7,7] = select_n")

    alone = pn.scale_by_broyden()
    assert selections(alone) == 1  # of the matrix and the identity, if pairs are added
    wrapped = pn.directions.skip_nonfinite(alone, param_labels=pn.partitions.per_tensor)
    assert selections(wrapped) == 1


def test_the_factor_resolves_condition_numbers_that_float32_does_not():
    """A quadratic function whose curvatures differ by 1e10, in float32."""
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    roots = jnp.asarray(vectors * np.geomspace(1, 1e-5, 12), jnp.float32).T
    tx = pn.scale_by_broyden()
    x = jnp.asarray(vectors @ np.geomspace(1, 1e5, 12), jnp.float32)  # loss 12

    def loss(x):
        return jnp.sum((roots @ x) ** 2)

    @jax.jit
    def step(x, state):
        direction, state = tx.update(jax.grad(loss)(x), state, x)
        sizes = 0.5 ** jnp.arange(12)
        losses = jax.vmap(lambda t: loss(x - t * direction))(sizes)
        return x - sizes[jnp.argmin(losses)] * direction, state

    state = tx.init(x)
    for _ in range(150):
        x, state = step(x, state)
    assert loss(x) < 1e-3


def test_trees_of_several_dtypes(x64):
    params = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((), jnp.float64)}
    tx = pn.scale_by_broyden()
    direction, state = tx.update(params, tx.init(params), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), direction) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert state.matrix.shape == (7, 7)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="10 parameters, more than max_size = 9"):
        pn.scale_by_broyden(9).init(jnp.ones(10))
    with pytest.raises(ValueError, match="max_size must be at least 1"):
        pn.scale_by_broyden(0)
    tx, x = pn.scale_by_broyden(), jnp.ones(2)
    with pytest.raises(ValueError, match="params: scale_by_broyden"):
        tx.update(x, tx.init(x))


def test_many_parameters_have_the_memory_of_lbfgs():
    state = pn.subspace_newton().init({"w": jnp.zeros((100, 41))})
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert max(sizes) == 50 * 4100


@pytest.mark.parametrize("size", [10, 2600])
def test_map_params_visits_the_direction_of_both_kinds(size):
    tx, params = pn.subspace_newton(), {"w": jnp.ones((size, 1))}
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x + 1, state)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), state, doubled)
    for step in doubled[0].steps:
        np.testing.assert_array_equal(step["w"], 1)
    if size > 2500:
        np.testing.assert_array_equal(doubled[0].direction.lbfgs.params["w"], 1)
