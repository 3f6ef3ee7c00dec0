"""What a summary is where derivatives are a matter of rules: of `jax.grad`, by rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import partnewton as pn
from support.oracles import Tensors, assert_close, quick_jit

PyTree = Any


def direction_of(params: PyTree) -> PyTree:
    """A direction that is no multiple of anything."""
    return jax.tree.map(lambda x: jnp.cos(3 * x + 1).astype(x.dtype), params)


@functools.cache
def by_differences(loss: Callable, make_params: Callable) -> Tensors:
    """Differences of ``jax.grad(loss)``, one subset a leaf; third is its diagonal.

    The symmetric part of the Jacobian is the Hessian. The steps and weights have an
    error of O(h^4) from truncation.
    """
    leaves, treedef = jax.tree.flatten(make_params())
    parts = jax.tree.leaves(direction_of(make_params()))
    size = len(leaves)

    def slopes(eta: jax.Array) -> jax.Array:
        moved = [
            x - eta[i] * u for i, (x, u) in enumerate(zip(leaves, parts, strict=True))
        ]
        gradient = jax.grad(loss)(jax.tree.unflatten(treedef, moved))
        pairs = zip(jax.tree.leaves(gradient), parts, strict=True)
        return jnp.stack([jnp.vdot(g, u) for g, u in pairs])

    near, far = 2e-3, 1e-2
    offsets = np.array([-2, -1, 0, 1, 2])
    axes = np.eye(size)
    points = [h * n * axis for h in (near, far) for axis in axes for n in offsets]
    found = quick_jit(lambda x: jax.lax.map(slopes, x))(jnp.array(points))
    at = np.asarray(found).reshape(2, size, len(offsets), size)
    first = np.array([1, -8, 0, 8, -1]) / 12
    second = np.array([-1, 16, -30, 16, -1]) / 12
    jacobian = -np.einsum("n,tns->st", first, at[0]) / near
    third = np.einsum("n,sns->s", second, at[1]) / far**2
    value = np.asarray(loss(make_params()))
    return Tensors(value, at[0, 0, 2], (jacobian + jacobian.T) / 2, third)


def assert_is_derivative_of_gradient(
    loss: Callable,
    make_params: Callable,
    engine: str,
    *,
    third_order: bool = True,
    rtol: float = 1e-6,
) -> None:
    """A summary in float64 and float32 against differences in float64."""
    with jax.enable_x64(True):
        expected = by_differences(loss, make_params)
    for x64 in (True, False):
        with jax.enable_x64(x64):
            params = make_params()
            found = quick_jit(
                functools.partial(
                    pn.summarize, loss, engine=engine, third_order=third_order
                )
            )(params, direction_of(params))
            assert_close(found.gradient, expected.gradient, _rtol(1e-10, x64), "g")
            assert_close(found.hessian, expected.hessian, _rtol(rtol, x64), "hessian")
            np.testing.assert_array_equal(found.hessian, found.hessian.T)
            if third_order:
                floor = 1e-2 * np.max(np.abs(expected.hessian))
                tolerance = _rtol(100 * rtol, x64)
                assert_close(found.third, expected.third, tolerance, "third", floor)


def _rtol(exact: float, x64: bool) -> float:
    return exact if x64 else max(exact, 2e-4)
