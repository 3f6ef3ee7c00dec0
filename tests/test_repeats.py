"""Repeated layers, whose tangents pass them in a scan, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from benchmarks import models
from partnewton.engines import compat
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.repeats import repeats_in

WIDTH = 3
LAYERS = 7
X = np.random.default_rng(0).normal(size=(4, WIDTH))


def draw(*shape, seed=0):
    return jnp.array(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def params(num_layers=LAYERS):
    return [
        {"w": draw(WIDTH, WIDTH, seed=i), "b": draw(WIDTH, seed=i)}
        for i in range(num_layers)
    ]


def layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def plain(ps):
    x = jnp.asarray(X, ps[0]["w"].dtype)
    for p in ps:
        x = layer(p, x)
    return jnp.sum(jnp.sin(x))


def residual(ps):
    """With a norm, whose statistics are smaller arrays than what they divide."""
    x = jnp.asarray(X, ps[0]["w"].dtype)
    for p in ps:
        y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)
        x = x + jnp.exp(p["b"]) * jnp.tanh(y @ p["w"])
    return jnp.mean(x**3)


def attention(ps):
    x = jnp.asarray(X, ps[0]["w"].dtype)
    for p in ps:
        weights = jax.nn.softmax((x @ p["w"]) @ x.T)
        x = x + weights @ x * p["b"]
    return jnp.mean(jnp.sin(x))


def densely_connected(ps):
    """Each layer is read by the next one and again at the end."""
    x, total = jnp.asarray(X, ps[0]["w"].dtype), 0.0
    for p in ps:
        x = layer(p, x)
        total = total + jnp.sum(jnp.cos(x))
    return total


def with_a_common_input(ps):
    """Each layer reads what was computed from the first parameters, too."""
    first, *rest = ps
    memory = x = layer(first, jnp.asarray(X, ps[0]["w"].dtype))
    for p in rest:
        x = jnp.tanh(x @ p["w"] + memory * p["b"])
    return jnp.sum(x**2)


def with_shared_weights(ps):
    x = jnp.asarray(X, ps[0]["w"].dtype)
    for p in ps:
        x = jnp.tanh(x @ ps[0]["w"] + p["b"])
    return jnp.sum(x**2)


def with_two_masks(ps):
    """The first layer has one mask twice, the others have two different ones."""
    x = jnp.asarray(X, ps[0]["w"].dtype)
    a, b = jnp.array([0.5, 1, 2], x.dtype), jnp.array([2, -1, 1], x.dtype)
    for n, p in enumerate(ps):
        x = jnp.tanh(x @ p["w"] + p["b"] * a)
        x = x - jnp.mean(x, 0) * (b if n else a)
    return jnp.sum(x**2)


def backwards(ps):
    """Weights are met in the other order."""
    return plain(ps[::-1])


def with_masks(ps):
    """Masks depend on what moves, and are no part of the operations that move."""
    x = jnp.asarray(X, ps[0]["w"].dtype)
    for p in ps:
        y = x @ p["w"] + p["b"]
        x = jnp.where(y > 0.1, y**2 / 4, jnp.sin(y))
    return jnp.sum(x)


def through_scans(ps):
    """The layers are a scan already, beside others that are none."""
    half = LAYERS // 2
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *ps[:half])
    x, _ = jax.lax.scan(
        lambda x, p: (layer(p, x), None), jnp.asarray(X, ps[0]["w"].dtype), stacked
    )
    for p in ps[half:]:
        x = layer(p, x)
    return jnp.sum(jnp.sin(x))


LOSSES = [
    plain,
    residual,
    attention,
    densely_connected,
    with_a_common_input,
    with_shared_weights,
    with_two_masks,
    backwards,
    with_masks,
    through_scans,
]
PARTITIONS = {
    "per_tensor": pn.partitions.per_tensor,
    "per_layer": pn.partitions.per_layer,
    "weights_biases": pn.partitions.weights_biases,
    "whole": pn.partitions.whole,
    "alternate": pn.partitions.alternate(3),
    "one_for_biases": pn.partitions.by_path([("b", "b"), (r"(\d+)", r"\1")]),
    "per_element": pn.partitions.per_element,
    "frozen": pn.partitions.by_path(
        [("(0|4).*w", pn.partitions.FROZEN), ("(.)", r"\1")]
    ),
}


def each_loss(default=LOSSES):
    return pytest.mark.parametrize(
        "loss", some(LOSSES, default=default), ids=lambda x: x.__name__
    )


def repeats_of(loss, num_layers=LAYERS):
    return repeats_in(program_of(compat.traced(loss, params(num_layers))[1])[0])


@each_loss()
def test_layers_are_found(loss):
    repeats = repeats_of(loss)
    assert max(len(repeat.parts) for repeat in repeats) >= LAYERS // 2


def assert_engines_agree(loss, fast="adjoint", **options):
    ps, direction = params(), jax.tree.map(lambda x: jnp.sin(3 * x) + 0.2, params())
    summaries = [
        quick_jit(functools.partial(pn.summarize, loss, engine=engine, **options))(
            ps, direction
        )
        for engine in (fast, "jvp_of_grad")
    ]
    found, expected = summaries
    for field in found._fields:
        x = np.asarray(getattr(expected, field))
        assert np.any(x != 0)
        assert_close(getattr(found, field), x, 1e-11, field)


@each_loss(default=[with_two_masks])
def test_summaries_against_the_reference(loss):
    with jax.enable_x64(True):
        assert_engines_agree(loss)


# Each partition with one loss, and those across layers with each.
WITH_PARTITIONS = [(plain, name) for name in PARTITIONS] + [
    (loss, name) for loss in LOSSES[1:] for name in ("alternate", "frozen")
]


@pytest.mark.parametrize(
    "case",
    some(WITH_PARTITIONS, default=[(plain, "per_layer"), (plain, "frozen")]),
    ids=lambda case: f"{case[0].__name__}-{case[1]}",
)
def test_partitions_against_the_reference(case):
    loss, name = case
    with jax.enable_x64(True):
        assert_engines_agree(loss, param_labels=PARTITIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [plain, residual, with_two_masks, through_scans])
def test_blocks_of_subsets_against_the_reference(loss):
    with jax.enable_x64(True):
        assert_engines_agree(loss, pn.engines.Adjoint(batch_size=6))


@each_loss(default=[plain])
def test_the_third_order_tensor_against_the_reference(loss):
    with jax.enable_x64(True):
        ps, direction = params(4), jax.tree.map(jnp.sin, params(4))
        found, expected = (
            quick_jit(functools.partial(pn.derivative_tensors, loss, engine=engine))(
                ps, direction
            )
            for engine in ("adjoint", "jvp_of_grad")
        )
        for x, y in zip(found, expected, strict=True):
            assert_close(x, np.asarray(y), 1e-10, "tensor")


def num_equations(jaxpr):
    """The equations in a jaxpr, each called one counted once."""
    seen, total = set(), 0
    left = [compat.open_jaxpr(jaxpr)]
    while left:
        inner = left.pop()
        if id(inner) not in seen:
            seen.add(id(inner))
            total += len(inner.eqns)
            for equation in inner.eqns:
                inside = core.jaxprs_in_params(equation.params)
                left.extend(map(compat.open_jaxpr, inside))
    return total


def size_beyond_the_gradient(loss, name, num_layers):
    ps, labels = params(num_layers), PARTITIONS[name]
    summary = functools.partial(pn.summarize, loss, param_labels=labels)
    sizes = [
        num_equations(jax.make_jaxpr(summary)(ps, ps)),
        num_equations(jax.make_jaxpr(jax.grad(loss))(ps)),
    ]
    return sizes[0] - sizes[1]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (plain, "per_tensor"),
        (plain, "weights_biases"),
        (plain, "one_for_biases"),
        (with_shared_weights, "per_tensor"),
    ],
)
def test_a_deep_network_is_traced_in_few_operations(loss, name):
    few, many = (size_beyond_the_gradient(loss, name, n) for n in (12, 36))
    assert many < 1.5 * few


@pytest.mark.slow
def test_one_subset_of_a_deep_transformer_against_directional_derivatives():
    """jaxlib 0.10 has crashed in a loop over these layers, with one row per value."""
    model = models.make("transformer_6", scale=8)

    def phi(t):
        moved = jax.tree.map(lambda x: (1 - t) * x, model.params)
        return model.loss(moved, model.batch)

    first = jax.jvp(phi, (0.0,), (1.0,))[1]
    second = jax.jvp(jax.grad(phi), (0.0,), (1.0,))[1]
    summary = quick_jit(
        functools.partial(
            pn.summarize,
            lambda x: model.loss(x, model.batch),
            param_labels=pn.partitions.whole,
            engine="adjoint",
        )
    )(model.params, model.params)
    np.testing.assert_allclose(summary.gradient, [-first], rtol=1e-3)
    np.testing.assert_allclose(summary.hessian, [[second]], rtol=1e-3)
