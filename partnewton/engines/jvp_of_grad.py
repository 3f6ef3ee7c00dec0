"""The reference engine: derivatives of the gradient, by jax alone.

Short, of any order and for any loss that jax can differentiate. The gradient is
linearised once and applied to each component, a direction on a subset: K S
Hessian-vector products for K directions, and K S passes more for the third order. Where
jax refuses forward mode over the gradient there are other ways: see
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
from partnewton.engines.collectives import refuse_named_axes
from partnewton.engines.components import Components
from partnewton.partitions import Partition

Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class JvpOfGrad:
    """The reference engine.

    Attributes:
      batch_size: the number of subsets, times directions, that are processed at once;
        by default one. Memory grows with it, and so does speed.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    def summarize(
        self,
        loss: Loss,
        leaves: Leaves,
        directions: Leaves,
        partition: Partition,
        *,
        third_order: bool,
    ) -> tuple[tuple[jax.Array, Any], jax.Array, jax.Array, jax.Array | None]:
        """Value and aux, gradient (K, S), hessian (K, S, K, S), third (K, S)."""
        value_and_aux, (gradient, hessian) = self.derivative_tensors(
            loss, leaves, directions, partition, order=2
        )
        if not third_order:
            return value_and_aux, gradient, hessian, None
        parts = Components(directions, partition)

        def third_of(m: jax.Array) -> jax.Array:
            return nesting.third(loss, leaves, parts[m], None, parts.dtype)

        def third_forwards(m: jax.Array) -> jax.Array:
            return _entry(loss, leaves, [parts[m]] * 3, parts.dtype)

        third = _first_of(
            [third_of, third_forwards], jnp.arange(parts.size), self.batch_size
        )
        return value_and_aux, gradient, hessian, third.reshape(parts.shape)

    def derivative_tensors(
        self,
        loss: Loss,
        leaves: Leaves,
        directions: Leaves,
        partition: Partition,
        *,
        order: int,
    ) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
        """Value and aux, and the tensors of order 1 to `order`, (K, S) * d.

        D^d L[v_1, ..., v_d], for components v, is the inner product of v_d with the
        derivative of the gradient along v_1, ..., v_(d-1): one pass for each multiset
        of d - 1 components gives K S entries at once.
        """
        parts = Components(directions, partition)
        found, tensors = self._tensors(loss, leaves, parts, order)
        shaped = [x.reshape(parts.shape * x.ndim) for x in tensors[:order]]
        return found, tuple(shaped)

    def _tensors(
        self, loss: Loss, leaves: Leaves, parts: Components, order: int
    ) -> tuple[tuple[jax.Array, Any], list[jax.Array]]:
        """Value and aux, and the tensors, with axes of length K S."""
        refuse_named_axes(jax.make_jaxpr(lambda x: loss(x)[0])(list(leaves)))
        try:
            linear = nesting.linearize_gradient(loss, leaves)
        except nesting.DifferentiationError as error:
            if error.kernels:
                # jax differentiates them in part, and fails when it lowers them.
                raise
            try:
                return _forwards(loss, leaves, parts, order, self.batch_size)
            except Exception:
                raise error from error.__cause__

        def product_of(m: jax.Array) -> jax.Array:
            return parts.inner(linear.product(*parts[m]))

        hessian = _map(product_of, jnp.arange(parts.size), self.batch_size)
        # With a custom rule that is not the derivative, the Jacobian of the gradient
        # need not be symmetric.
        tensors = [parts.inner(linear.gradient), 0.5 * (hessian + hessian.T)]
        higher = functools.partial(
            _tensor_of_order, loss, leaves, parts, self.batch_size
        )
        tensors += [higher(d) for d in range(3, order + 1)]
        return (linear.value, linear.aux), tensors


def _tensor_of_order(
    loss: Loss, leaves: Leaves, parts: Components, batch_size: int | None, d: int
) -> jax.Array:
    """All D^d L[v_1, ..., v_d] of components, for d of at least 3."""
    grad_fn = jax.grad(lambda x: loss(x)[0])

    def row(numbers: jax.Array) -> jax.Array:
        some = [parts[numbers[i]] for i in range(d - 1)]
        return parts.inner(functools.reduce(_along, some, grad_fn)(leaves))

    def entries(numbers: jax.Array) -> jax.Array:
        some = [parts[numbers[i]] for i in range(d - 1)]
        last = (parts[m] for m in range(parts.size))
        return jnp.stack(
            [_entry_backwards(loss, leaves, [*some, v], parts.dtype) for v in last]
        )

    rows = _first_of([row, entries], _multisets(parts.size, d - 1), batch_size)
    return _symmetric_tensor(rows, parts.size, d)


def _forwards(
    loss: Loss, leaves: Leaves, parts: Components, order: int, batch_size: int | None
) -> tuple[tuple[jax.Array, Any], list[jax.Array]]:
    """The same in forward mode only, for a loss without reverse mode.

    That is one with a `while_loop`, for example: one pass for each entry.
    """
    tensors = []
    for d in range(1, order + 1):

        def entry(numbers: jax.Array, d: int = d) -> jax.Array:
            some = [parts[numbers[i]] for i in range(d)]
            return _entry(loss, leaves, some, parts.dtype)

        entries = _map(entry, _multisets(parts.size, d), batch_size)
        tensors.append(_tensor(entries, parts.size, d))
    return loss(leaves), tensors


def _entry(loss: Loss, leaves: Leaves, some: Sequence[Leaves], dtype: Any) -> Any:
    """D^d L along some directions, in forward mode."""
    value = functools.reduce(_along, some, lambda x: loss(x)[0])(list(leaves))
    return value.astype(dtype)


def _entry_backwards(
    loss: Loss, leaves: Leaves, some: Sequence[Leaves], dtype: Any
) -> jax.Array:
    """D^d L along some directions, in reverse mode."""

    def along(f: Callable, v: Leaves) -> Callable:
        return lambda x: nesting.inner(jax.grad(f)(x), v, dtype)

    return functools.reduce(along, some, lambda x: loss(x)[0])(list(leaves))


def _along(f: Callable, v: Leaves) -> Callable:
    """The derivative of `f` along `v`, as a function of the point."""
    return lambda x: jax.jvp(f, (x,), (v,))[1]


def _multisets(size: int, d: int) -> jax.Array:
    sets = itertools.combinations_with_replacement(range(size), d)
    return jnp.array(list(sets))


def _symmetric_tensor(rows: jax.Array, size: int, d: int) -> jax.Array:
    """The tensor of order d from its rows, one for each multiset of d - 1 numbers."""
    # Each entry is read at its sorted index, so the tensor is exactly symmetric.
    index = np.sort(np.indices((size,) * d).reshape(d, -1), axis=0)
    return rows[_number_of(index[:-1], size), index[-1]].reshape((size,) * d)


def _tensor(entries: jax.Array, size: int, d: int) -> jax.Array:
    """The tensor of order d from its entries, one for each multiset of d numbers."""
    index = np.sort(np.indices((size,) * d).reshape(d, -1), axis=0)
    return entries[_number_of(index, size)].reshape((size,) * d)


def _number_of(index: np.ndarray, size: int) -> np.ndarray:
    """The place of each column, a multiset, in the list of all multisets."""
    sets = itertools.combinations_with_replacement(range(size), len(index))
    number_of = {multiset: n for n, multiset in enumerate(sets)}
    return np.array([number_of[tuple(column)] for column in index.T.tolist()])


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
