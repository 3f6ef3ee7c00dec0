"""Flax: losses of NNX models as pure functions, and linen's TrainState."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from support.selection import some

import partnewton as pn
from partnewton.flax import TrainState, value_fn

X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X[:, :1])
NEWTON = pn.scale_by_partition_newton(pn.rules.newton())


class Network(nnx.Module):
    """A network with running statistics and with a random state."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.output = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def loss_of(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def arrays_of(model):
    """All variables of a model, the random state included, as arrays."""

    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, nnx.as_pure(nnx.state(model)))


# --- NNX ------------------------------------------------------------------------------


def test_the_loss_of_the_parameters_is_the_next_loss_of_the_model():
    model = Network(nnx.Rngs(0))
    of_params = value_fn(model, loss_of, X, Y)
    params = nnx.clone(nnx.state(model, nnx.Param))
    before = arrays_of(model)
    first, second = of_params(params), of_params(params)
    jax.tree.map(np.testing.assert_array_equal, arrays_of(model), before)
    assert first == second == loss_of(model, X, Y)
    assert first != loss_of(model, X, Y)  # another Dropout mask
    assert first == of_params(params)  # although the model has changed


@pytest.mark.slow
def test_the_gradient_of_the_loss_of_the_parameters_is_that_of_nnx():
    model = Network(nnx.Rngs(0))
    of_params = value_fn(model, loss_of, X, y=Y)
    found = jax.grad(of_params)(nnx.state(model, nnx.Param))
    expected = nnx.grad(loss_of)(model, X, Y)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_loss_reads_the_parameters():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    of_params = value_fn(model, loss_of, X, Y)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(of_params(zeros), jnp.mean(Y**2), rtol=1e-6)


def test_nnx_objects_among_the_arguments_are_copied_as_well():
    model = Network(nnx.Rngs(0))
    rngs = nnx.Rngs(7)
    teacher = nnx.Linear(3, 1, rngs=nnx.Rngs(1))

    def loss_fn(model, batch, others):
        noise = others["rngs"].normal((1,))
        target = others["teacher"](batch["x"]) + noise
        return loss_of(model, batch["x"], target), target

    batch, others = {"x": X}, {"rngs": rngs, "teacher": teacher, "name": None}
    of_params = value_fn(model, loss_fn, batch, others=others)
    params = nnx.clone(nnx.state(model, nnx.Param))
    before = arrays_of(rngs)
    (first, _), (second, _) = of_params(params), of_params(params)
    jax.tree.map(np.testing.assert_array_equal, arrays_of(rngs), before)
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (third, _), expected = grad_fn(model, batch, others)
    assert first == second == third
    found = jax.grad(lambda params: of_params(params)[0])(params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert third != loss_fn(model, batch, others=others)[0]  # other random numbers


def test_variables_that_an_argument_shares_with_the_model_stay_shared():
    model = Network(nnx.Rngs(0))

    def loss_fn(model, stream, x, y):
        stream.count[...] += 1  # another mask
        return loss_of(model, x, y)

    stream = next(x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.RngStream))
    of_params = value_fn(model, loss_fn, stream, X, Y)
    found = of_params(nnx.clone(nnx.state(model, nnx.Param)))
    assert found == loss_fn(model, stream, X, Y)


class Adapter(nnx.Param):
    """Variables that alone are trained, in the test below."""


@pytest.mark.slow
def test_other_variables_than_the_parameters_can_be_chosen():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model.scale = Adapter(jnp.ones(1))

    def loss_fn(model, x, y):
        return jnp.mean((model.scale[...] * model(x) - y) ** 2)

    optimizer = nnx.Optimizer(model, pn.partition_newton(), wrt=Adapter)
    of_params = value_fn(model, loss_fn, X, Y)
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, Adapter))(model, X, Y)
    kernel = model.kernel[...]
    optimizer.update(model, grads, value_fn=of_params)
    assert list(pn.learning_rates(optimizer.opt_state)) == ["scale"]
    assert model.scale[...] != 1
    np.testing.assert_array_equal(model.kernel[...], kernel)


@pytest.mark.parametrize("has_aux", some([False, True], default=[True]))
def test_training_decreases_the_loss(has_aux):
    def loss_fn(model, x, y):
        loss = loss_of(model, x, y)
        return (loss, {"batch": len(x)}) if has_aux else loss

    @nnx.jit
    def step(model, optimizer):
        of_params = value_fn(model, loss_fn, X, Y)
        value, grads = nnx.value_and_grad(loss_fn, has_aux=has_aux)(model, X, Y)
        optimizer.update(model, grads, value_fn=of_params)
        return value[0] if has_aux else value

    model = Network(nnx.Rngs(0))
    tx = pn.partition_newton(has_aux=has_aux)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    mean = np.array(model.norm.mean[...])
    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert np.any(mean != model.norm.mean[...])  # by the gradient's pass


