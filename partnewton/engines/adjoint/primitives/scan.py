"""A `scan`, whose tangents and terms are computed by another scan."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.spans import Span, hull
from partnewton.engines.adjoint.support import spans_in_loop
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import Jet, Tangent, densify
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["SCAN"]

Columns = list[list[jax.Array]]  # for each order, the rows of some variables


def scan(
    op: Op,
    primals: Sequence[Any],
    cotangents: Perturbations,
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = scan(f, ...), by the rules of the operations of f.

    Args:
      op: the operation.
      primals: the values of its inputs, and the residuals of its body.
      cotangents: those of the operations of the body.
      jets: of the active inputs.
      request: what the rules compute.
    """
    *values, residuals = primals
    return _Scan(op, values, jets, request).run(residuals, cotangents)


class _Scan:
    """The scan of the tangents of a scan.

    The tangent of the carry has the same span in each iteration, the hull of those of
    all iterations.
    """

    def __init__(
        self, op: Op, values: Sequence[Any], jets: Sequence[Jet], request: Request
    ):
        self.op, self.loop, self.request = op, op.loop, request
        self.orders = 2 if request.third_order else 1
        inputs = op.loop.inputs
        self.values = dict(zip(inputs, values, strict=True))
        self.jets = {
            inputs[i]: x for i, x in zip(op.active_inputs, jets, strict=True) if x.first
        }
        spans = {v: x.first.span for v, x in self.jets.items()}
        self.spans = spans_in_loop(op.loop, spans)
        self.everyone = hull(list(spans.values()))

        constants, carry, xs = op.loop.split(inputs)
        outputs = op.loop.body.outputs
        self.constants = [v for v in constants if v in self.jets]
        self.xs = [[v for v in xs if self._of(v, n)] for n in range(self.orders)]
        pairs = zip(carry, outputs[: op.loop.num_carry], strict=True)
        self.carry = [(v, w) for v, w in pairs if v in self.spans]
        ys = [i for i in op.active_outputs if i >= op.loop.num_carry]
        self.ys = [
            i for i in ys if is_variable(outputs[i]) and outputs[i] in self.spans
        ]

    def _of(self, v: Variable, order: int) -> Tangent | None:
        return self.jets[v][order] if v in self.jets else None

    def run(
        self, residuals: Residuals, cotangents: Perturbations
    ) -> tuple[list[Jet], Terms]:
        """The jets of the outputs, and the terms of all iterations."""
        constants, _, _ = self.loop.split(self.loop.inputs)
        fixed = [*self.loop.closed, *(self.values[v] for v in constants)]

        def iterate(carry: tuple, scanned: tuple) -> tuple:
            rows, *totals = carry
            inside, cotangents, xs = scanned
            jets = self._entering(rows, xs)
            values = self.loop.body.completed(fixed, inside)
            inside = Residuals(values, inside.loops)
            ops = enumerate(self.loop.body.ops)
            terms = sweep(ops, inside, cotangents, jets, self.request)
            more = terms.total(self.everyone, self.request.dtype)
            totals = [x + y for x, y in zip(totals, more, strict=True)]
            after = [(w, self.spans[v], self.values[v]) for v, w in self.carry]
            outputs = [self.loop.body.outputs[i] for i in self.ys]
            ys = [(w, self.spans[w], compat.zeros(w, ())) for w in outputs]
            return (self._rows(jets, after), *totals), self._rows(jets, ys)

        before = [(v, self.spans[v], self.values[v]) for v, _ in self.carry]
        xs = [
            [jnp.moveaxis(self.jets[v][n].values, 1, 0) for v in self.xs[n]]
            for n in range(self.orders)
        ]
        (rows, *totals), ys = jax.lax.scan(
            iterate,
            (
                self._rows(self.jets, before),
                *Terms().total(self.everyone, self.request.dtype),
            ),
            (residuals, cotangents, xs),
            length=self.loop.length,
            reverse=self.loop.reverse,
            unroll=self.loop.unroll,
        )
        return self._leaving(rows, ys), Terms.of_totals(self.everyone, *totals)

    def _rows(
        self, jets: Jets, wanted: Sequence[tuple[Variable, Span, jax.Array]]
    ) -> Columns:
        """All rows of some variables, of each order."""
        return [
            [
                densify((jets.get(v, Jet()) if is_variable(v) else Jet())[n], span, x)
                for v, span, x in wanted
            ]
            for n in range(self.orders)
        ]

    def _entering(self, carry: Columns, xs: Columns) -> Jets:
        """The jets at the beginning of an iteration."""
        tangents: list[dict[Variable, Tangent]] = [{}, {}]
        for n in range(self.orders):
            known = {v: self.jets[v][n] for v in self.constants}
            tangents[n].update((v, x) for v, x in known.items() if x)
            for (v, _), x in zip(self.carry, carry[n], strict=True):
                tangents[n][v] = Tangent(x, self.spans[v].start)
            for v, x in zip(self.xs[n], xs[n], strict=True):
                tangents[n][v] = Tangent(x, self.jets[v][n].start)
        first, second = tangents
        return {v: Jet(x, second.get(v)) for v, x in first.items()}

    def _leaving(self, carry: Columns, ys: Columns) -> list[Jet]:
        """The jets of the active outputs."""
        _, carried, _ = self.loop.split(self.loop.inputs)
        columns: list[dict[int, Tangent]] = [{}, {}]
        for n in range(self.orders):
            for (v, _), x in zip(self.carry, carry[n], strict=True):
                columns[n][carried.index(v)] = Tangent(x, self.spans[v].start)
            for i, x in zip(self.ys, ys[n], strict=True):
                start = self.spans[self.loop.body.outputs[i]].start
                columns[n][i] = Tangent(jnp.moveaxis(x, 1, 0), start)
        first, second = columns
        return [Jet(first.get(i), second.get(i)) for i in self.op.active_outputs]


SCAN = OpRule("scan", scan)
