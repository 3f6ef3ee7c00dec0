"""The reference engine: derivatives of the gradient, by jax alone.

Short, of any order and for any loss that jax can differentiate. The gradient is
linearised once and applied to the part of the direction on each subset: S
Hessian-vector products, and S passes more for the third order. Where jax refuses
forward mode over the gradient there are other ways: see
:mod:`partnewton.engines.nesting`.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._checks import check_batch_size
from partnewton.engines import nesting
from partnewton.engines.axes import refuse_named_axes
from partnewton.partitions import Partition

Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class JvpOfGrad:
    """The reference engine.

    Attributes:
      batch_size: the number of subsets that are processed at once, by default one.
        Memory grows with it, and so does speed.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    def summarize(
        self,
        loss: Loss,
        leaves: Leaves,
        direction: Leaves,
        partition: Partition,
        *,
        third_order: bool,
    ) -> tuple[tuple[jax.Array, Any], jax.Array, jax.Array, jax.Array | None]:
        """Value and aux, gradient (S,), hessian (S, S), third (S,) or None."""
        value_and_aux, (gradient, hessian) = self.derivative_tensors(
            loss, leaves, direction, partition, order=2
        )
        if not third_order:
            return value_and_aux, gradient, hessian, None

        def third_of(s: jax.Array) -> jax.Array:
            u_s = partition.restrict(direction, s)
            return nesting.third(loss, leaves, u_s, None, partition.dtype)

        def third_forwards(s: jax.Array) -> jax.Array:
            u_s = partition.restrict(direction, s)
            return _entry(loss, leaves, [u_s] * 3, partition.dtype)

        third = _first_of(
            [third_of, third_forwards], jnp.arange(partition.size), self.batch_size
        )
        return value_and_aux, gradient, hessian, third

    def derivative_tensors(
        self,
        loss: Loss,
        leaves: Leaves,
        direction: Leaves,
        partition: Partition,
        *,
        order: int,
    ) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
        """Value and aux, and the tensors of order 1 to `order`.

        D^d L[u_s1, ..., u_sd] is the inner product of u_sd with the derivative of the
        gradient along u_s1, ..., u_s(d-1): one pass for each multiset of d - 1 subsets
        gives S entries at once.
        """
        refuse_named_axes(jax.make_jaxpr(lambda x: loss(x)[0])(list(leaves)))
        try:
            linear = nesting.linearize(loss, leaves)
        except nesting.DifferentiationError as error:
            if error.kernels:
                # jax differentiates them in part, and fails when it lowers them.
                raise
            try:
                return _forwards(
                    loss, leaves, direction, partition, order, self.batch_size
                )
            except Exception:
                raise error from error.__cause__

        def contract(gradient_like: Leaves) -> jax.Array:
            return partition.inner(gradient_like, direction)

        def product_of(s: jax.Array) -> jax.Array:
            return contract(linear.product(*partition.restrict(direction, s)))

        hessian = _map(product_of, jnp.arange(partition.size), self.batch_size)
        # With a custom rule that is not the derivative, the Jacobian of the gradient
        # need not be symmetric.
        tensors = [contract(linear.gradient), 0.5 * (hessian + hessian.T)]
        higher = functools.partial(
            _tensor_of_order, loss, leaves, direction, partition, self.batch_size
        )
        tensors += [higher(d) for d in range(3, order + 1)]
        return (linear.value, linear.aux), tuple(tensors[:order])


def _tensor_of_order(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    batch_size: int | None,
    d: int,
) -> jax.Array:
    """All D^d L[u_s1, ..., u_sd], for d of at least 3."""
    grad_fn = jax.grad(lambda x: loss(x)[0])

    def row(subsets: jax.Array) -> jax.Array:
        parts = [partition.restrict(direction, subsets[k]) for k in range(d - 1)]
        gradient_like = functools.reduce(_along, parts, grad_fn)(leaves)
        return partition.inner(gradient_like, direction)

    def entries(subsets: jax.Array) -> jax.Array:
        parts = [partition.restrict(direction, subsets[k]) for k in range(d - 1)]
        last = (partition.restrict(direction, s) for s in range(partition.size))
        return jnp.stack(
            [_entry_backwards(loss, leaves, [*parts, v], partition) for v in last]
        )

    rows = _first_of([row, entries], _multisets(partition.size, d - 1), batch_size)
    return _symmetric_tensor(rows, partition.size, d)


