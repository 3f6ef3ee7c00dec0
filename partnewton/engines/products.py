"""Batched matrix products of rows, by a way that is fast on CPUs.

In a batched product, such as those of attention, the rows of tangents of one operand
would become part of the matrices of each batch: behind the batch axes in memory, so
that all that follows has to bring them to the front again. If what stands still is
repeated for each row, the rows are one more batch axis, in front of all others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from partnewton.engines import versions
from partnewton.engines.versions import Equation

__all__ = ["is_batched", "of_rows", "repeating"]

Product = Callable[[jax.Array, jax.Array], jax.Array]


def is_batched(equation: Equation) -> bool:
    """Whether an equation is a product of many pairs of matrices."""
    if equation.primitive.name != "dot_general":
        return False
    _, (batch, _) = equation.params["dimension_numbers"]
    return len(batch) > 0


def of_rows(equation: Equation) -> Product | None:
    """The product of an equation, to be taken of many rows; None if not batched."""
    if not is_batched(equation):
        return None
    names = "dimension_numbers", "precision", "preferred_element_type", "out_sharding"
    arguments = {name: equation.params[name] for name in names}
    return repeating(lambda a, b: jax.lax.dot_general(a, b, **arguments))


def repeating(function: Product) -> Product:
    """A product that repeats the operand without rows, where the other one has some."""

    @jax.custom_batching.custom_vmap
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return function(a, b)

    @product.def_vmap
    def of_many(
        count: int, has_rows: list[bool], a: jax.Array, b: jax.Array
    ) -> tuple[jax.Array, bool]:
        def plain(a: jax.Array, b: jax.Array) -> jax.Array:
            return jax.vmap(function, [0 if has else None for has in has_rows])(a, b)

        def repeated(a: jax.Array, b: jax.Array) -> jax.Array:
            pair = [
                x if has else jnp.broadcast_to(x, (count, *x.shape))
                for x, has in zip((a, b), has_rows, strict=True)
            ]
            return jax.vmap(function)(*pair)

        explicit = versions.is_explicit(a) or versions.is_explicit(b)
        if explicit or versions.on_a_mesh():
            return plain(a, b), True
        result = jax.lax.platform_dependent(a, b, cpu=repeated, default=plain)
        return result, True

    return product
