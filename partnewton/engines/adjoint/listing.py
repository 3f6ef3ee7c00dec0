"""The operations of a loss and their rules, for those who add a primitive."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from partnewton import partitions
from partnewton.engines.adjoint.op import Op
from partnewton.engines.adjoint.partitioned import PartitionedProgram
from partnewton.engines.adjoint.program import Program

__all__ = ["Operation", "operations"]


class Operation(NamedTuple):
    """An operation of a loss.

    Attributes:
      rule: the name of the rule: "linear", "piecewise_linear", "bilinear",
        "elementwise", "scan", "generic", the name of a function that was registered by
        :func:`rule`, or "final step" for all that jax differentiates as one function.
      primitives: the names of the primitives of its equations, in order.
    """

    rule: str
    primitives: tuple[str, ...]


def operations(value_fn: Callable[[Any], jax.Array], params: Any) -> list[Operation]:
    """The operations of a loss that depend on the parameters, and their rules.

    This shows whether a registered primitive is recognised, and which operations have
    no rule of their own ("generic").

    Args:
      value_fn: the loss, a function from `params` to a scalar.
      params: the parameters.

    Returns:
      The operations in order of execution; those in the body of a `scan` follow it.

    Example:
      >>> for op in operations(lambda x: jnp.sum(jnp.tanh(x @ x)), jnp.ones((2, 2))):
      ...     print(op.rule, op.primitives)
      generic ('dot_general',)
      elementwise ('tanh',)
      linear ('reduce_sum',)
    """
    leaves, treedef = jax.tree.flatten(params)
    partition = partitions.partition_of(params, partitions.per_tensor)

    def loss(leaves: list[jax.Array]) -> tuple[jax.Array, None]:
        return value_fn(jax.tree.unflatten(treedef, leaves)), None

    partitioned = PartitionedProgram(loss, [jnp.asarray(x) for x in leaves], partition)
    return list(_listed(partitioned.program))


def _listed(program: Program) -> Iterator[Operation]:
    for op in program.ops:
        if op.rule is not None:
            yield _named(op, op.rule.name)
        if op.loop:
            yield from _listed(op.loop.body)
    if program.final:
        yield _named(program.final, "final step")


def _named(op: Op, rule: str) -> Operation:
    return Operation(rule, tuple(e.primitive.name for e in op.equations))
