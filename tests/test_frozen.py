"""Frozen leaves and leaves without entries are invisible, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import quick_jit
from support.selection import some

import partnewton as pn
from partnewton.partitions import FROZEN, checked_direction, partition_of

ENGINES = ["adjoint", "jvp_of_grad"]


def loss(params):
    """(w0 + w1)^4 up to what the frozen leaves and the empty ones add: nothing."""
    w = params["w"] * params["int8"]
    noise = 0 * jax.random.normal(params["key"], ())
    nothing = jnp.exp(-params["infinite"][0]) + jnp.sum(params["empty"])
    return jnp.sum(w) ** 4 + noise + nothing


def parameters():
    return {
        "w": jnp.array([1.0, 2.0]),
        "empty": jnp.ones((3, 0)),
        "infinite": jnp.array([jnp.inf, jnp.nan]),
        "int8": jnp.ones(2, jnp.int8),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0)),
        "uint32": jnp.ones(2, jnp.uint32),
    }


def labels():
    return dict.fromkeys(parameters(), FROZEN) | {"w": "w", "empty": "empty"}


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_leaves_do_not_change_a_summary(engine):
    def summary(params, direction):
        return pn.summarize(
            loss, params, direction, param_labels=labels(), engine=engine
        )

    params = parameters()
    direction = jax.grad(loss, allow_int=True)(params)
    assert direction["int8"].dtype == direction["keys"].dtype == jax.dtypes.float0
    direction = direction | {"w": jnp.array([1.0, -3.0])}
    found = quick_jit(summary)(params, direction)
    # D^d (w0 + w1)^4 [u, ..., u] = 4!/(4 - d)! (w0 + w1)^(4 - d) (u0 + u1)^d
    assert pn.subset_names(params, labels()) == ("w",)
    np.testing.assert_allclose(found.value, 81.0)
    np.testing.assert_allclose(found.gradient, [4 * 27.0 * -2], rtol=1e-6)
    np.testing.assert_allclose(found.hessian, [[12 * 9.0 * 4]], rtol=1e-6)
    np.testing.assert_allclose(found.third, [24 * 3.0 * -8], rtol=1e-6)


@pytest.mark.parametrize("engine", some(ENGINES, default=["adjoint"]))
def test_frozen_leaves_do_not_change_derivative_tensors(engine):
    params = parameters()
    direction = jax.grad(loss, allow_int=True)(params) | {"w": jnp.ones(2)}
    tensors = quick_jit(
        lambda p, u: pn.derivative_tensors(
            loss, p, u, order=2, param_labels=labels(), engine=engine
        )
    )(params, direction)
    np.testing.assert_allclose(tensors[0], [4 * 27.0 * 2], rtol=1e-6)
    np.testing.assert_allclose(tensors[1], [[12 * 9.0 * 4]], rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_direction_that_is_not_finite_at_frozen_entries_does_not_matter(engine):
    params = {"w": jnp.array([1.0, 2.0, 3.0, 1.0])}
    direction = {"w": jnp.array([1.0, jnp.nan, 2.0, jnp.inf])}
    split = {"w": np.array([0, FROZEN, 1, FROZEN])}

    @quick_jit
    def summary(p, u):
        def product(p):
            return jnp.prod(p["w"]) ** 2

        return pn.summarize(product, p, u, param_labels=split, engine=engine)

    # L = 4 a^2 c^2 at a = 1, c = 3, along (1, 2)
    found = summary(params, direction)
    np.testing.assert_allclose(found.gradient, [72.0, 48.0], rtol=1e-6)
    np.testing.assert_allclose(found.hessian, [[72.0, 96.0], [96.0, 32.0]], rtol=1e-6)


def test_a_direction_needs_no_shape_where_leaves_are_frozen():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    direction = {"a": jnp.ones(2), "b": jnp.zeros(())}
    partition = partition_of(params, {"a": "a", "b": FROZEN})
    leaves = checked_direction(direction, params, "updates", partition)
    assert leaves[0] is direction["a"]
    with pytest.raises(ValueError, match=r"updates: the leaf 'b' has shape \(\), but"):
        checked_direction(direction, params, "updates")
    with pytest.raises(ValueError, match="updates has no leaf 'b'"):
        checked_direction({"a": jnp.ones(2), "b": None}, params, "updates", partition)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_leaves_without_entries_add_no_subset(engine, shape):
    params = {"0": jnp.ones(shape), "a": jnp.array(2.0), "z": jnp.ones(shape)}

    def cubed(params):
        return params["a"] ** 3 + jnp.sum(params["0"]) * jnp.sum(params["z"])

    found = quick_jit(lambda p: pn.summarize(cubed, p, p, engine=engine))(params)
    assert pn.subset_names(params) == ("a",)
    np.testing.assert_allclose(found.gradient, [24.0], rtol=1e-6)
    np.testing.assert_allclose(found.hessian, [[48.0]], rtol=1e-6)
    np.testing.assert_allclose(found.third, [48.0], rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        pn.scale_by_partition_newton(param_labels=labels()),
        pytest.param(
            pn.scale_by_partition_newton(param_labels=labels(), backtracking=3),
        ),
        pytest.param(
            optax.chain(
                pn.scale_by_partition_newton(param_labels=labels()),
                pn.clip_by_parameter_rms(param_labels=labels()),
            ),
        ),
        pytest.param(pn.partition_newton(param_labels=labels())),
        pytest.param(pn.paper_newton(param_labels=labels())),
    ],
    ids=["scale", "backtracking", "clip", "preset", "paper"],
)
def test_transformations_do_not_read_frozen_leaves(tx):
    tx = optax.with_extra_args_support(tx)
    params = parameters()
    grads = jax.grad(loss, allow_int=True)(params)
    ints = {name: u for name, u in grads.items() if u.dtype == jax.dtypes.float0}
    others = {name: u for name, u in grads.items() if name not in ints}

    def update(params, others):
        state = tx.init(params)
        updates, new = tx.update(others | ints, state, params, value_fn=loss)
        return updates, state, new

    updates, state, new = jax.eval_shape(update, params, others)
    assert updates.keys() == params.keys()
    for name, u in updates.items():
        assert u.shape == params[name].shape, name
        assert u.dtype != jax.dtypes.float0, name
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), new
    )


def test_an_update_is_that_of_the_parameters_that_are_not_frozen():
    tx = pn.scale_by_partition_newton(pn.rules.newton(), param_labels=labels())
    params = parameters()
    grads = jax.grad(loss, allow_int=True)(params)
    grads |= {"infinite": jnp.full(2, jnp.inf)}
    updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    w = params["w"]
    np.testing.assert_allclose(updates["w"], jnp.full(2, jnp.sum(w) / 6), rtol=1e-5)
    np.testing.assert_array_equal(updates["infinite"], [0, 0])
    np.testing.assert_array_equal(updates["int8"], np.zeros(2, np.int8))
    assert updates["empty"].shape == (3, 0)
    assert pn.learning_rates(state).keys() == {"w"}
