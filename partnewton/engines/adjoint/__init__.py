"""The fast engine: sums of second derivatives of operations, weighted by cotangents.

Let the loss be a sequence of operations z_k = f_k(x_k), lambda_k = dL/dz_k the
cotangents of an ordinary gradient, and xdot_s the tangents of the inputs x_k along
subset s. Then

    D2 L[u_s, u_t] = sum_k lambda_k . D2 f_k [xdot_s, xdot_t],

since a second-order term that originates at operation k changes the loss by its product
with lambda_k. So there are no Hessian-vector products, and no arrays of the shape of a
weight, but three sweeps: values forwards, cotangents backwards, and tangents forwards,
with the sums computed in the last one. The diagonal of the third order is computed in
the same way from second derivatives of values along each subset; see
:class:`partnewton.engines.adjoint.op.Apply`.

The third-order tensor needs only first derivatives of values and of cotangents, by the
"2n + 1 rule": with lambdadot_s the derivative of the cotangents along s,

    D3 L[u_s, u_t, u_r] = sum_k   lambda_k . D3 f_k [xdot_s, xdot_t, xdot_r]
                                + lambdadot_k,s . D2 f_k [xdot_t, xdot_r]
                                + lambdadot_k,t . D2 f_k [xdot_s, xdot_r]
                                + lambdadot_k,r . D2 f_k [xdot_s, xdot_t].
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from partnewton._checks import check_batch_size
from partnewton.engines.adjoint.partitioned import PartitionedProgram, ReverseModeError
from partnewton.engines.adjoint.sums import sums_along, third_order_tensor
from partnewton.engines.components import Components
from partnewton.engines.jvp_of_grad import JvpOfGrad
from partnewton.partitions import Partition

__all__ = ["Adjoint"]

Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """The fast engine.

    Attributes:
      batch_size: the number of subsets that move together, each along all directions.
        By default all, or as many as fit if the tangents that some operation writes
        would exceed 1 GiB. With fewer than all, there is one sweep for each pair of
        blocks of half this size.

    Example:
      >>> from partnewton import summarize
      >>> loss = lambda x: jax.numpy.sum(x**3)
      >>> print(summarize(loss, 1.0, 2.0, engine=Adjoint(batch_size=32)).hessian)
      [[24.]]
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
        partitioned = PartitionedProgram(loss, leaves, partition)
        try:
            parts = Components(directions, partition)
            outputs, gradient, hessian, third = _summarize(
                partitioned, leaves, parts, third_order, self.batch_size
            )
            return (
                partitioned.value_and_aux(outputs),
                gradient.reshape(parts.shape),
                hessian.reshape(parts.shape * 2),
                None if third is None else third.reshape(parts.shape),
            )
        except ReverseModeError:
            return JvpOfGrad(self.batch_size).summarize(
                loss, leaves, directions, partition, third_order=third_order
            )

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

        The third order takes one pass for each direction and subset. Beyond it, and
        where a part of the loss is left to jax, the reference engine does the work.
        """
        if order <= 3:
            partitioned = PartitionedProgram(loss, leaves, partition)
            parts = Components(directions, partition)
            compute = functools.partial(
                _tensors, partitioned, leaves, parts, order, self.batch_size
            )
            with contextlib.suppress(ReverseModeError):
                found = partitioned.attempted(compute)
                if found is not None:
                    return found
        return JvpOfGrad(self.batch_size).derivative_tensors(
            loss, leaves, directions, partition, order=order
        )


def _summarize(
    partitioned: PartitionedProgram, leaves: Leaves, parts: Components, *options: Any
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array | None]:
    """The outputs of the loss, gradient, hessian and third.

    A `cond` around most of a loss would be one operation, which takes several times as
    long to compile. So each of its branches has a program of its own.
    """
    branch_point = partitioned.branch_point
    if branch_point is not None:
        branches = [
            functools.partial(
                _summarize, partitioned.in_branch(n), leaves, parts, *options
            )
            for n in branch_point.branches
        ]
        return jax.lax.switch(branch_point.index(*leaves), branches)

    def compute() -> tuple:
        point = partitioned.linearize(leaves)
        return point.outputs, *sums_along(partitioned, parts, point, *options)

    return partitioned.attempted(compute)


def _tensors(
    partitioned: PartitionedProgram,
    leaves: Leaves,
    parts: Components,
    order: int,
    batch_size: int | None,
) -> tuple | None:
    """Value and aux, and the tensors; None if the loss has a final step."""
    if order == 3 and partitioned.program.final:
        return None
    point = partitioned.linearize(leaves)
    *tensors, _ = sums_along(partitioned, parts, point, False, batch_size)
    if order == 3:
        third = third_order_tensor(partitioned, parts, leaves, batch_size)
        tensors.append(third)
    shaped = [x.reshape(parts.shape * x.ndim) for x in tensors[:order]]
    return partitioned.value_and_aux(point.outputs), tuple(shaped)
