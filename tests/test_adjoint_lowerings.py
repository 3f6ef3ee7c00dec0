"""The fast engine: equivalent computations that are faster on CPUs or GPUs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.both_engines import assert_engines_agree, normal, program_for
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from partnewton.engines import compat
from partnewton.engines.adjoint import inner, lowerings
from partnewton.engines.adjoint.lowerings import (
    convolutions,
    memory,
    products,
    reductions,
)

PyTree = Any


# --- Convolutions and inner products ------------------------------------------------


class Convolution(NamedTuple):
    """A convolution, and whether its kernel is larger than its image."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    arguments: dict[str, Any]
    is_swapped: bool

    def apply(self, x: jax.Array, y: jax.Array) -> jax.Array:
        arguments = {"window_strides": (1, 1), **self.arguments}
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, y, dimension_numbers=numbers, **arguments)


CONVOLUTIONS = {
    "same": Convolution((2, 2), (3, 3), {"padding": "SAME"}, True),
    "of_one_entry": Convolution((1, 1), (3, 3), {"padding": "SAME"}, True),
    "uneven": Convolution((2, 3), (3, 3), {"padding": [(2, 0), (1, 3)]}, True),
    "strided": Convolution(
        (2, 2), (3, 3), {"padding": "SAME", "window_strides": (2, 1)}, True
    ),
    "dilated": Convolution(
        (2, 2), (3, 2), {"padding": [(2, 2), (1, 2)], "rhs_dilation": (2, 1)}, True
    ),
    "transposed": Convolution(
        (2, 2), (3, 3), {"padding": [(1, 1), (2, 1)], "lhs_dilation": (2, 3)}, True
    ),
    "larger_image": Convolution((4, 4), (3, 3), {"padding": "SAME"}, False),
    "grouped": Convolution(
        (2, 2), (3, 3), {"padding": "SAME", "feature_group_count": 2}, False
    ),
}


@pytest.mark.parametrize("name", some(CONVOLUTIONS, default=["same"]))
def test_convolutions(name):
    case = CONVOLUTIONS[name]
    channels = 2 // case.arguments.get("feature_group_count", 1)
    shapes = {"x": (2, *case.image, 2), "k": (*case.kernel, channels, 4), "b": (2,)}
    with jax.enable_x64(True):
        params = {k: jnp.array(normal(*v, seed=5)) for k, v in shapes.items()}
        direction = {k: jnp.array(normal(*v, seed=6)) for k, v in shapes.items()}

        def loss(p: PyTree) -> jax.Array:
            # Both operands have second derivatives along several subsets.
            x, k = jnp.sin(p["x"] * p["b"]), jnp.sin(p["k"]) * jnp.sum(p["b"] ** 2)
            return jnp.sum(jnp.tanh(case.apply(x, k)) ** 2)

        (op,) = (
            op
            for op in program_for(loss, params).ops
            if op.equations[0].primitive.name == "conv_general_dilated"
        )
        faster = convolutions.convolution_of_rows(op.equations[0])
        assert (faster is not None) == case.is_swapped
        found = assert_engines_agree(loss, params, direction)
        assert np.all(found.hessian != 0)
        assert np.all(found.third != 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_inner_products_of_rows_that_are_longer_than_a_block(weighted, monkeypatch):
    monkeypatch.setattr(memory, "_BEYOND_CACHE", 0)
    length = 2 * memory._BLOCK + 3
    a, b = normal(9, length), normal(8, length)
    weight = normal(length) if weighted else np.ones(length)
    with jax.enable_x64(True):
        arguments = [jnp.array(x) for x in (a, b)]
        arguments += [jnp.array(weight)] if weighted else []
        blocks = quick_jit(inner.gram)(*arguments)
    np.testing.assert_allclose(blocks, (a * weight) @ b.T, rtol=1e-12, atol=1e-12)


def test_inner_products_of_many_long_rows_are_computed_in_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_BEYOND_CACHE", 2**12)
    a, weight = normal(9, 40, 60), normal(40, 60)
    with jax.enable_x64(True):
        a, weight = jnp.array(a), jnp.array(weight)
        text = jax.jit(inner.gram).lower(a, a, weight).as_text()
        found = quick_jit(inner.gram)(a, a, weight)
    assert ("stablehlo.while" in text) == (jax.default_backend() == "cpu")
    np.testing.assert_allclose(found, np.einsum("imn,jmn,mn->ij", a, a, weight))


def size_of_the_product(*arguments):
    """The number of inner products of blocks that a Gram matrix is the sum of."""
    jaxpr = compat.open_jaxpr(jax.make_jaxpr(inner.gram)(*arguments))
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    return product.outvars[0].aval.size


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("length", "count"), [(3 * 2**11, 6), (1024, 1), (8191, 1), (0, 1)]
)
def test_inner_products_of_long_rows_are_computed_in_parallel(
    length, count, weighted, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    a, b = normal(3, length), normal(2, length)
    weight = normal(length) if weighted else np.ones(length)
    with jax.enable_x64(True):
        arguments = [jnp.array(x) for x in (a, b)]
        arguments += [jnp.array(weight)] if weighted else []
        size = size_of_the_product(*arguments)
        found = quick_jit(inner.gram)(*arguments)
    assert size == 3 * 2 * count
    np.testing.assert_allclose(found, (a * weight) @ b.T, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "count"), [((6, 5, 700), 30), ((9, 8), 1)])
