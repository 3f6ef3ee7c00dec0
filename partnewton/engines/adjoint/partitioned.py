"""A loss and a partition; values and cotangents of the loss at a point."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from partnewton.engines import compat, nesting
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.dataflow import is_variable, values_of
from partnewton.engines.adjoint.final import Final
from partnewton.engines.adjoint.graph import BranchPoint, branch_point_of
from partnewton.engines.adjoint.program import Perturbations, Program, Residuals
from partnewton.engines.adjoint.repeats import Repeat, repeats_in
from partnewton.engines.adjoint.sweep import OperationError
from partnewton.engines.collectives import refuse_named_axes
from partnewton.engines.compat import Variable
from partnewton.partitions import FROZEN, Partition

__all__ = ["Linearized", "PartitionedProgram", "ReverseModeError"]

Leaves = Sequence[jax.Array]


class ReverseModeError(Exception):
    """jax cannot differentiate the loss in reverse mode."""


class Linearized(NamedTuple):
    """The results of the first two sweeps: values forwards and cotangents backwards.

    Attributes:
      outputs: the loss, and the arrays in its aux.
      residuals: the values at the inputs of the operations.
      cotangents: those of the results of curved operations.
      final: the final step, if there is one.
    """

    outputs: list[jax.Array]
    residuals: Residuals
    cotangents: Perturbations
    final: Final | None


class PartitionedProgram:
    """A loss as a program, and a partition of its inputs.

    Attributes:
      program: the operations of the loss.
      constants: the values of the first inputs of the program.
      inputs: the variables of the leaves, which are the other inputs.
      partition: of the leaves.
      order: the subsets in the order in which the program uses them.
    """

    def __init__(
        self,
        loss: Callable[[Leaves], tuple[jax.Array, Any]],
        leaves: Leaves,
        partition: Partition,
    ):
        _, self._jaxpr = compat.traced(self._flat(loss), list(leaves))
        refuse_named_axes(self._jaxpr)
        self.partition = partition
        self._opaque: set[int] = set()
        self._branches: dict[int, int] = {}
        self._build()

    def _build(self) -> None:
        self.program, self.constants = program_of(
            self._jaxpr, self._opaque, self._branches
        )
        self.inputs = self.program.inputs[len(self.constants) :]
        self.order = _order_of_use(self.program, self.inputs, self.partition)
        self.__dict__.pop("repeats", None)

    def _flat(self, loss: Callable) -> Callable[[Leaves], list[jax.Array]]:
        """The loss as a function to a list of arrays; other parts of aux are saved."""

        def flat(leaves: Leaves) -> list[jax.Array]:
            value, aux = loss(leaves)
            parts, self._aux_tree = jax.tree.flatten(aux)
            self._aux = [None if _is_array(x) else x for x in parts]
            return [value, *(x for x in parts if _is_array(x))]

        return flat

    def value_and_aux(self, outputs: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
        """Value and aux of the loss, from the outputs of its program."""
        value, *aux = outputs
        arrays = iter(aux)
        parts = [next(arrays) if x is None else x for x in self._aux]
        return value, jax.tree.unflatten(self._aux_tree, parts)

    @functools.cached_property
    def repeats(self) -> list[Repeat]:
        """The parts of the program that repeat."""
        return repeats_in(self.program)

    @functools.cached_property
    def branch_point(self) -> BranchPoint | None:
        """The `cond` that contains most of the loss, if there is one."""
        return branch_point_of(self._jaxpr, self._branches)

    def in_branch(self, number: int) -> "PartitionedProgram":
        """The program with one branch in place of its branch point."""
        partitioned = copy.copy(self)
        partitioned._opaque = set()
        partitioned._branches = {**self._branches, self.branch_point.place: number}
        partitioned.__dict__.pop("branch_point")
        partitioned._build()
        return partitioned

    def attempted(self, compute: Callable[[], Any]) -> Any:
        """The result of a function that executes sweeps of the program.

        If the rule of an operation raises an exception, the operation becomes part of
        the final step, and the function is called again.
        """
        while True:
            try:
                return compute()
            except OperationError as error:
                self._opaque.update(error.op.places)
                self._build()

    def linearize(self, leaves: Leaves) -> Linearized:
        """Values and cotangents at some parameters.

        Raises:
          ReverseModeError: there is no gradient.
        """
        try:
            if self.program.final:
                return self._linearize_with_final(leaves)
            return self._linearize(leaves)
        except Exception as error:  # jax has no common class for missing derivatives
            raise ReverseModeError from error

    def _linearize(self, leaves: Leaves) -> Linearized:
        def run(perturbations: Perturbations) -> tuple[jax.Array, tuple]:
            inputs = [*self.constants, *leaves]
            outputs, residuals = self.program.run(inputs, perturbations)
            return outputs[0], (outputs, residuals)

        gradient = jax.grad(run, has_aux=True)
        cotangents, (outputs, residuals) = gradient(self.program.perturbations())
        return Linearized(outputs, residuals, cotangents, None)

    def _linearize_with_final(self, leaves: Leaves) -> Linearized:
        program, op = self.program, self.program.final
        inputs = [*self.constants, *leaves]
        values = dict(zip(program.inputs, inputs, strict=True))

        def begin(perturbations: Perturbations) -> tuple[list[jax.Array], tuple]:
            values, residuals = program.begin(inputs, perturbations)
            handed_on = [values[v] for v in program.handed_on]
            return [values[v] for v in op.read], (handed_on, residuals)

        point, pull, (handed_on, residuals) = jax.vjp(
            begin, program.perturbations(), has_aux=True
        )
        values.update(zip(program.handed_on, handed_on, strict=True))
        read = values_of(op.inputs, values)

        def function(x: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            everything = list(read)
            for place, y in zip(op.active_inputs, x, strict=True):
                everything[place] = y
            value, *others = op.function(*everything)
            return value, others

        linear = nesting.linearize_gradient(function, point)
        (cotangents,) = pull(linear.gradient)
        values.update(zip(op.outputs, (linear.value, *linear.aux), strict=True))
        final = Final(op, function, point, linear)
        return Linearized(program.end(values), residuals, cotangents, final)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _order_of_use(
    program: Program, inputs: Sequence[Variable], partition: Partition
) -> list[int]:
    """The subsets in the order in which the program uses them."""
    met: dict[Variable, int] = {}
    for n, op in enumerate(program.ops):
        for v in filter(is_variable, op.inputs):
            met.setdefault(v, n)
    never = len(program.ops)
    when = [never] * partition.size
    for v, label in zip(inputs, partition.labels, strict=True):
        for s in np.unique(label).tolist():
            if s != FROZEN:
                when[s] = min(when[s], met.get(v, never))
    return sorted(range(partition.size), key=lambda s: (when[s], s))
