"""A loss as a sequence of operations, and the first sweep: values forwards.

Most operations are one equation of the jaxpr of the loss. A run of elementwise
equations of one variable, such as a gelu, is one operation; a `scan` is one whose body
is a program. Programs are built in :mod:`partnewton.engines.adjoint.build`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable, values_of
from partnewton.engines.adjoint.op import Loop, Op
from partnewton.engines.adjoint.properties import is_elementwise
from partnewton.engines.compat import Variable

__all__ = ["Perturbations", "Program", "Residuals"]

# For the number of each curved operation an array for each of its active outputs, and
# for that of each scan the perturbations of its body. Cotangents, the derivatives with
# respect to them, have the same structure.
Perturbations = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Residuals:
    """The values at the inputs of the operations of a program.

    Attributes:
      values: of the inputs of all operations that have a rule.
      loops: for each scan the residuals of its body, with a leading axis for the
        iterations.
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
      inputs: the variables of its inputs.
      outputs: variables or literals.
      ops: the operations in order of execution.
      fixed: for the body of a loop, the inputs that are the same in each iteration.
      is_body: whether it is the body of a loop.
      final: the final step: one operation that jax differentiates as a whole, and whose
        first output is the loss; None if there is none.
      rest: operations after the final step, for other outputs or effects.
    """

    inputs: tuple[Variable, ...]
    outputs: tuple[Any, ...]
    ops: tuple[Op, ...]
    fixed: tuple[Variable, ...] = ()
    is_body: bool = False
    final: Op | None = None
    rest: tuple[Op, ...] = ()

    @functools.cached_property
    def saved(self) -> tuple[Variable, ...]:
        """The variables whose values are residuals."""
        needed = dict.fromkeys(
            v for op in self.ops if op.active_outputs for v in op.inputs
        )
        for op in reversed(self._recomputed):
            if not needed.keys().isdisjoint(op.outputs):
                needed.update(dict.fromkeys(op.inputs))
        known = {*self.fixed, *(v for op in self._recomputed for v in op.outputs)}
        return tuple(v for v in needed if is_variable(v) and v not in known)

    @functools.cached_property
    def _recomputed(self) -> tuple[Op, ...]:
        """The operations of the body of a loop whose results are not stored.

        They are elementwise, or depend only on constants of the loop.
        """
        known, ops = set(self.fixed), []
        for op in self.ops if self.is_body else ():
            is_invariant = all(v in known for v in op.inputs if is_variable(v))
            if op.loop or any(equation.effects for equation in op.equations):
                continue
            if is_invariant:
                known.update(op.outputs)
            if is_invariant or all(map(is_elementwise, op.equations)):
                ops.append(op)
        return tuple(ops)

    def active_residuals(self) -> Residuals:
        """For each residual a boolean: whether it depends on the parameters."""
        active = {op.inputs[i] for op in self.ops for i in op.active_inputs}
        loops = {n: op.loop.body for n, op in enumerate(self.ops) if op.loop}
        return Residuals(
            {v: v in active for v in self.saved},
            {n: body.active_residuals() for n, body in loops.items()},
        )

    def completed(
        self, fixed: Sequence[jax.Array], residuals: Residuals
    ) -> dict[Variable, jax.Array]:
        """The values at the inputs of all operations, from those that are stored."""
        values = {**dict(zip(self.fixed, fixed, strict=True)), **residuals.values}
        for op in self._recomputed:
            if all(v in values for v in op.inputs if is_variable(v)):
                results = op.function(*values_of(op.inputs, values))
                values.update(zip(op.outputs, results, strict=True))
        return values

    def perturbations(self, leading: tuple[int, ...] = ()) -> Perturbations:
        """Zeros that are added to the results of curved operations.

        The derivatives of the loss with respect to them are the cotangents.
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
        """Executes a program without a final step.

        Args:
          inputs: the values of the inputs.
          perturbations: as from :meth:`perturbations`.

        Returns:
          The outputs, and the residuals.
        """
        values, residuals = self.begin(inputs, perturbations)
        return values_of(self.outputs, values), residuals

    def begin(
        self, inputs: Sequence[jax.Array], perturbations: Perturbations
    ) -> tuple[dict[Variable, jax.Array], Residuals]:
        """Executes the operations before the final step: all values, and residuals."""
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
        """The variables that are computed before the final step and read later."""
        later = [self.final, *self.rest] if self.final else []
        read = [v for op in later for v in op.inputs]
        written = {v for op in self.ops for v in op.outputs}
        return tuple(v for v in dict.fromkeys((*read, *self.outputs)) if v in written)

    def end(self, values: dict[Variable, jax.Array]) -> list[jax.Array]:
        """Executes the operations after the final step, and returns the outputs."""
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
