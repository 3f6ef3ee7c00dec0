"""One operation of a loss: an equation, a run of elementwise equations, or a scan."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from partnewton.engines import compat
from partnewton.engines.compat import Equation, Variable

if TYPE_CHECKING:
    from partnewton.engines.adjoint.program import Program
    from partnewton.engines.adjoint.tangent import Jet
    from partnewton.engines.adjoint.terms import Terms

__all__ = ["Apply", "Loop", "Op", "OpRule", "Request"]


class Request(NamedTuple):
    """What the rules compute.

    Attributes:
      third_order: whether second derivatives of values and terms of the third order are
        requested.
      dtype: of the sums over all operations.
      tangents_are_fixed: whether the jets that rules return are constants when the
        terms are differentiated, as for the third-order tensor.
    """

    third_order: bool
    dtype: np.dtype
    tangents_are_fixed: bool = False

    @property
    def num_orders(self) -> int:
        """How many orders a jet has: first derivatives, or first and second ones."""
        return 2 if self.third_order else 1


class Apply(Protocol):
    """Derivatives of the outputs of an operation z = f(x), and its terms.

    With xdot_s and xddot_s the first and second derivatives of its inputs along subset
    s, and lambda = dL/dz, a rule returns the jets of the active outputs,

        zdot_s  = Df[xdot_s]
        zddot_s = D2f[xdot_s, xdot_s] + Df[xddot_s],

    and the terms

        hessian_st = lambda . D2f[xdot_s, xdot_t]
        third_s    = lambda . (D3f[xdot_s, xdot_s, xdot_s] + 3 D2f[xdot_s, xddot_s]).

    Args:
      op: the operation.
      primals: the values of all of its inputs.
      cotangents: lambda of each active output; None if the rule is not curved.
      jets: of each active input.
      request: whether the third order is requested.
    """

    def __call__(
        self,
        op: "Op",
        primals: Sequence[Any],
        cotangents: Any,
        jets: "Sequence[Jet]",
        request: Request,
    ) -> "tuple[list[Jet], Terms]": ...


class OpRule(NamedTuple):
    """A rule for operations of one kind.

    Attributes:
      name: the name of the rule.
      apply: the function.
      is_curved: whether it returns terms, for which it needs the cotangents.
      is_registered: whether it was registered by :func:`partnewton.engines.rule`.
    """

    name: str
    apply: Apply
    is_curved: bool = True
    is_registered: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One or more equations of the jaxpr as one function.

    Attributes:
      rule: its rule; None if it does not depend on the parameters, or the loss does not
        depend on it.
      equations: the equations.
      inputs: the variables that it reads, each once; for a scan, the operands of the
        equation.
      outputs: the variables that it writes and that are read elsewhere.
      active_inputs: the positions of the inputs that depend on the parameters.
      active_outputs: the positions of the outputs that depend on the parameters, and on
        which the loss depends.
      loop: the body and the lengths of a scan.
      is_guarded: whether a derivative or a cotangent may be infinite at an entry that
        does not depend on the parameters, and has to be masked there.
      has_mask: whether a cotangent may be infinite at an entry at which the derivatives
        of the operation are zero, such as one that a `where` does not select.
      places: the positions of the equations in the flattened jaxpr.
    """

    rule: OpRule | None
    equations: tuple[Equation, ...]
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    active_inputs: tuple[int, ...] = ()
    active_outputs: tuple[int, ...] = ()
    loop: "Loop | None" = None
    is_guarded: bool = False
    has_mask: bool = False
    places: tuple[int, ...] = ()

    @functools.cached_property
    def function(self) -> Callable[..., list[jax.Array]]:
        """The function from the values of all inputs to those of all outputs."""
        return compat.function_of(self.equations, self.inputs, self.outputs)

    @property
    def is_curved(self) -> bool:
        """Whether its rule returns terms of its own, unlike scans and linear rules."""
        return self.rule is not None and self.rule.is_curved and self.loop is None

    @property
    def read(self) -> list[Variable]:
        """The variables of the active inputs."""
        return [self.inputs[i] for i in self.active_inputs]

    @property
    def written(self) -> list[Variable]:
        """The variables of the active outputs."""
        return [self.outputs[i] for i in self.active_outputs]

    def take_active(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """The values of the active inputs, from those of all inputs."""
        return [values[i] for i in self.active_inputs]

    def function_of_active(
        self,
        primals: Sequence[jax.Array],
        members: Sequence[int] | None = None,
        function: Callable[..., list[jax.Array]] | None = None,
    ) -> Callable[..., list[jax.Array]]:
        """The operation as a function from active inputs to the active outputs.

        Args:
          primals: the values of all inputs; those of the other inputs are constants.
          members: which of the active inputs are its arguments, as positions among the
            active inputs; by default all.
          function: another implementation of the operation.
        """
        function = self.function if function is None else function
        positions = self.active_inputs
        if members is not None:
            positions = [positions[n] for n in members]

        def of_active(*active: jax.Array) -> list[jax.Array]:
            everything = list(primals)
            for i, x in zip(positions, active, strict=True):
                everything[i] = x
            outputs = function(*everything)
            return [outputs[i] for i in self.active_outputs]

        return of_active


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A `scan`: its body as a program from (closed, constants, carry, x) to (carry, y).

    Attributes:
      body: the program of one iteration.
      closed: the values of constants that the body has closed over.
      length, reverse, unroll: as for :func:`jax.lax.scan`.
      num_constants: how many inputs are the same in each iteration.
      num_carry: how many are carried from one to the next.
    """

    body: "Program"
    closed: tuple[Any, ...]
    length: int
    reverse: bool
    unroll: int
    num_constants: int
    num_carry: int

    @property
    def inputs(self) -> tuple[Variable, ...]:
        """The variables of the body that correspond to the inputs of the scan."""
        return self.body.inputs[len(self.closed) :]

    def split(self, inputs: Sequence[Any]) -> tuple[list, list, list]:
        """The constants, the carry and the xs among some inputs."""
        c, n = self.num_constants, self.num_constants + self.num_carry
        return list(inputs[:c]), list(inputs[c:n]), list(inputs[n:])