def _forwards(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    order: int,
    batch_size: int | None,
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
    """The same in forward mode only, for a loss without reverse mode.

    That is one with a `while_loop`, for example: one pass for each entry.
    """
    tensors = []
    for d in range(1, order + 1):

        def entry(subsets: jax.Array, d: int = d) -> jax.Array:
            parts = [partition.restrict(direction, subsets[k]) for k in range(d)]
            return _entry(loss, leaves, parts, partition.dtype)

        multisets = _multisets(partition.size, d)
        tensors.append(_tensor(_map(entry, multisets, batch_size), partition.size, d))
    return loss(leaves), tuple(tensors)


def _entry(loss: Loss, leaves: Leaves, parts: Sequence[Leaves], dtype: Any) -> Any:
    """D^d L along some directions, in forward mode."""
    value = functools.reduce(_along, parts, lambda x: loss(x)[0])(list(leaves))
    return value.astype(dtype)


def _entry_backwards(
    loss: Loss, leaves: Leaves, parts: Sequence[Leaves], partition: Partition
) -> jax.Array:
    """D^d L along some directions, in reverse mode."""

    def along(f: Callable, v: Leaves) -> Callable:
        return lambda x: nesting.inner(jax.grad(f)(x), v, partition.dtype)

    return functools.reduce(along, parts, lambda x: loss(x)[0])(list(leaves))


def _along(f: Callable, v: Leaves) -> Callable:
    """The derivative of `f` along `v`, as a function of the point."""
    return lambda x: jax.jvp(f, (x,), (v,))[1]


def _multisets(size: int, d: int) -> jax.Array:
    sets = itertools.combinations_with_replacement(range(size), d)
    return jnp.array(list(sets))


def _symmetric_tensor(rows: jax.Array, size: int, d: int) -> jax.Array:
    """The tensor of order d from its rows, one for each multiset of d - 1 subsets."""
    # Each entry is read at its sorted subsets, so the tensor is exactly symmetric.
    subsets = np.sort(np.indices((size,) * d).reshape(d, -1), axis=0)
    return rows[_number_of(subsets[:-1], size), subsets[-1]].reshape((size,) * d)


def _tensor(entries: jax.Array, size: int, d: int) -> jax.Array:
    """The tensor of order d from its entries, one for each multiset of d subsets."""
    subsets = np.sort(np.indices((size,) * d).reshape(d, -1), axis=0)
    return entries[_number_of(subsets, size)].reshape((size,) * d)


def _number_of(subsets: np.ndarray, size: int) -> np.ndarray:
    """The index of each column, a multiset, in the list of all multisets."""
    sets = itertools.combinations_with_replacement(range(size), len(subsets))
    number_of = {multiset: n for n, multiset in enumerate(sets)}
    return np.array([number_of[tuple(column)] for column in subsets.T.tolist()])


def _first_of(
    functions: Sequence[Callable], xs: jax.Array, batch_size: int | None
) -> jax.Array:
    """The first function that jax accepts, on each of `xs`."""
    first, *others = functions
    try:
        return _map(first, xs, batch_size)
    except Exception as error:
        for other in others:
            with contextlib.suppress(Exception):
                return _map(other, xs, batch_size)
        raise error from error.__cause__


def _map(f: Callable, xs: jax.Array, batch_size: int | None) -> jax.Array:
    """`f` on each of `xs`, in batches of `batch_size`, or else one by one."""
    if batch_size is not None:
        batch_size = min(batch_size, xs.shape[0])
    try:
        return jax.lax.map(f, xs, batch_size=batch_size)
    except Exception:  # an operation that cannot be batched
        if batch_size is None:
            raise
        return jax.lax.map(f, xs)