def test_inner_products_under_a_mesh_are_computed_slice_by_slice(
    shape, count, weighted, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    a, b = normal(3, *shape), normal(2, *shape)
    weight = normal(*shape) if weighted else np.ones(shape)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        arguments = [jnp.array(x) for x in (a, b)]
        arguments += [jnp.array(weight)] if weighted else []
        size = size_of_the_product(*arguments)
        found = quick_jit(inner.gram)(*arguments)
    assert size == 3 * 2 * count
    expected = np.tensordot(a * weight, b, ([*range(1, a.ndim)],) * 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-11)


# --- Sums over the last axes ---------------------------------------------------------


@pytest.mark.parametrize("axes", [(2,), (1, 2), (0,), (0, 2), (0, 1, 2), ()])
@pytest.mark.parametrize(
    "dtype", some([np.float32, np.float64, jnp.bfloat16], default=[np.float32])
)
def test_sums_by_products(axes, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.array(np.round(8 * normal(3, 4, 5)), dtype)
        found = quick_jit(lambda x: reductions.sum_over(x, axes))(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.sum(np.asarray(x, float), axes))


def test_lowerings_can_be_disabled():
    def primitives() -> set[str]:
        jaxpr = jax.make_jaxpr(lambda x: lowerings.sum_over(x, (1,)))(jnp.ones((2, 3)))
        return {e.primitive.name for e in compat.open_jaxpr(jaxpr).eqns}

    assert ("dot_general" in primitives()) == (jax.default_backend() == "cpu")
    with lowerings.disabled():
        assert primitives() == {"reduce_sum"}


# --- Batched products ----------------------------------------------------------------


@pytest.mark.parametrize("with_rows", ["a", "b", "ab", ""])
def test_batched_products_of_rows(with_rows):
    a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    (equation,) = jax.make_jaxpr(lax.batch_matmul)(a, b).eqns
    product = products.product_of_rows(equation)
    axes = [0 if name in with_rows else None for name in "ab"]
    with jax.enable_x64(True):
        a, b = (
            jnp.array(normal(*([7] if axis == 0 else []), *x.shape))
            for axis, x in zip(axes, (a, b), strict=True)
        )
        found = quick_jit(product)(a, b)
    np.testing.assert_allclose(found, np.matmul(a, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "shapes", "in_order"),
    [
        pytest.param(
            "btnh,bsnh->bnts",
            [(2, 3, 4, 5), (2, 7, 4, 5)],
            False,
            marks=pytest.mark.slow,
        ),
        ("bnts,bsnh->btnh", [(2, 4, 3, 7), (2, 7, 4, 5)], False),
        pytest.param(
            "abcde,feda->ebfc",
            [(2, 3, 4, 5, 6), (7, 6, 5, 2)],
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param("ab,ab->b", [(5, 6), (5, 6)], False, marks=pytest.mark.slow),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], True),
        pytest.param("ij,jk->ik", [(3, 4), (4, 5)], True, marks=pytest.mark.slow),
    ],
)
def test_the_axes_of_batched_products_are_transposed_once(formula, shapes, in_order):
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y)

    def loss(params: list[jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(product(*map(jnp.tanh, params))))

    operands = [jnp.ones(shape) for shape in shapes]
    (equation,) = [
        e
        for e in compat.open_jaxpr(compat.traced(product, *operands)[1]).eqns
        if e.primitive.name in ("dot_general", "jit")
    ]
    if equation.primitive.name == "jit":
        inner = compat.open_jaxpr(compat.called_jaxpr(equation)).eqns
        (equation,) = [e for e in inner if e.primitive.name == "dot_general"]
    assert (products.in_order(equation) is None) == in_order

    with jax.enable_x64(True):
        params = [jnp.array(normal(*s, seed=i)) for i, s in enumerate(shapes)]
        assert_engines_agree(loss, params, params)
        ops = program_for(loss, params).ops
    for equation in (e for op in ops for e in op.equations):
        if products.is_batched(equation):
            assert products.in_order(equation) is None


@pytest.mark.slow
def test_a_summary_with_batched_products_can_be_differentiated():
    def loss(params: PyTree) -> jax.Array:
        x, y = (jnp.tanh(p) for p in params)
        return jnp.sum(jnp.sin(jnp.einsum("btnh,bsnh->bnts", x, y)))

    def curvature(params: PyTree, engine: str) -> jax.Array:
        return jnp.sum(pn.summarize(loss, params, params, engine=engine).hessian)

    with jax.enable_x64(True):
        params = [jnp.array(normal(2, 3, 2, 3)), jnp.array(normal(2, 4, 2, 3))]
        gradient = quick_jit(jax.grad(functools.partial(curvature, engine="adjoint")))
        reference = functools.partial(curvature, engine="jvp_of_grad")
        expected = quick_jit(jax.grad(reference))(params)
        for x, y in zip(gradient(params), expected, strict=True):
            assert_close(x, np.asarray(y), 1e-12, "gradient")


def test_calls_inside_of_the_sweep_are_inlined():
    """Only the sweep itself is a call of its own; XLA optimizes across all others."""

    def loss(p):
        def step(h, x):
            return jnp.where(x > 0, jnp.tanh(h @ p + x), h), None

        h, _ = lax.scan(step, jnp.zeros(3), jnp.ones((4, 3)))
        return jnp.sum(h**2)

    p = normal(3, 3)
    lowered = jax.jit(functools.partial(pn.summarize, loss)).lower(p, p).as_text()
    calls = [line for line in lowered.splitlines() if "call @" in line]
    separate = [line for line in calls if 'inlineable = "false"' in line]
    assert len(separate) == 1 < len(calls)