@pytest.mark.slow
def test_a_fit_on_all_data_with_subspace_newton():
    class Fit(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.output = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.output(jnp.tanh(self.hidden(x)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss_of)(model, X, Y)
        optimizer.update(model, grads, value_fn=value_fn(model, loss_of, X, Y))

    model = Fit(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pn.subspace_newton(), wrt=nnx.Param)
    for _ in range(100):
        step(model, optimizer)
    assert loss_of(model, X, Y) < 1e-6
    assert len(pn.learning_rates(optimizer.opt_state)) == 4


def test_a_loss_that_is_no_function_is_an_error():
    with pytest.raises(TypeError, match=r"^loss_fn must be a function"):
        value_fn(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), X, Y)


# --- linen ----------------------------------------------------------------------------


class LinenNetwork(linen.Module):
    """The same network with linen."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8, use_bias=False)(x)
        x = jnp.tanh(linen.BatchNorm(use_running_average=False)(x))
        return linen.Dense(1)(linen.Dropout(0.5, deterministic=False)(x))


class State(TrainState):
    """A state with running statistics."""

    batch_stats: Any


def linen_loss(params, x, y, apply_fn, batch_stats, key):
    variables = {"params": params, "batch_stats": batch_stats}
    rngs = {"dropout": key}
    logits, new = apply_fn(variables, x, rngs=rngs, mutable=["batch_stats"])
    return jnp.mean((logits - y) ** 2), new["batch_stats"]


def linen_state(tx, kind=State):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    network = LinenNetwork()
    return kind.create(apply_fn=network.apply, **network.init(rngs, X), tx=tx)


def test_a_linen_step_is_that_of_the_optimizer_and_replaces_fields():
    tx = pn.scale_by_partition_newton(pn.rules.newton(), has_aux=True)
    tx = optax.chain(tx, optax.scale_by_learning_rate(0.5))
    state = linen_state(tx)
    fixed = {
        "apply_fn": state.apply_fn,
        "batch_stats": state.batch_stats,
        "key": jax.random.key(2),
    }

    def loss_fn(params, x, y):
        return linen_loss(params, x, y, **fixed)

    grads, new_stats = jax.grad(loss_fn, has_aux=True)(state.params, X, Y)

    @jax.jit
    def step(state):
        return state.apply_gradients(
            grads=grads, batch_stats=new_stats, value_fn=loss_fn, x=X, y=Y
        )

    @jax.jit
    def by_hand(state):
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value_fn=loss_fn, x=X, y=Y
        )
        return optax.apply_updates(state.params, updates), opt_state

    new = step(state)
    expected, opt_state = by_hand(state)
    jax.tree.map(np.testing.assert_array_equal, new.params, expected)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, opt_state)
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, new_stats)
    assert new.step == 1
    assert new.tx is state.tx
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.slow
def test_linen_training_with_batch_norm_and_dropout_decreases_the_loss():
    @jax.jit
    def step(state):
        key = jax.random.fold_in(jax.random.key(2), state.step)

        def loss_fn(params):
            return linen_loss(params, X, Y, state.apply_fn, state.batch_stats, key)

        pair, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        loss, stats = pair
        new = state.apply_gradients(grads=grads, batch_stats=stats, value_fn=loss_fn)
        return new, loss

    state, losses = linen_state(pn.partition_newton(has_aux=True)), []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.slow
def test_a_linen_fit_on_all_data_with_subspace_newton():
    network = linen.Sequential([linen.Dense(8), jnp.tanh, linen.Dense(1)])

    def loss_fn(params):
        return jnp.mean((network.apply(params, X) - Y) ** 2)

    @jax.jit
    def step(state):
        grads = jax.grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value_fn=loss_fn)

    params = network.init(jax.random.key(0), X)
    tx = pn.subspace_newton()
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
    for _ in range(100):
        state = step(state)
    assert loss_fn(state.params) < 1e-6


class FlaxState(train_state.TrainState):
    """flax's own class with the same fields."""

    batch_stats: Any


def test_with_adam_it_is_the_state_of_flax():
    ours, theirs = (linen_state(optax.adam(0.1), k) for k in (State, FlaxState))
    grads = jax.tree.map(jnp.ones_like, ours.params)
    new = ours.apply_gradients(grads=grads, value_fn=None, x=X)
    expected = theirs.apply_gradients(grads=grads)
    fields = ("step", "params", "opt_state", "batch_stats")
    for name in fields:
        jax.tree.map(
            np.testing.assert_array_equal, getattr(new, name), getattr(expected, name)
        )


def test_parameters_that_flax_overwrites_with_their_gradient_are_overwritten():
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: jnp.zeros(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=NEWTON)

    def loss(params):
        return jnp.sum((params["w"] - 3.0) ** 2)

    grads = {
        "params": jax.grad(loss)(params["params"]),
        OVERWRITE_WITH_GRADIENT: jnp.full(2, 7.0),
    }
    new = state.apply_gradients(grads=grads, value_fn=loss)
    np.testing.assert_array_equal(new.params[OVERWRITE_WITH_GRADIENT], [7.0, 7.0])
    # Newton's step before the change of sign: away from the minimum, as far.
    np.testing.assert_allclose(new.params["params"]["w"], [-1.0, -1.0])


def test_a_missing_loss_is_the_error_of_the_optimizer():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=NEWTON)
    with pytest.raises(ValueError, match=r"^value_fn: .* needs the loss"):
        state.apply_gradients(grads={"w": jnp.ones(2)})


# --- Without flax ---------------------------------------------------------------------


@pytest.mark.slow
def test_without_flax_the_package_works_and_this_module_says_what_is_missing():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import partnewton\n"
        "try:\n    import partnewton.flax\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "partnewton.flax needs flax: pip install flax\n"
