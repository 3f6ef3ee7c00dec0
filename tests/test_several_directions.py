"""Summaries along several directions, against phi as a function of K S numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.oracles import assert_close, phi, quick_jit, split_from_labels, split_of
from support.selection import some

import partnewton as pn
from partnewton.engines import ENGINES, Adjoint, JvpOfGrad
from partnewton.partitions import FROZEN

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))
adjoint_by_default = pytest.mark.parametrize(
    "engine", some(sorted(ENGINES), default=["adjoint"])
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def thirds(params):
    """Three subsets that all leaves share, and frozen entries in the first leaf."""
    return split_of(params, lambda i, place: place % 3 - (i == 0)).tree(params)


PARTITIONS = {
    "per_tensor": pn.partitions.per_tensor,
    "whole": pn.partitions.whole,
    "alternate": pn.partitions.alternate(2),
    "thirds": thirds,
}


def random_directions(params, K, seed=0):
    """K pytrees like `params`, of different norms."""
    rng = np.random.default_rng(seed)

    def draw(k):
        return jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=np.shape(x)) / (k + 1)), params
        )

    return [draw(k) for k in range(K)]


def derivatives_of_phi(problem, directions, labels):
    """Gradient (K, S), hessian (K, S, K, S) and third (K, S) of L, by jax.hessian.

    phi is that of a problem whose parameters are K displacements, with labels of their
    own for each of them.
    """
    split = split_from_labels(problem.params, labels(problem.params))
    K, S = len(directions), split.size
    displaced = problem._replace(
        loss=lambda ds: problem.loss(jax.tree.map(total, problem.params, *ds)),
        plain=lambda ds: problem.plain(jax.tree.map(total, problem.params, *ds)),
        params=jax.tree.map(jnp.zeros_like, directions),
        direction=directions,
    )
    numbers = [
        np.where(label == FROZEN, FROZEN, label + k * S)
        for k in range(K)
        for label in split.labels
    ]
    f = phi(displaced, type(split)(tuple(numbers)))

    def third_along(e):
        def along(g):
            return lambda x: jax.jvp(g, (x,), (e,))[1]

        return along(along(along(f)))(jnp.zeros(K * S))

    @quick_jit
    def compute():
        zero = jnp.zeros(K * S)
        third = jax.lax.map(third_along, jnp.eye(K * S))
        return f(zero), -jax.grad(f)(zero), jax.hessian(f)(zero), -third

    value, gradient, hessian, third = compute()
    shape = (K, S)
    return pn.Summary(
        value, gradient.reshape(shape), hessian.reshape(shape * 2), third.reshape(shape)
    )


def total(x, *displacements):
    return x + sum(displacements)


def assert_summaries_close(actual, expected, rtol):
    for field in expected._fields:
        assert_close(getattr(actual, field), getattr(expected, field), rtol, field)


# All of them with one model, and each model and the reference with one of them.
DIRECTIONS = list(zip(range(1, 9), 2 * list(PARTITIONS), strict=True))
CASES = [
    *(("adjoint", "mlp", K, key) for K, key in DIRECTIONS),
    *(
        ("adjoint", name, *DIRECTIONS[(i + 5) % len(DIRECTIONS)])
        for i, name in enumerate(models.MODELS)
        if name != "mlp"
    ),
    ("jvp_of_grad", "mlp", *DIRECTIONS[5]),
]
QUICK = [("adjoint", "mlp", 4, "thirds")]


@pytest.mark.parametrize("case", some(CASES, default=QUICK))
def test_phi_of_all_directions_agrees(case):
    engine, name, K, key = case
    problem, labels = models.make(name, jnp.float64), PARTITIONS[key]
    directions = random_directions(problem.params, K)
    summary = quick_jit(
        lambda p, us: pn.summarize(
            problem.loss, p, us, param_labels=labels, engine=engine
        )
    )(problem.params, directions)
    expected = derivatives_of_phi(problem, directions, labels)
    assert_summaries_close(summary, expected, 1e-10)


# Operations with rules, or ways of computing, that depend on the number of rows.
ZOO = [
    "activations",
    "batch_norm",
    "branches_on_parameters",
    "convolution_of_two_parameters",
    "convolutions_strided_and_grouped",
    "custom_vjp",
    "einsum",
    "embedding_and_gathers",
    "group_norm_and_rms_norm",
    "pooling",
    "reductions",
    "scan_in_a_scan",
    "scan_over_layers",
    "scatters",
    "softmaxes",
    "sorting",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_operations_take_several_directions(name):
    problem = models.make(name, jnp.float64)
    directions = random_directions(problem.params, 2)
    labels = pn.partitions.per_tensor
    summary = quick_jit(lambda p, us: pn.summarize(problem.loss, p, us))(
        problem.params, directions
    )
    expected = derivatives_of_phi(problem, directions, labels)
    assert_summaries_close(summary, expected, 1e-9)


def mlp(K):
    problem = models.make("mlp", jnp.float64)
    return problem, random_directions(problem.params, K)


@pytest.mark.slow
@adjoint_by_default
def test_each_direction_has_the_summary_that_it_has_alone(engine):
    problem, directions = mlp(3)
    both = pn.summarize(problem.loss, problem.params, directions, engine=engine)
    for k, u in enumerate(directions):
        alone = pn.summarize(problem.loss, problem.params, u, engine=engine)
        assert_close(both.gradient[k], alone.gradient, 1e-12, "gradient")
        assert_close(both.hessian[k, :, k], alone.hessian, 1e-12, "hessian")
        assert_close(both.third[k], alone.third, 1e-12, "third")


@each_engine
def test_dependent_directions_have_dependent_rows(engine):
    problem, (u, v) = mlp(2)
    w = jax.tree.map(lambda a, b: 2 * a - 3 * b, u, v)
    s = pn.summarize(problem.loss, problem.params, [u, v, w], engine=engine)
    mixed = jnp.array([[1, 0], [0, 1], [2, -3.0]])
    assert_close(s.gradient, mixed @ s.gradient[:2], 1e-12, "gradient")
    expected = jnp.einsum("ka,asbt,lb->kslt", mixed, s.hessian[:2, :, :2], mixed)
    assert_close(s.hessian, expected, 1e-12, "hessian")
    matrix = s.hessian.reshape(2 * [s.gradient.size])
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.slow
@adjoint_by_default
def test_a_zero_direction_has_zero_derivatives_and_changes_no_other(engine):
    problem, (u, v) = mlp(2)
    zero = jax.tree.map(jnp.zeros_like, u)
    s = pn.summarize(problem.loss, problem.params, [u, zero, v], engine=engine)
    for x in (s.gradient[1], s.third[1], s.hessian[1], s.hessian[:, :, 1]):
        np.testing.assert_array_equal(x, 0)
    without = pn.summarize(problem.loss, problem.params, [u, v], engine=engine)
    kept = jnp.array([0, 2])
    assert_close(s.gradient[kept], without.gradient, 1e-12, "gradient")
    assert_close(s.hessian[kept][:, :, kept], without.hessian, 1e-12, "hessian")


@each_engine
def test_a_leading_axis_and_a_sequence_are_the_same(engine):
    problem, directions = mlp(3)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *directions)
    a = pn.summarize(problem.loss, problem.params, tuple(directions), engine=engine)
    b = pn.summarize(
        problem.loss, problem.params, stacked, num_directions=3, engine=engine
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_direction_has_axes_of_subsets_only():
    problem, (u,) = mlp(1)
    alone = pn.summarize(problem.loss, problem.params, u)
    (S,) = alone.gradient.shape
    assert [x.shape for x in alone] == [(), (S,), (S, S), (S,)]
    listed = pn.summarize(problem.loss, problem.params, [u])
    assert [x.shape for x in listed] == [(), (1, S), (1, S, 1, S), (1, S)]


@pytest.mark.slow
def test_a_list_of_leaves_is_one_direction_where_the_parameters_are_a_list():
    params = [jnp.ones(2), jnp.ones(2)]

    def loss(p):
        return jnp.sum(p[0] ** 2 * p[1])

    assert pn.summarize(loss, params, params).gradient.shape == (2,)
    assert pn.summarize(loss, params, tuple(params)).gradient.shape == (2,)
    assert pn.summarize(loss, params, [params] * 2).gradient.shape == (2, 2)


@pytest.mark.slow
@each_engine
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_mixed_derivatives_are_those_of_phi(order, engine):
    def loss(p):
        return p["a"] ** 3 * p["b"] + jnp.sin(p["a"] * p["b"])

    params = {"a": jnp.array(1.5), "b": jnp.array(-0.5)}
    directions = random_directions(params, 2)
    tensors = pn.derivative_tensors(
        loss, params, directions, order=order, engine=engine
    )

    def along(eta):  # (K, S)
        a = sum(eta[k, 0] * u["a"] for k, u in enumerate(directions))
        b = sum(eta[k, 1] * u["b"] for k, u in enumerate(directions))
        return loss({"a": params["a"] + a, "b": params["b"] + b})

    derivative = along
    for d, tensor in enumerate(tensors, start=1):
        derivative = jax.jacfwd(derivative)
        assert tensor.shape == (2, 2) * d
        assert_close(tensor, derivative(jnp.zeros((2, 2))), 1e-12, f"order {d}")
    if order >= 3:
        s = pn.summarize(loss, params, directions, engine=engine)
        diagonal = jnp.einsum("ksksks->ks", tensors[2])
        assert_close(s.third, diagonal, 1e-12, "third")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("engine", [Adjoint, JvpOfGrad])
def test_blocks_of_subsets_give_the_same(engine, batch_size):
    problem, directions = mlp(3)
    compute = functools.partial(
        pn.summarize, problem.loss, problem.params, directions, param_labels=thirds
    )
    assert_summaries_close(compute(engine=engine(batch_size)), compute(), 1e-12)


def deep(ps, x, scan):
    """Six layers, in a loop or in a scan."""

    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]), None

    if scan:
        h, _ = jax.lax.scan(layer, x, ps)
    else:
        h = x
        for i in range(6):
            h, _ = layer(h, jax.tree.map(lambda leaf, i=i: leaf[i], ps))
    return jnp.mean(h**2)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_repeated_layers_take_several_directions(scan):
    rng = np.random.default_rng(0)
    ps = {
        "w": jnp.asarray(rng.normal(size=(6, 4, 4)) / 2),
        "b": jnp.asarray(rng.normal(size=(6, 4)) / 2),
    }
    if not scan:
        loss = functools.partial(deep_of_leaves, x=rng.normal(size=(5, 4)))
        ps = [jax.tree.map(lambda leaf, i=i: leaf[i], ps) for i in range(6)]
    else:
        loss = functools.partial(deep, x=rng.normal(size=(5, 4)), scan=True)
    directions = random_directions(ps, 3)
    fast = quick_jit(lambda p, us: pn.summarize(loss, p, us))(ps, directions)
    slow = pn.summarize(loss, ps, directions, engine="jvp_of_grad")
    assert_summaries_close(fast, slow, 1e-11)


def deep_of_leaves(ps, x):
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *ps)
    return deep(stacked, x, scan=False)


def test_micro_batches_average():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))

    def loss(p, x):
        return jnp.mean(jnp.tanh(x * p["a"] + p["b"]) ** 4)

    params = {"a": jnp.array(0.5), "b": jnp.array(-0.2)}
    directions = random_directions(params, 2)
    whole = pn.summarize(lambda p: loss(p, x), params, directions)
    parts = [pn.summarize(lambda p, r=r: loss(p, r), params, directions) for r in x]
    mean = jax.tree.map(lambda *s: sum(s) / len(s), *parts)
    assert_summaries_close(mean, whole, 1e-12)


@pytest.mark.parametrize(
    ("direction", "num_directions", "message"),
    [
        (
            [{"a": jnp.ones(2)}] * 2,
            3,
            r"sequence of 2 pytrees, but num_directions is 3",
        ),
        (
            [{"a": jnp.ones(2)}, {"a": jnp.ones(3)}],
            None,
            r"direction\[1\].*'a'.*\(3,\)",
        ),
        ([{"a": jnp.ones(2)}, {"b": jnp.ones(2)}], None, r"direction\[1\].*'a'"),
        ({"a": jnp.ones(2)}, 2, r"'a' has shape \(2,\).*num_directions=2"),
        ({"a": jnp.ones((2, 2))}, 0, "num_directions must be an integer"),
        ({"a": jnp.ones((2, 2))}, 2.0, "num_directions must be an integer"),
        ([{"a": jnp.ones(2)}, {"a": 1j * jnp.ones(2)}], None, r"direction\[1\].*real"),
    ],
)
def test_wrong_directions_are_named(direction, num_directions, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pn.summarize(
            lambda p: jnp.sum(p["a"] ** 2),
            {"a": jnp.ones(2)},
            direction,
            num_directions=num_directions,
        )
