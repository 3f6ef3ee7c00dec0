"""The direction of L-BFGS, for updates that are not its own steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton._strictness import at_least_float32, permissive
from partnewton._tree import select
from partnewton.directions import KeepsFinite

__all__ = ["LbfgsDirectionState", "lbfgs_direction"]


class LbfgsDirectionState(NamedTuple):
    """State of :func:`lbfgs_direction`; m is the size of the memory.

    Attributes:
      count: the number of updates, shape (), int32.
      params: the parameters at the last update.
      updates: the incoming updates, the gradient, at the last update.
      steps: differences of parameters, newest first, with a leading axis of length m.
      differences: of gradients, in the same order.
      inverse_products: 1 / <step, difference>, 0 for an empty slot, shape (m,).
      scale: <step, difference> / <difference, difference> of the newest pair, ().
    """

    count: jax.Array
    params: optax.Params
    updates: optax.Updates
    steps: optax.Params
    differences: optax.Updates
    inverse_products: jax.Array
    scale: jax.Array


def lbfgs_direction(memory_size: int = 20) -> optax.GradientTransformation:
    """The gradient times the inverse Hessian of L-BFGS, with the sign of a gradient.

    It differs from :func:`optax.scale_by_lbfgs` in that pairs of negative curvature are
    not stored, so that the direction is one of descent, in that updates that are not
    finite do not change its state, and in that the state can be donated and sharded.
    """

    def init_fn(params: optax.Params) -> LbfgsDirectionState:
        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        def memory() -> Any:
            return jax.tree.map(
                lambda x: jnp.stack([jnp.zeros_like(x)] * memory_size), params
            )

        dtype = at_least_float32(*(x.dtype for x in jax.tree.leaves(params)))
        return LbfgsDirectionState(
            count=jnp.zeros((), jnp.int32),
            params=zeros(),
            updates=zeros(),
            steps=memory(),
            differences=memory(),
            inverse_products=jnp.zeros(memory_size, dtype),
            scale=jnp.ones((), dtype),
        )

    def update_fn(
        updates: optax.Updates,
        state: LbfgsDirectionState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, LbfgsDirectionState]:
        dtype = state.scale.dtype

        def inner(a: Any, b: Any) -> jax.Array:
            products = jax.tree.map(
                lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b
            )
            return sum(jax.tree.leaves(products), jnp.zeros((), dtype))

        def plus(a: Any, factor: jax.Array, b: Any) -> Any:
            with permissive():
                return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)

        one = jnp.ones((), dtype)
        step = plus(params, -one, state.params)
        difference = jax.tree.map(
            lambda g, old: g.astype(old.dtype) - old, updates, state.updates
        )
        product, square = inner(step, difference), inner(difference, difference)
        bound = jnp.finfo(dtype).eps * jnp.sqrt(inner(step, step)) * jnp.sqrt(square)
        is_finite = jnp.isfinite(inner(updates, updates) + inner(params, params))
        is_stored = is_finite & (state.count > 0) & (product > bound)
        inverse = 1 / jnp.where(is_stored, product, 1)

        def pushed(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.concatenate([new[None].astype(old.dtype), old[:-1]])

        memory = state.steps, state.differences, state.inverse_products
        newest = jax.tree.map(pushed, (step, difference, inverse), memory)
        memory = select(is_stored, newest, memory)
        square = jnp.where(is_stored, square, 1)
        scale = jnp.where(is_stored, product / square, state.scale)

        def backwards(q: Any, pair: Any) -> tuple[Any, jax.Array]:
            s, y, inverse = pair
            alpha = inverse * inner(s, q)
            return plus(q, -alpha, y), alpha

        def forwards(q: Any, pair: Any) -> tuple[Any, None]:
            (s, y, inverse), alpha = pair
            return plus(q, alpha - inverse * inner(y, q), s), None

        q, alphas = jax.lax.scan(backwards, updates, memory)
        q = plus(q, scale - 1, q)
        q, _ = jax.lax.scan(forwards, q, (memory, alphas), reverse=True)
        like = state.params, state.updates
        last = select(is_finite, (params, updates), like)
        count = optax.safe_increment(state.count)
        count = jnp.where(is_finite, count, state.count)
        return q, LbfgsDirectionState(count, *last, *memory, scale)

    return KeepsFinite(init_fn, update_fn)
