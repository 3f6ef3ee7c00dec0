"""The third sweep: jets forwards through operations, and the terms of these."""

from collections.abc import Iterable
from typing import Any

import jax

from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.dataflow import values_of
from partnewton.engines.adjoint.op import Op, Request
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.registered import checked, warn_of_failure
from partnewton.engines.adjoint.tangent import Jet
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["Jets", "OperationError", "sweep"]

Jets = dict[Variable, Jet]  # of the variables with a nonzero tangent


class OperationError(Exception):
    """The rule of an operation raised an exception, such as one of jax."""

    def __init__(self, op: Op):
        self.op = op


def sweep(
    ops: Iterable[tuple[int, Op]],
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
    *,
    outline_each: bool = False,
) -> Terms:
    """Propagates jets through operations, and returns the terms of these.

    Args:
      ops: the operations with their numbers in the program.
      residuals: the values at their inputs.
      cotangents: those of the results of curved operations, by number.
      jets: those of the inputs; the jets of the results are added to it.
      request: what the rules compute.
      outline_each: whether each curved operation is a call that XLA does not inline.
    """
    terms = Terms()
    for n, op in ops:
        if op.rule is None or not any(v in jets for v in op.read):
            continue
        primals = values_of(op.inputs, residuals.values)
        if op.loop:
            primals = [*primals, residuals.loops[n]]
        some = [jets.get(v, Jet()) for v in op.read]
        is_outlined = outline_each and op.is_curved
        arguments = primals, cotangents.get(n), some, request
        found, more = _apply_rule(op, *arguments, is_outlined=is_outlined)
        if request.tangents_are_fixed:
            found = jax.lax.stop_gradient(found)
        terms += more
        jets.update((v, x) for v, x in zip(op.written, found, strict=True) if x.first)
    return terms


def _apply_rule(op: Op, *arguments: Any, is_outlined: bool) -> tuple[list[Jet], Terms]:
    """The jets of the active outputs of one operation, and its terms."""

    def run() -> tuple[list[Jet], Terms]:
        result = op.rule.apply(op, *arguments)
        return checked(op, result) if op.rule.is_registered else result

    try:
        return (lowerings.outlined(run) if is_outlined else run)()
    except NameError:  # an error of the rule itself
        raise
    except Exception as error:  # jax has no common class for missing derivatives
        if op.rule.is_registered:
            warn_of_failure(op, error)
        raise OperationError(op) from error
