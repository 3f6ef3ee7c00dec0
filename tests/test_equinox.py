"""Equinox: its models once they are filtered, with None where there is no parameter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import Problem
from support.oracles import by_forward_mode, quick_jit, split_from_labels
from support.selection import some

import partnewton as pn
from partnewton import partitions, rules

KEY = jax.random.key(0)
FROZEN = partitions.FROZEN


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def data(*shape):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape[0]))


def as_wide_as_data(model):
    """The model in float64 if that is enabled."""
    wide = jnp.result_type(float)
    return jax.tree.map(
        lambda x: x.astype(wide) if eqx.is_inexact_array(x) else x, model
    )


def mlp():
    """A network with one bias; the other is None, and two leaves are functions."""
    return eqx.nn.MLP(
        2, "scalar", 3, 1, jnp.tanh, use_bias=False, use_final_bias=True, key=KEY
    )


def of_mlp():
    x, y = data(4, 2)
    params, static = eqx.partition(as_wide_as_data(mlp()), eqx.is_inexact_array)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    return loss, params


class _Gru(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self):
        self.cell = eqx.nn.GRUCell(2, 2, use_bias=False, key=KEY)
        self.head = eqx.nn.Linear(2, "scalar", use_bias=False, key=KEY)

    def __call__(self, x):
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(2), x)
        return self.head(last)


def of_gru():
    x, y = data(2, 3, 2)
    params, static = eqx.partition(as_wide_as_data(_Gru()), eqx.is_inexact_array)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    return loss, params


class _Normalised(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self):
        self.first = eqx.nn.Linear(2, 3, use_bias=False, key=KEY)
        self.norm = eqx.nn.BatchNorm(
            3, axis_name="batch", mode="batch", channelwise_affine=False
        )
        self.last = eqx.nn.Linear(3, "scalar", key=KEY)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jnp.tanh(x)), state


def batch_norm_loss(params, static, state, x, y):
    """The loss, and the state with the running statistics as aux."""
    model = eqx.combine(params, static)
    apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    out, state = apply(x, state)
    return jnp.mean((out - y) ** 2), state


def of_batch_norm():
    x, y = data(4, 2)
    model, state = eqx.nn.make_with_state(_Normalised)()
    params, static = eqx.partition(as_wide_as_data(model), eqx.is_inexact_array)
    state = as_wide_as_data(state)
    return lambda params: batch_norm_loss(params, static, state, x, y)[0], params


@pytest.mark.parametrize(
    "of_model", some([of_mlp, of_gru, of_batch_norm], default=[of_mlp])
)
@pytest.mark.parametrize(
    "engine", some(["adjoint", "jvp_of_grad"], default=["adjoint"])
)
def test_the_summary_of_a_model_is_that_of_phi(x64, of_model, engine):
    loss, params = of_model()
    direction = jax.tree.map(lambda x: jnp.cos(7 * x), params)
    labels = partitions.per_tensor(params)
    problem = Problem("", loss, params, direction, loss)
    expected = by_forward_mode(problem, split_from_labels(params, labels))
    found = quick_jit(lambda p, u: pn.summarize(loss, p, u, engine=engine))(
        params, direction
    )
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-9)
    np.testing.assert_allclose(found.hessian, expected.hessian, rtol=1e-9, atol=1e-11)
    third = np.einsum("sss->s", expected.third)
    np.testing.assert_allclose(found.third, third, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_derivative_tensors_of_a_model_are_those_of_phi(x64):
    loss, params = of_mlp()
    direction = jax.tree.map(jnp.cos, params)
    problem = Problem("", loss, params, direction, loss)
    labels = partitions.per_layer(params)
    expected = by_forward_mode(problem, split_from_labels(params, labels))
    found = quick_jit(
        lambda p, u: pn.derivative_tensors(loss, p, u, param_labels=labels)
    )(params, direction)
    for mine, theirs in zip(found, expected[1:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("per_tensor", ("layers/0/weight", "layers/1/weight", "layers/1/bias")),
        ("whole", ("params",)),
        ("weights_biases", ("weights", "biases")),
        ("per_layer", ("layers/0", "layers/1")),
        (partitions.blocks(2), ("block 0", "block 1")),
        (partitions.alternate(3), ("turn 0", "turn 1", "turn 2")),
        (partitions.by_path([("bias", FROZEN), ("", "rest")]), ("rest",)),
        ({"layers": {"0": "first", "1": FROZEN}}, ("first",)),
        ({"layers": "all", "activation": "ignored"}, ("all",)),
        (lambda p: jax.tree.map(lambda x: f"rank {x.ndim}", p), ("rank 2", "rank 1")),
    ],
)
def test_every_partition_splits_a_filtered_model(labels, names):
    params = eqx.filter(mlp(), eqx.is_inexact_array)
    assert pn.subset_names(params, labels) == names
    sizes = partitions.partition_of(params, labels).counts(jax.tree.leaves(params))
    assert np.all(sizes > 0)


def test_per_element_splits_a_filtered_model():
    params = eqx.filter(mlp(), eqx.is_inexact_array)
    assert len(pn.subset_names(params, "per_element")) == 2 * 3 + 3 + 1


def test_a_model_that_is_not_filtered_raises_an_error_with_its_name():
    with pytest.raises(TypeError, match=r"leaf 'activation' is a .*eqx.partition"):
        pn.subset_names(mlp())


def test_the_error_of_a_loss_of_a_model_says_to_combine():
    _, params = of_mlp()
    with pytest.raises(TypeError) as raised:
        pn.summarize(lambda model: jnp.sum(model(jnp.ones(2))), params, params)
    notes = "\n".join(raised.value.__notes__)
    assert "eqx.combine(params, static)" in notes
    assert "'activation'" in notes


@pytest.mark.parametrize(
    "tx",
    [
        pn.partition_newton(),
        pn.partition_newton(direction=optax.scale_by_adam(), param_labels="per_layer"),
        pn.paper_newton(),
        optax.chain(pn.paper_newton(), pn.clip_by_parameter_rms()),
    ],
    ids=["preset", "adam", "paper", "clipped"],
)
def test_every_optimizer_updates_a_filtered_model(tx):
    loss, params = of_mlp()

    def step(params):
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params, value_fn=loss)
        return updates, state, new_state

    updates, state, new_state = jax.eval_shape(step, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)


def descent():
    """The transformation with a rule that compiles quickly, as an optimizer."""
    rule = rules.newton()
    return optax.chain(pn.scale_by_partition_newton(rule), optax.scale(-0.5))


def test_a_model_is_trained_under_filter_jit():
    x, y = data(4, 2)
    model, tx = mlp(), descent()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    @eqx.filter_jit
    def step(model, state, x, y):
        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        updates, state = tx.update(
            grads,
            state,
            params,
            value_fn=lambda params: loss(eqx.combine(params, static), x, y),
        )
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(10):
        model, state, value = step(model, state, x, y)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert pn.metrics(state)["loss"] == pytest.approx(values[-1])
    assert tuple(pn.learning_rates(state)) == (
        "layers/0/weight",
        "layers/1/weight",
        "layers/1/bias",
    )


def test_batch_norm_keeps_its_running_statistics():
    x, y = data(4, 2)
    model, stats = eqx.nn.make_with_state(_Normalised)()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = descent()
    before = jax.tree.leaves(stats)

    @jax.jit
    def step(params, state, stats):
        def loss(params):
            return batch_norm_loss(params, static, stats, x, y)

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda params: loss(params)[0]
        )
        return eqx.apply_updates(params, updates), state, new_stats, value

    state, values = tx.init(params), []
    for _ in range(10):
        params, state, stats, value = step(params, state, stats)
        values.append(float(value))
    assert values[-1] < values[0]
    changed = zip(before, jax.tree.leaves(stats), strict=True)
    assert any(np.any(old != new) for old, new in changed)
