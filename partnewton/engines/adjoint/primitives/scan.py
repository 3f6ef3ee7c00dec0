"""A `scan`, whose tangents and terms are computed by another scan.

Each iteration (carry, y) = f(constants, carry, x) is a sweep through the operations of
f, with the jets of the carry from the iteration before, and the sums of all terms are
carried, too. For example, the carry of

    scan(lambda h, x: (tanh(h @ W + x @ U), None), h_0, xs)

has no tangent at the beginning, and one row for W and one for U after the first
iteration. Since the carry of a scan has one shape, it has all rows from the beginning,
with zeros: those of the subsets that reach it in any iteration.
"""

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
from partnewton.engines.adjoint.sweep import sweep
from partnewton.engines.adjoint.tangent import Jet, densify_jet
from partnewton.engines.adjoint.terms import Terms

__all__ = ["SCAN"]


def scan(
    op: Op,
    primals: Sequence[Any],
    cotangents: Perturbations,
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = scan(f, ...), by the rules of the operations of f.

    The last one of the primals are the residuals of the body; the cotangents are those
    of its operations.
    """
    loop, body, (*values, residuals) = op.loop, op.loop.body, primals
    inputs, outputs, start = loop.inputs, body.outputs, loop.num_constants
    stop = start + loop.num_carry
    orders = request.num_orders
    moved = {n: x for n, x in zip(op.active_inputs, jets, strict=True) if x.first}
    spans = spans_in_loop(loop, {inputs[n]: x.first.span for n, x in moved.items()})
    everyone = hull([x.first.span for x in moved.values()])
    fixed = [*loop.closed, *values[:start]]
    # By their positions among the inputs, and among the outputs.
    constants = {n: x for n, x in moved.items() if n < start}
    xs = {n: _iterations_first(x) for n, x in moved.items() if n >= stop}
    carried = [n for n in range(start, stop) if inputs[n] in spans]
    ys = [n for n in op.active_outputs if n >= loop.num_carry]
    ys = [n for n in ys if is_variable(outputs[n]) and outputs[n] in spans]

    def iterate(carry: tuple, scanned: tuple) -> tuple:
        jets, *totals = carry
        inside, cotangents, xs = scanned
        inside = Residuals(body.completed(fixed, inside), inside.loops)
        found = {inputs[n]: x for n, x in {**constants, **jets, **xs}.items()}
        terms = sweep(enumerate(body.ops), inside, cotangents, found, request)
        more = terms.total(everyone, request.dtype)
        totals = [x + y for x, y in zip(totals, more, strict=True)]

        def all_rows(atom: Any, span: Span, like: jax.Array) -> Jet:
            jet = found.get(atom, Jet()) if is_variable(atom) else Jet()
            return densify_jet(jet, span, orders, like)

        after = {
            n: all_rows(outputs[n - start], spans[inputs[n]], values[n])
            for n in carried
        }
        written = {
            n: all_rows(outputs[n], spans[outputs[n]], compat.zeros(outputs[n], ()))
            for n in ys
        }
        return (after, *totals), written

    before = {
        n: densify_jet(moved.get(n, Jet()), spans[inputs[n]], orders, values[n])
        for n in carried
    }
    (after, *totals), written = jax.lax.scan(
        iterate,
        (before, *Terms().total(everyone, request.dtype)),
        (residuals, cotangents, xs),
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    found = {n - start: x for n, x in after.items()}
    found.update((n, _iterations_first(x)) for n, x in written.items())
    terms = Terms.of_totals(everyone, *totals)
    return [found.get(n, Jet()) for n in op.active_outputs], terms


def _iterations_first(jet: Jet) -> Jet:
    """Exchanges the first two axes, those of the rows and of the iterations."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jet)


SCAN = OpRule("scan", scan)
