"""Batched matrix products of rows of tangents, for CPUs.

The batching rule of jax makes the rows of one operand part of the matrices of a batched
product, as in attention. Their axis then comes after the batch axes in memory, and each
consumer transposes the array. If the operand without rows is broadcast over them, the
rows are a batch axis, the first one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines import compat
from partnewton.engines.adjoint.lowerings import switch
from partnewton.engines.compat import Equation

__all__ = ["in_order", "is_batched", "product_of_rows", "repeating"]

BinaryFunction = Callable[[jax.Array, jax.Array], jax.Array]


def is_batched(equation: Equation) -> bool:
    """Whether an equation is a product of many pairs of matrices."""
    if equation.primitive.name != "dot_general":
        return False
    _, (batch, _) = equation.params["dimension_numbers"]
    return len(batch) > 0


def in_order(equation: Equation) -> Any | None:
    """A jaxpr that transposes the operands of a batched product; None if not needed.

    The order of the axes is batch, free, contracted on the left and batch, contracted,
    free on the right. The operands are copied once, and not in each product that is
    derived from this one.
    """
    if not is_batched(equation) or not switch.are_enabled():
        return None
    contracted, batch = equation.params["dimension_numbers"]
    if any(map(compat.is_explicit, equation.invars)):
        return None
    left, right = (atom.aval for atom in equation.invars)
    free = [
        [n for n in range(x.ndim) if n not in (*some, *others)]
        for x, some, others in zip((left, right), contracted, batch, strict=True)
    ]
    orders = (
        (*batch[0], *free[0], *contracted[0]),
        (*batch[1], *contracted[1], *free[1]),
    )
    if all(order == tuple(range(len(order))) for order in orders):
        return None
    axes = tuple(range(len(batch[0])))
    numbers = ((len(axes) + 1,), (len(axes),)), (axes, axes)
    many = [left.shape[i] for i in batch[0]]
    m, k = (math.prod(left.shape[i] for i in some) for some in (free[0], contracted[0]))
    n = math.prod(right.shape[i] for i in free[1])
    shapes = (*many, m, k), (*many, k, n)

    def product(*operands: jax.Array) -> jax.Array:
        matrices = [
            jnp.transpose(x, order).reshape(shape)
            for x, order, shape in zip(operands, orders, shapes, strict=True)
        ]
        result = jax.lax.dot_general(*matrices, numbers, **_options(equation))
        return result.reshape(equation.outvars[0].aval.shape)

    return compat.traced(product, left, right)[1]


def product_of_rows(equation: Equation) -> BinaryFunction | None:
    """The product of an equation for all rows at once; None if it is not batched.

    Either operand may have one more axis in front, that of the rows.
    """
    if not is_batched(equation):
        return None
    numbers, options = equation.params["dimension_numbers"], _options(equation)
    ndims = [atom.aval.ndim for atom in equation.invars]
    return repeating(lambda a, b: jax.lax.dot_general(a, b, numbers, **options), ndims)


def _options(equation: Equation) -> dict[str, Any]:
    """The parameters of a product other than its axes."""
    names = "precision", "preferred_element_type", "out_sharding"
    return {name: equation.params[name] for name in names}


def repeating(function: BinaryFunction, ndims: Sequence[int]) -> BinaryFunction:
    """A bilinear function of rows that broadcasts the operand without rows.

    Args:
      function: of operands without rows.
      ndims: how many axes these have.
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        has_rows = [x.ndim > n for x, n in zip((a, b), ndims, strict=True)]
        if not any(has_rows):
            return function(a, b)
        plain = jax.vmap(function, [0 if has else None for has in has_rows])

        def by_repetition(a: jax.Array, b: jax.Array) -> jax.Array:
            count = len(a if has_rows[0] else b)
            pair = [
                x if has else jnp.broadcast_to(x, (count, *x.shape))
                for x, has in zip((a, b), has_rows, strict=True)
            ]
            return jax.vmap(function)(*pair)

        return (
            plain(a, b) if all(has_rows) else switch.on_cpu(by_repetition, plain, a, b)
        )

    return product
