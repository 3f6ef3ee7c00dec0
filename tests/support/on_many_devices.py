"""Checks for eight devices and float64, so that "equal" can mean 1e-9.

`test_sharding.py` runs this file in a process that has both; it is no test file by its
name, since other processes have neither.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import partnewton as pn
from partnewton.directions import orthogonal_momentum
from partnewton.engines import ENGINES
from partnewton.engines.adjoint.inner import gram
from partnewton.subspace.preset import quasi_newton
from support.oracles import quick_jit

each_engine = pytest.mark.parametrize("engine", sorted(ENGINES))
each_mesh = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def each_layout_with(names, first, *others):
    """The first values with each layout, the others, which add less, with fsdp."""
    cases = [(layout, *first) for layout in LAYOUTS]
    cases += [("fsdp", *values) for values in others]
    return pytest.mark.parametrize(f"layout, {names}", cases)


LAYOUTS = {
    "replicated": {
        "in": {"kernel": P(None, None), "bias": P(None)},
        "out": {"kernel": P(None, None), "bias": P(None)},
    },
    # As in fully sharded data parallelism: the parameters along the axis of the data.
    "fsdp": {
        "in": {"kernel": P("data", None), "bias": P("data")},
        "out": {"kernel": P("data", None), "bias": P("data")},
    },
    "tensor_parallel": {
        "in": {"kernel": P(None, "model"), "bias": P("model")},
        "out": {"kernel": P("model", None), "bias": P(None)},
    },
}


def make_params():
    rng = np.random.default_rng(0)
    return {
        "in": {"kernel": 0.3 * rng.normal(size=(8, 16)), "bias": np.zeros(16)},
        "out": {"kernel": 0.3 * rng.normal(size=(16, 12)), "bias": np.zeros(12)},
    }


def make_data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(32, 8)), rng.normal(size=(32, 12))


def network_loss(params, x, y, layout="replicated", explicit=False):
    """Two layers. Under an explicit mesh a model says itself what is gathered."""
    if explicit and layout == "fsdp":
        params = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    summed = P("data", None) if explicit and layout == "tensor_parallel" else None
    out = jnp.dot(h, params["out"]["kernel"], out_sharding=summed)
    return jnp.mean((out + params["out"]["bias"] - y) ** 2)


def make_optimizer(engine):
    # The rates of the second step are those of the first, the third has its own.
    return optax.chain(
        optax.ema(0.9),
        pn.scale_by_partition_newton(
            pn.rules.cubic(1.0),
            update_interval=2,
            average=pn.averaging.exponential(0.5),
            engine=engine,
        ),
        optax.scale_by_learning_rate(0.5),
    )


def make_step(tx, loss):
    def step(params, state, *batch):
        grads = jax.grad(loss)(params, *batch)
        value_fn = lambda params: loss(params, *batch)  # noqa: E731
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, *batch):
    for _ in range(3):
        params, state = step(params, state, *batch)
    return params, state


@functools.cache
def on_one_device(engine):
    tx = make_optimizer(engine)
    params = make_params()
    step = quick_jit(make_step(tx, network_loss))
    return train(step, params, tx.init(params), *make_data())


def assert_equal_to_rounding(actual, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11),
        actual,
        expected,
    )


def make_mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def sharded(params, layout, mesh):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
        params,
        LAYOUTS[layout],
    )


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@contextlib.contextmanager
def started_on_a_mesh(tx, layout, axis_type):
    """A step, and the parameters, state and batch to start from; the mesh is set."""
    mesh, explicit = make_mesh(axis_type), axis_type is AxisType.Explicit
    loss = functools.partial(network_loss, layout=layout, explicit=explicit)
    with jax.set_mesh(mesh):
        params = sharded(make_params(), layout, mesh)
        batch = jax.device_put(make_data(), NamedSharding(mesh, P("data")))
        yield quick_jit(make_step(tx, loss)), params, jax.jit(tx.init)(params), batch


@each_mesh
@each_layout_with("engine", ["adjoint"], ["jvp_of_grad"])
def test_training_is_what_it_is_on_one_device(layout, axis_type, engine):
    start = started_on_a_mesh(make_optimizer(engine), layout, axis_type)
    with start as (step, params, state, batch):
        if layout == "tensor_parallel":
            assert all_gathers(step.lower(params, state, *batch).compile()) == []
        new_params, new_state = train(step, params, state, *batch)
    assert_equal_to_rounding((new_params, new_state), on_one_device(engine))
    assert_sharded_like(new_params, params)
    assert_sharded_like(new_state[0].ema, params)
    for leaf in jax.tree.leaves(new_state[1]):
        assert leaf.sharding.is_fully_replicated


@functools.cache
def full_batch_on_one_device(max_size):
    tx, params = pn.subspace_newton(direction=quasi_newton(max_size)), make_params()
    step = quick_jit(make_step(tx, network_loss))
    return train(step, params, tx.init(params), *make_data())[0]


@each_mesh
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_size", [4000, 1])
def test_full_batch_training_is_what_it_is_on_one_device(max_size, layout, axis_type):
    """With the matrix of Broyden's method, and with the memory of L-BFGS."""
    tx = pn.subspace_newton(direction=quasi_newton(max_size))
    with started_on_a_mesh(tx, layout, axis_type) as (step, params, state, batch):
        new_params, new_state = train(step, params, state, *batch)
    assert_equal_to_rounding(new_params, full_batch_on_one_device(max_size))
    if axis_type is AxisType.Explicit:  # else XLA chooses
        assert_sharded_like(new_params, params)
    assert new_state[0].summary_count < 3


