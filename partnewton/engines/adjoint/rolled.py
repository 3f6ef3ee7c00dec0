"""Tangents of repeated parts, by a scan that is traced and compiled once.

Parts that repeat, such as the layers of a network, are the same function of their
inputs, but the tangents have more rows from part to part. For example, let

    h_k = tanh(h_(k-1) @ W_k),   k = 1, 2, 3,

with one subset for each weight. All tangents get as many rows as in the last part, with
zeros in front:

    k   rows of the tangent of h_k
    1   0     0     W_1
    2   0     W_1   W_2
    3   W_1   W_2   W_3

The subset of a weight then has the same row in each part, so that the parts become one
function, the body of a `scan`. From one part to the next, rows are shifted by the
number of subsets of a part, here 1: the first row, which is zero, is dropped, and a row
of zeros is appended. The sums of terms are shifted in the same way. The rows of other
subsets, of earlier operations or common to all parts, come first and stay.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import values_of
from partnewton.engines.adjoint.layout import Layout, groups_of
from partnewton.engines.adjoint.op import Request
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.repeats import Part, Repeat
from partnewton.engines.adjoint.support import Spans
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import Jet, Tangent, densify, densify_jet
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["sweep_repeat"]


def sweep_repeat(
    repeat: Repeat,
    leaves: Collection[Variable],
    spans: Spans,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Propagates jets through all parts, as a sweep does.

    Args:
      repeat: the parts.
      leaves: the variables of the parameters.
      spans: the subsets that each variable depends on.
      residuals, cotangents, jets, request: as for a sweep.
    """
    common = residuals, cotangents, jets, request
    terms = Terms()
    for parts, layout in groups_of(repeat.parts, leaves, spans):
        if layout:
            terms += _scan(parts, layout, *common)
        else:
            for part in parts:
                terms += sweep(zip(part.numbers, part.ops, strict=True), *common)
    return terms


def _scan(
    parts: Sequence[Part],
    layout: Layout,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Propagates jets through parts, in one scan.

    What the parts read from each other is carried. Primals, cotangents and the rows of
    the parameters are scanned over.
    """
    part, everyone = parts[0], layout.everyone

    def all_rows(jet: Jet, like: jax.Array) -> Jet:
        return densify_jet(jet, everyone, request.num_orders, like)

    def shifted(rows: jax.Array) -> jax.Array:
        rows = _without_zeros(rows, layout, 1)
        return densify(Tangent(rows), everyone)

    def iterate(carry: tuple, scanned: list) -> tuple:
        carried, hessian, third = jax.tree.map(shifted, carry)
        primals, cotangents, own = inputs_of(scanned)
        found = {part.read[n]: jet for n, jet in {**carried, **own}.items()}
        terms = sweep(
            zip(part.numbers, part.ops, strict=True),
            Residuals(dict(zip(part.inputs, primals, strict=True)), {}),
            dict(zip(part.numbers, cotangents, strict=True)),
            found,
            request,
        )
        written = [
            all_rows(found.get(v, Jet()), compat.zeros(v, ())) for v in part.written
        ]
        after = {
            n: written[m] if how == "written" else carried[m]
            for n, (how, m) in layout.sources.items()
        }
        more = terms.total(everyone, request.dtype)
        totals = shifted(hessian.T).T + more[0], third + more[1]
        return (after, *totals), [written[n] for n in layout.collected]

    inputs_of, scanned = _stacked(
        [_inputs(some, layout, residuals, cotangents, jets) for some in parts]
    )
    before = {
        n: all_rows(jets.get(part.read[n], Jet()), residuals.values[part.read[n]])
        for n in layout.sources
    }
    zeros = Terms().total(everyone, request.dtype)
    (after, *totals), written = jax.lax.scan(iterate, (before, *zeros), scanned)
    _add_results(jets, parts, layout, after, written)
    return Terms.of_totals(everyone, *totals)


def _inputs(
    part: Part,
    layout: Layout,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
) -> tuple[list[jax.Array], list[Any], dict[int, Jet]]:
    """Primals, cotangents, and the jets of the parameters by their positions."""
    own = {
        n: Jet(Tangent(jets[part.read[n]].first.values, span.start))
        for n, span in layout.own.items()
    }
    some = [cotangents.get(n) for n in part.numbers]
    return values_of(part.inputs, residuals.values), some, own


def _without_zeros(rows: jax.Array, layout: Layout, count: int) -> jax.Array:
    """The rows without the zeros after the fixed ones, of `count` shifts."""
    if not layout.shift * count:
        return rows
    fixed = layout.num_fixed
    rest = rows[fixed + layout.shift * count :]
    return jnp.concatenate([rows[:fixed], rest]) if fixed else rest


def _add_results(
    jets: Jets,
    parts: Sequence[Part],
    layout: Layout,
    after: dict[int, Jet],
    written: Sequence[Jet],
) -> None:
    """Adds the jets of what the parts write, without the zeros in front.

    Args:
      jets: those of all variables.
      parts, layout: of the scan.
      after: the final carry of the scan.
      written: its stacked results.
    """
    for n, stack in zip(layout.collected, written, strict=True):
        for k, part in enumerate(parts):
            behind = len(parts) - 1 - k
            orders = (
                x and Tangent(_without_zeros(x.values[k], layout, behind))
                for x in stack
            )
            jets[part.written[n]] = Jet(*orders)
    for n, (how, m) in layout.sources.items():
        if how == "written":
            jets[parts[-1].written[m]] = after[n]


def _stacked(inputs: Sequence[Any]) -> tuple[Callable[[list], Any], list[jax.Array]]:
    """Stacks pytrees of one structure.

    Returns:
      From the stacked arrays at one iteration to the pytree of this iteration, and the
      stacked arrays; those that are the same in all pytrees are not stacked.
    """
    columns = list(zip(*map(jax.tree.leaves, inputs), strict=True))
    treedef = jax.tree.structure(inputs[0])
    is_same = [all(x is column[0] for x in column) for column in columns]
    pairs = list(zip(columns, is_same, strict=True))

    def of_part(some: list[jax.Array]) -> Any:
        rest = iter(some)
        leaves = [column[0] if same else next(rest) for column, same in pairs]
        return jax.tree.unflatten(treedef, leaves)

    return of_part, [jnp.stack(column) for column, same in pairs if not same]
