"""A loss as a sequence of operations, and its values forwards.

Most operations are one equation of the jaxpr of the loss. A run of elementwise
equations on one variable, such as a gelu, is one operation; a `scan` is one with a
program of its own. How a program is made is the subject of
:mod:`partnewton.engines.adjoint.build`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable, values_of
from partnewton.engines.adjoint.op import Loop, Op
from partnewton.engines.compat import Variable

__all__ = ["Perturbations", "Program", "Residuals"]

# Number of an operation -> a list of arrays, or the perturbations of a loop.
Perturbations = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Residuals:
    """The values at the inputs of the operations of a program.

    Attributes:
      values: of the inputs of all operations through which tangents pass.
      loops: for each scan the residuals of its body, with an axis for the iterations
        in front of every array.
    """

    values: dict[Variable, jax.Array]
    loops: dict[int, "Residuals"]


jax.tree_util.register_pytree_node(
    Residuals,
    lambda x: ((list(x.values.values()), x.loops), tuple(x.values)),
    lambda variables, children: Residuals(
        dict(zip(variables, children[0], strict=True)), children[1]
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A sequence of operations.

    Attributes:
      inputs: the variables that it starts from.
      outputs: what it results in, variables or literals.
      ops: in an order in which they can be executed.
      fixed: the inputs that are the same each time, for the body of a loop.
      final: all from the first operation on that has to be differentiated by jax, as
        one function to the loss and to what else is asked for; None if there is none.
      rest: what is executed behind it, for its outputs or effects.
    """

    inputs: tuple[Variable, ...]
    outputs: tuple[Any, ...]
    ops: tuple[Op, ...]
    fixed: tuple[Variable, ...]
    final: Op | None = None
    rest: tuple[Op, ...] = ()

    @functools.cached_property
    def saved(self) -> tuple[Variable, ...]:
        """The variables whose values are residuals."""
        ops = [op for op in self.ops if op.active_outputs]
        read = (v for op in ops for v in op.inputs if is_variable(v))
        return tuple(v for v in dict.fromkeys(read) if v not in self._invariant)

    @functools.cached_property
    def _invariant(self) -> frozenset[Variable]:
        """The variables that depend on fixed inputs alone: they are no residuals."""
        invariant = set(self.fixed)
        for op in self._invariant_steps:
            invariant.update(op.outputs)
        return frozenset(invariant)

    @functools.cached_property
    def _invariant_steps(self) -> tuple[Op, ...]:
        invariant, ops = set(self.fixed), []
        for op in self.ops:
            known = all(v in invariant for v in op.inputs if is_variable(v))
            effects = any(equation.effects for equation in op.equations)
            if self.fixed and known and not effects and not op.loop:
                invariant.update(op.outputs)
                ops.append(op)
        return tuple(ops)

    def is_active(self) -> Residuals:
        """Which residuals depend on the parameters, as residuals that are booleans."""
        active = {op.inputs[i] for op in self.ops for i in op.active_inputs}
        loops = {n: op.loop.body for n, op in enumerate(self.ops) if op.loop}
        return Residuals(
            {v: v in active for v in self.saved},
            {n: body.is_active() for n, body in loops.items()},
        )

    def invariants(self, fixed: Sequence[jax.Array]) -> dict[Variable, jax.Array]:
        """The values of all variables that depend on the fixed inputs alone."""
        values = dict(zip(self.fixed, fixed, strict=True))
        for op in self._invariant_steps:
            results = op.function(*values_of(op.inputs, values))
            values.update(zip(op.outputs, results, strict=True))
        return values

    def perturbations(self, leading: tuple[int, ...] = ()) -> Perturbations:
        """Zeros to be added to what the curved ops result in.

        The derivatives of the loss with respect to these are the adjoints.
        """
        perturbations: Perturbations = {}
        for n, op in enumerate(self.ops):
            if op.loop:
                perturbations[n] = op.loop.body.perturbations(
                    (*leading, op.loop.length)
                )
            elif op.is_curved:
                outputs = [op.outputs[i] for i in op.active_outputs]
                perturbations[n] = [compat.zeros(v, leading) for v in outputs]
        return perturbations

    def run(
        self, inputs: Sequence[jax.Array], perturbations: Perturbations
    ) -> tuple[list[jax.Array], Residuals]:
        """Executes the ops of a program that has no final one.

        Args:
          inputs: the values to start from.
          perturbations: as from :meth:`perturbations`.

        Returns:
          The outputs, and the residuals.
        """
        values, residuals = self.begin(inputs, perturbations)
        return values_of(self.outputs, values), residuals

    def begin(
        self, inputs: Sequence[jax.Array], perturbations: Perturbations
    ) -> tuple[dict[Variable, jax.Array], Residuals]:
        """Executes the ops up to the final one: all values, and the residuals."""
        values = dict(zip(self.inputs, inputs, strict=True))
        loops = {}
        for n, op in enumerate(self.ops):
            read = values_of(op.inputs, values)
            if op.loop:
                results, loops[n] = _run_loop(op.loop, read, perturbations[n])
            else:
                results = op.function(*read)
            if op.is_curved and not op.loop:
                for place, perturbation in zip(
                    op.active_outputs, perturbations[n], strict=True
                ):
                    results[place] = results[place] + perturbation
            values.update(zip(op.outputs, results, strict=True))
        return values, Residuals({v: values[v] for v in self.saved}, loops)

    @functools.cached_property
    def handed_on(self) -> tuple[Variable, ...]:
        """What is computed up to the final op and read from there on."""
        later = [self.final, *self.rest] if self.final else []
        read = [v for op in later for v in op.inputs]
        written = {v for op in self.ops for v in op.outputs}
        return tuple(v for v in dict.fromkeys((*read, *self.outputs)) if v in written)

    def end(self, values: dict[Variable, jax.Array]) -> list[jax.Array]:
        """Executes what is behind the final op: the outputs, from all values."""
        values = dict(values)
        for op in self.rest:
            results = op.function(*values_of(op.inputs, values))
            values.update(zip(op.outputs, results, strict=True))
        return values_of(self.outputs, values)


def _run_loop(
    loop: Loop, read: list[jax.Array], perturbations: Perturbations
) -> tuple[list[jax.Array], Residuals]:
    constants, carry, xs = loop.split(read)

    def body(carry: list, scanned: tuple) -> tuple:
        x, perturbations = scanned
        outputs, residuals = loop.body.run(
            [*loop.closed, *constants, *carry, *x], perturbations
        )
        return outputs[: loop.num_carry], (outputs[loop.num_carry :], residuals)

    carry, (ys, residuals) = jax.lax.scan(
        body,
        carry,
        (xs, perturbations),
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    return [*carry, *ys], residuals
