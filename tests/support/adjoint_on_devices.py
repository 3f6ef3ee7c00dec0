"""Checks of the fast engine on four devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m support.adjoint_on_devices CHECK
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import partnewton as pn
from partnewton.engines import compat

DATA = np.random.default_rng(0).normal(size=(8, 3))
SHAPES = {"b": (4,), "v": (4, 2), "w": (3, 4)}


def loss(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.mean(jnp.sum(jnp.sin(h @ p["v"]), axis=1) ** 2)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.array(rng.normal(size=shape)) for k, shape in SHAPES.items()}


def summary(value_fn, params, direction, engine="adjoint"):
    return pn.summarize(value_fn, params, direction, engine=engine)


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert np.any(y != 0)
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10 * np.max(np.abs(y)))


def expected_of(params, direction):
    value_fn = functools.partial(loss, x=DATA)
    return jax.jit(lambda p, u: summary(value_fn, p, u, "jvp_of_grad"))(
        params, direction
    )


def sharded_map():
    """A mean over devices in the loss, whose parts of the data differ."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("i")), out_specs=P()
    )  # check_vma=True is the default
    def compute(params, direction, x):
        return summary(lambda p: lax.pmean(loss(p, x), "i"), params, direction)

    params, direction = drawn(1), drawn(2)
    assert_same(compute(params, direction, DATA), expected_of(params, direction))


def explicit_mesh():
    """Data that are sharded in their type, parameters that are replicated."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Explicit,))
    params, direction = drawn(1), drawn(2)
    expected = expected_of(params, direction)
    with jax.set_mesh(mesh):
        params, direction = jax.device_put((params, direction), P())
        x = jax.device_put(DATA, P("i", None))
        compute = jax.jit(lambda p, u, x: summary(lambda p: loss(p, x), p, u))
        assert_same(compute(params, direction, x), expected)


def collectives():
    """Each collective operation, in the middle of a loss."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    operations = {
        "all_gather": lambda x: lax.all_gather(x, "i"),
        "all_to_all": lambda x: lax.all_to_all(x, "i", 1, 0, tiled=True),
        "ppermute": lambda x: lax.ppermute(
            x, "i", [(n, (n + 1) % 4) for n in range(4)]
        ),
        "psum": lambda x: lax.psum(x, "i"),
        "psum_scatter": lambda x: lax.psum_scatter(x, "i", scatter_dimension=1),
    }

    def middle(operation, p, x):
        h = operation(jnp.tanh(x @ p["w"]))
        y = jnp.mean(jnp.sin(h) ** 2 + h**3)
        return lax.pmean(y, "i") if compat.varying_axes(y) else y

    for name, operation in operations.items():

        def compute(params, direction, x, engine, operation=operation):
            value_fn = functools.partial(middle, operation, x=x)
            return summary(value_fn, params, direction, engine)

        def on_devices(engine, compute=compute):
            specs = {"in_specs": (P(), P(), P("i")), "out_specs": P()}
            call = functools.partial(compute, engine=engine)
            return jax.jit(jax.shard_map(call, mesh=mesh, **specs))

        params, direction = ({"w": drawn(seed)["w"]} for seed in (1, 2))
        found, expected = (
            on_devices(engine)(params, direction, DATA)
            for engine in ("adjoint", "jvp_of_grad")
        )
        print(name)
        assert_same(found, expected)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 4
    {f.__name__: f for f in (sharded_map, explicit_mesh, collectives)}[sys.argv[1]]()
