"""The reference engine: forward mode over the gradient.

Short, of any order and for any loss that jax can differentiate in this way. The
gradient is linearised once and applied to the part of the direction on each subset:
S Hessian-vector products, and S passes more for the third order.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.partitions import Partition

Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]


def summarize(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    *,
    third_order: bool,
    batch_size: int | None,
) -> tuple[tuple[jax.Array, Any], jax.Array, jax.Array, jax.Array | None]:
    """Value and aux, gradient (S,), hessian (S, S), third (S,) or None."""
    value_and_aux, (gradient, hessian) = derivative_tensors(
        loss, leaves, direction, partition, order=2, batch_size=batch_size
    )
    if not third_order:
        return value_and_aux, gradient, hessian, None

    grad = jax.grad(lambda x: loss(x)[0])

    def third_of(s: jax.Array) -> jax.Array:
        u_s = partition.part(direction, s)
        second_derivative = _along(_along(grad, u_s), u_s)(leaves)
        return partition.inner(second_derivative, direction)[s]

    third = _map(third_of, jnp.arange(partition.size), batch_size)
    return value_and_aux, gradient, hessian, third


def derivative_tensors(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    *,
    order: int,
    batch_size: int | None,
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
    """Value and aux, and the tensors of order 1 to `order`.

    D^d L[u_s1, ..., u_sd] is the inner product of u_sd with the derivative of the
    gradient along u_s1, ..., u_s(d-1): one pass for each multiset of d - 1 subsets
    gives S entries at once.
    """

    def contract(gradient_like: Leaves) -> jax.Array:
        return partition.inner(gradient_like, direction)

    def value_and_grad(x: Leaves) -> tuple[Leaves, tuple[jax.Array, Any]]:
        value_and_aux, grad = jax.value_and_grad(loss, has_aux=True)(x)
        return grad, value_and_aux

    grad_fn = jax.grad(lambda x: loss(x)[0])
    # One linearisation at the parameters serves all Hessian-vector products.
    grad, hvp, value_and_aux = jax.linearize(value_and_grad, leaves, has_aux=True)
    tensors = [contract(grad)]
    for d in range(2, order + 1):

        def row(subsets: jax.Array, d: int = d) -> jax.Array:
            parts = [partition.part(direction, subsets[k]) for k in range(d - 1)]
            if d == 2:
                return contract(hvp(parts[0]))
            return contract(functools.reduce(_along, parts, grad_fn)(leaves))

        multisets = itertools.combinations_with_replacement(
            range(partition.size), d - 1
        )
        rows = _map(row, jnp.array(list(multisets)), batch_size)
        tensors.append(_symmetric_tensor(rows, partition.size, d))
    return value_and_aux, tuple(tensors)


def _along(f: Callable, v: Leaves) -> Callable:
    """The derivative of `f` along `v`, as a function of the point."""
    return lambda x: jax.jvp(f, (x,), (v,))[1]


def _symmetric_tensor(rows: jax.Array, size: int, d: int) -> jax.Array:
    """The tensor of order d from its rows, one for each multiset of d - 1 subsets."""
    row_of = {
        subsets: n
        for n, subsets in enumerate(
            itertools.combinations_with_replacement(range(size), d - 1)
        )
    }
    # Each entry is read where its subsets are sorted: exactly symmetric.
    subsets = np.sort(np.indices((size,) * d).reshape(d, -1), axis=0)
    row = np.array([row_of[tuple(column)] for column in subsets[:-1].T])
    return rows[row, subsets[-1]].reshape((size,) * d)


def _map(f: Callable, xs: jax.Array, batch_size: int | None) -> jax.Array:
    """`f` on each of `xs`, `batch_size` of them at once, or one after the other."""
    if batch_size is not None:
        batch_size = min(batch_size, xs.shape[0])
    return jax.lax.map(f, xs, batch_size=batch_size)