def assert_sharded_like(tree, params):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


def compiled(step, *arguments):
    return quick_jit(step).lower(*arguments).compile()


def all_gathers(step):
    """The shapes of what is gathered in a compiled step."""
    return re.findall(r"= (\S+) all-gather", step.as_text())


def test_all_gathers_are_found_where_there_are_some():
    mesh = make_mesh(AxisType.Auto)
    x = jax.device_put(np.ones((8, 8)), NamedSharding(mesh, P("data")))
    everywhere = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: 2 * x, out_shardings=everywhere).lower(x).compile()
    assert len(all_gathers(gather)) == 1


def loss_in_place(params):
    """A loss that works where its parameters are."""
    parts = jax.tree.map(lambda w: jnp.sum(jnp.tanh(w - 1.0) ** 2), params)
    return jnp.sin(sum(jax.tree.leaves(parts)))


def make_newton(engine, inside_leaves):
    def halves(params):
        return jax.tree.map(lambda w: np.arange(w.shape[-1]) % 2, params)

    labels = halves if inside_leaves else pn.partitions.per_tensor
    return pn.scale_by_partition_newton(engine=engine, param_labels=labels)


@functools.cache
def newton_on_one_device(engine, inside_leaves):
    tx, params = make_newton(engine, inside_leaves), make_params()
    return quick_jit(make_step(tx, loss_in_place))(params, tx.init(params))


@each_mesh
@each_layout_with(
    "engine, inside_leaves",
    ["adjoint", True],
    ["adjoint", False],
    ["jvp_of_grad", True],
    ["jvp_of_grad", False],
)
def test_no_parameter_is_gathered_that_the_loss_does_not_gather(
    layout, engine, inside_leaves, axis_type
):
    """The loss gathers nothing, so the step must not gather anything either."""
    mesh, tx = make_mesh(axis_type), make_newton(engine, inside_leaves)
    with jax.set_mesh(mesh):
        params = sharded(make_params(), layout, mesh)
        state = jax.jit(tx.init)(params)
        step = compiled(make_step(tx, loss_in_place), params, state)
        found = step(params, state)
    assert all_gathers(step) == []
    assert_equal_to_rounding(found, newton_on_one_device(engine, inside_leaves))


@pytest.mark.parametrize("specs", [(P(), P("data", None)), (P("data", None), P())])
def test_inner_products_with_one_side_sharded_explicitly(specs):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8)), rng.normal(size=(8, 8))
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        pairs = zip(rows, specs, strict=True)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]
        found = quick_jit(gram)(*placed)
    assert found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, rows[0] @ rows[1].T)


# --- The preset ------------------------------------------------------------------

DIRECTIONS = {
    "muon": lambda: pn.directions.equilibrated(orthogonal_momentum()),
    "adam": optax.scale_by_adam,
}


def make_preset(direction):
    """The preset as it is, or with another direction; rates as in make_optimizer."""
    given = None if direction == "muon" else DIRECTIONS[direction]()
    return pn.partition_newton(direction=given, update_interval=2)


@functools.cache
def preset_on_one_device(direction):
    tx, params = make_preset(direction), make_params()
    step = quick_jit(make_step(tx, network_loss))
    return train(step, params, tx.init(params), *make_data())


@each_mesh
@each_layout_with("direction", ["muon"], ["adam"])
def test_the_preset_is_what_it_is_on_one_device(layout, axis_type, direction):
    start = started_on_a_mesh(make_preset(direction), layout, axis_type)
    with start as (step, params, state, batch):
        new_params, new_state = train(step, params, state, *batch)
    assert_equal_to_rounding((new_params, new_state), preset_on_one_device(direction))
    assert_sharded_like(new_params, params)
    assert_the_state_is_sharded_like(params, new_state)


