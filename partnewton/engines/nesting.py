"""Second and third derivatives, by the first nesting of modes that jax accepts.

Everything here is about the derivatives of ``jax.grad(loss)``. Forward mode over the
gradient is the cheapest way. Where an operation cannot be differentiated forwards, as a
`custom_vjp` that calls another one, the gradient is differentiated backwards once more;
its product with a vector is then one with the transposed Jacobian, which has the same
symmetric part. All of this is tried while jax traces, the cheapest way first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from partnewton.engines import compat

__all__ = [
    "DifferentiationError",
    "LinearizedGradient",
    "inner",
    "linearize_gradient",
    "third",
]

Arrays = Sequence[jax.Array]
Function = Callable[[list[jax.Array]], tuple[jax.Array, Any]]  # to (value, aux)


class DifferentiationError(TypeError):
    """No nesting of forward and reverse mode computes a derivative of this order.

    Attributes:
      kernels: the names of the Pallas kernels in the function.
    """

    def __init__(self, message: str, kernels: Sequence[str]):
        super().__init__(message)
        self.kernels = tuple(kernels)


class LinearizedGradient(NamedTuple):
    """A scalar function at a point, to second order.

    Attributes:
      value, aux: what the function returns.
      gradient: as `jax.grad` has it.
      product: from a tangent v to Dg[v], with g the gradient, or to the product with
        the transposed Jacobian. The two have the same symmetric part.
    """

    value: jax.Array
    aux: Any
    gradient: list[jax.Array]
    product: Callable[..., list[jax.Array]]


def linearize_gradient(function: Function, x: Arrays) -> LinearizedGradient:
    """The gradient of a function, linearised.

    Raises:
      DifferentiationError: there is no way, or none with a gradient in reverse mode.
    """
    x = list(x)

    def value_and_gradient(x: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        found, gradient = jax.value_and_grad(function, has_aux=True)(x)
        return gradient, found

    def linearized() -> LinearizedGradient:
        gradient, jvp, found = jax.linearize(value_and_gradient, x, has_aux=True)
        return LinearizedGradient(
            *found, gradient, _traced_forwards(lambda *v: jvp(list(v)), *x)
        )

    def forwards() -> LinearizedGradient:
        def jvp(*v: jax.Array) -> list[jax.Array]:
            return jax.jvp(lambda x: value_and_gradient(x)[0], (x,), (list(v),))[1]

        product = _traced_forwards(jvp, *x)
        gradient, found = value_and_gradient(x)
        return LinearizedGradient(*found, gradient, product)

    def backwards() -> LinearizedGradient:
        gradient, pull, found = jax.vjp(value_and_gradient, x, has_aux=True)
        return LinearizedGradient(*found, gradient, lambda *v: pull(list(v))[0])

    return _first_that_works([linearized, forwards, backwards], function, x)


def third(
    function: Function, x: Arrays, velocity: Arrays, acceleration: Arrays | None, dtype
) -> jax.Array:
    """The second derivative of <g, x'> at 0 along a curve, g being the gradient.

    For the curve x(t) = x + t v + t^2/2 a this is

        <v, D2g[v, v] + Dg[a]> + 2 <a, Dg[v]>,

    and along a line, a = 0, the third derivative of the function.

    Args:
      function: from a list of arrays to ``(value, aux)``.
      x: the point.
      velocity: v.
      acceleration: a, or None for a line.
      dtype: of t and of the result.
    """

    def point(t: jax.Array) -> list[jax.Array]:
        return [at + step for at, step in zip(x, steps(t), strict=True)]

    def steps(t: jax.Array) -> list[jax.Array]:
        moved = [t.astype(v.dtype) * v for v in velocity]
        if acceleration is None:
            return moved
        half = 0.5 * t * t
        pairs = zip(moved, acceleration, strict=True)
        return [v + half.astype(a.dtype) * a for v, a in pairs]

    def slope(t: jax.Array) -> jax.Array:
        speed = list(velocity)
        if acceleration is not None:
            pairs = zip(velocity, acceleration, strict=True)
            speed = [v + t.astype(a.dtype) * a for v, a in pairs]
        return inner(jax.grad(lambda x: function(x)[0])(point(t)), speed, dtype)

    zero = jnp.zeros((), dtype)

    def twice(outer: Callable, inmost: Callable) -> Callable[[], jax.Array]:
        def run() -> jax.Array:
            (found,) = _traced_forwards(outer(inmost(slope)), zero)(zero)
            return found

        return run

    ways = [(_forward, _forward), (_forward, jax.grad), (jax.grad, jax.grad)]
    return _first_that_works([twice(*way) for way in ways], function, x)


def _traced_forwards(
    function: Callable, *args: jax.Array
) -> Callable[..., list[jax.Array]]:
    """The function, if jax can differentiate it in forward mode."""
    traced, jaxpr = compat.traced(function, *args)
    if compat.mentions(jaxpr, "custom_lin"):  # jax raises its error only on lowering
        raise TypeError("a custom_vjp cannot be differentiated forwards")
    return traced


def _forward(function: Callable) -> Callable:
    """The derivative of a function of one number."""
    return lambda t: jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def inner(xs: Arrays, ys: Arrays, dtype: Any) -> jax.Array:
    """The inner product of two lists of arrays, over all devices of a `shard_map`."""
    total = jnp.zeros((), dtype)
    for x, y in zip(xs, ys, strict=True):
        term = jnp.sum(x.astype(dtype) * y.astype(dtype))
        axes = compat.varying_axes(term)
        total = total + (jax.lax.psum(term, axes) if axes else term)
    return total


def _first_that_works(ways: Sequence[Callable], function: Function, x: Arrays) -> Any:
    errors = []
    for way in ways:
        try:
            return way()
        except Exception as error:  # jax has no common class for these errors
            errors.append(error)
    x = list(x)
    jax.eval_shape(function, x)  # raises errors of the function itself
    kernels = compat.kernels_in(jax.make_jaxpr(function)(x))
    where = f" It contains the Pallas kernel {', '.join(kernels)}." if kernels else ""
    raise DifferentiationError(
        "value_fn cannot be differentiated as often as a summary requires, neither "
        f"forwards over its gradient nor backwards.{where} Give the operation that jax "
        "names below a rule that can itself be differentiated (jax.custom_jvp, or a "
        "custom_vjp whose backward pass consists of differentiable operations), or use "
        "an implementation by operations of jax. With third_order=False the loss need "
        "only be differentiable twice."
        f" jax says: {type(errors[0]).__name__}: {errors[0]}",
        kernels,
    ) from errors[0]