def assert_the_state_is_sharded_like(params, state):
    """What has the path of a parameter has its sharding, and all else is everywhere."""
    expected = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    moments = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        like = expected.get(jax.tree_util.keystr(path[-2:]))
        if like is None:
            assert x.sharding.is_fully_replicated, (path, x.sharding)
        elif x.shape == like.shape:  # not one number a row or column
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim), (path, x)
            moments += 1
    assert moments >= len(expected)


@each_mesh
@each_layout_with("direction", ["muon"], ["adam"])
def test_the_preset_gathers_what_its_direction_gathers(layout, axis_type, direction):
    """The loss gathers nothing, so all that is gathered is for the direction."""

    def gathered_by(tx):
        state = jax.jit(tx.init)(params)
        return sorted(
            all_gathers(compiled(make_step(tx, loss_in_place), params, state))
        )

    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params = sharded(make_params(), layout, mesh)
        alone = optax.with_extra_args_support(DIRECTIONS[direction]())
        found, expected = gathered_by(make_preset(direction)), gathered_by(alone)
    assert found == expected
    # XLA can multiply matrices that are sharded along their last axis in place.
    in_place = "replicated" if axis_type is AxisType.Explicit else "tensor_parallel"
    assert (expected != []) == (
        direction == "muon" and layout not in ("replicated", in_place)
    )


# --- shard_map -------------------------------------------------------------------


def local_step(tx, loss, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))
    step = make_step(tx, loss)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), **options)
    return quick_jit(mapped)


def mean_loss(params, x, y):
    return jax.lax.pmean(network_loss(params, x, y), "data")


def start(engine):
    params = make_params()
    return params, make_optimizer(engine).init(params), *make_data()


@each_engine
def test_shard_map_with_the_mean_in_the_loss_is_what_it_is_on_one_device(engine):
    step = local_step(make_optimizer(engine), mean_loss)
    assert_equal_to_rounding(train(step, *start(engine)), on_one_device(engine))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_preset_inside_shard_map_is_what_it_is_on_one_device(direction):
    tx, params = make_preset(direction), make_params()
    step = local_step(tx, mean_loss)
    found = train(step, params, jax.jit(tx.init)(params), *make_data())
    assert_equal_to_rounding(found, preset_on_one_device(direction))


@each_engine
@pytest.mark.parametrize("loss", [mean_loss, network_loss])
def test_shard_map_that_does_not_check_raises(loss, engine):
    with pytest.raises(ValueError, match="shard_map with check_vma=False"):
        local_step(make_optimizer(engine), loss, check_vma=False)(*start(engine))


def test_pmap_raises():
    def step(x, y):
        loss = lambda params: mean_loss(params, x, y)  # noqa: E731
        params = make_params()
        return pn.summarize(loss, params, params)

    x, y = (a.reshape(8, 4, -1) for a in make_data())
    with pytest.raises(ValueError, match="inside pmap"):
        jax.pmap(step, axis_name="data")(x, y)


def test_a_loss_without_the_mean_raises():
    def summarize(params, x, y):
        return pn.summarize(lambda p: network_loss(p, x, y), params, params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P("data"), P("data"))
    mapped = jax.shard_map(summarize, mesh=mesh, in_specs=specs, out_specs=P("data"))
    with pytest.raises(ValueError, match=r"return jax.lax.pmean\(loss, 'data'\)"):
        jax.jit(mapped)(make_params(), *make_data())


def test_gradients_that_are_not_averaged_raise():
    def summarize(params, x):
        direction = jax.tree.map(lambda w: w * x[0, 0], params)
        loss = lambda p: jnp.sum(p["in"]["bias"] ** 2)  # noqa: E731
        return pn.summarize(loss, params, direction)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P("data"))
    mapped = jax.shard_map(summarize, mesh=mesh, in_specs=specs, out_specs=P("data"))
    with pytest.raises(
        ValueError, match=r"direction: .* the gradient of jax.lax.pmean"
    ):
        mapped(make_params(), make_data()[0])


def test_parameters_sharded_by_hand_raise():
    def summarize(params):
        loss = lambda p: jax.lax.pmean(jnp.sum(p["w"] ** 2), "data")  # noqa: E731
        return pn.summarize(loss, params, params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(summarize, mesh=mesh, in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match=r"params: .* use jit with sharded arguments"):
        mapped({"w": np.ones(8)})


def test_a_mesh_of_one_device_needs_no_mean():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def summarize(params, x, y):
        return pn.summarize(lambda p: mean_loss(p, x, y), params, params)

    mapped = jax.shard_map(
        summarize, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    params, batch = make_params(), make_data()
    expected = pn.summarize(lambda p: network_loss(p, *batch), params, params)
    assert_equal_to_rounding(jax.jit(mapped)(params, *batch), expected)
