"""Tangents of repeated parts, by a scan that is traced and compiled once.

The rows of some consecutive parts are padded by zeros to the same number, which makes
the parts one function. What they read from each other is the carry of the scan, with a
row for every subset up to the last one; the rows of the parameters are narrow, and are
put at the places of their subsets.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint.dataflow import is_variable, values_of
from partnewton.engines.adjoint.op import Request
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.repeats import LEAST_PARTS, Part, Repeat
from partnewton.engines.adjoint.spans import DynamicIndex, Span, overlap
from partnewton.engines.adjoint.support import Spans
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import Jet, Tangent, densify
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["sweep_repeat"]

# Consecutive parts form groups, and are padded to the number of rows of the last part
# of their group, which has at least `LEAST_PARTS`. Larger groups compile faster, and
# compute more with zeros.
_MOST_SIZES = 4  # groups with different numbers of rows


def sweep_repeat(
    repeat: Repeat,
    leaves: frozenset[Variable],
    spans: Spans,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
) -> Terms:
    """Passes jets through all parts, as a sweep does.

    Args:
      repeat: the parts.
      leaves: the variables of the parameters.
      spans: the subsets that move each variable.
      residuals, cotangents, jets, request: as for a sweep.
    """
    terms = Terms()
    for parts, layout in _alike(repeat.parts, leaves, spans):
        for some in _in_sizes(parts):
            moving = [spans[v] for part in some for v in part.read if v in spans]
            is_scan = moving and layout and len(some) >= LEAST_PARTS
            links = _links(some, layout) if is_scan else None
            if links is None:
                for part in some:
                    ops = zip(part.numbers, part.ops, strict=True)
                    terms += sweep(ops, residuals, cotangents, jets, request)
            else:
                everyone = Span(0, max(span.stop for span in moving))
                scan = _ScanOfParts(some, layout, links, everyone, request)
                terms += scan.run(residuals, cotangents, jets)
    return terms


# For each variable that is read: None if it has no tangent, -1 if its tangent has a row
# for every subset, else the number of rows and the earlier variables with the same
# subsets.
_Layout = tuple[Any, ...]


def _alike(
    parts: Sequence[Part], leaves: frozenset[Variable], spans: Spans
) -> Iterator[tuple[list[Part], _Layout | None]]:
    """Consecutive parts with the same layout of what they read."""
    run: list[Part] = []
    layout: _Layout | None = None
    for part in parts:
        new = _layout(part, leaves, spans)
        if run and (new is None or new != layout):
            yield run, layout
            run = []
        run.append(part)
        layout = new
    yield run, layout


def _layout(part: Part, leaves: frozenset[Variable], spans: Spans) -> _Layout | None:
    """The rows of each variable that a part reads; None if some subsets overlap."""
    narrow: list[Span] = []
    layout: list[Any] = []
    for v in part.read:
        span = spans.get(v)
        if v not in leaves:
            # Also without a tangent, since zeros do not change anything.
            layout.append(-1)
        elif span is None:
            layout.append(None)
        else:
            if any(other != span and overlap(other, span) for other in narrow):
                return None
            if span not in narrow:
                narrow.append(span)
            layout.append((span.count, narrow.index(span)))
    return tuple(layout)


def _in_sizes(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Parts that are padded to the same number of rows."""
    sizes = max(1, min(_MOST_SIZES, len(parts) // LEAST_PARTS))
    edges = np.linspace(0, len(parts), sizes + 1).round().astype(int)
    for a, b in itertools.pairwise(edges):
        yield parts[a:b]


def _links(parts: Sequence[Part], layout: _Layout) -> dict[int, tuple[str, int]] | None:
    """The sources of the carry: variables of a part computed by the part before.

    Returns:
      For each variable that is read with a row for every subset, by its place:
      ("written", place) or ("read", place) among the variables of the part before; None
      if this is not the same for all parts.
    """
    links: dict[int, tuple[str, int]] | None = None
    for before, part in itertools.pairwise(parts):
        new = {}
        for n, v in enumerate(part.read):
            if layout[n] != -1:
                continue
            if v in before.written:
                new[n] = "written", before.written.index(v)
            elif v in before.read and layout[before.read.index(v)] == -1:
                new[n] = "read", before.read.index(v)
            else:
                return None
        if links is not None and new != links:
            return None
        links = new
    return links


class _ScanOfParts:
    """A scan of tangents over parts of a program.

    What the parts read from each other is the carry, with a row for every subset; the
    rows of parameters, primals and cotangents are what is scanned over.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        layout: _Layout,
        links: dict[int, tuple[str, int]],
        everyone: Span,
        request: Request,
    ):
        self.parts, self.part, self.layout = parts, parts[0], layout
        self.links, self.everyone, self.request = links, everyone, request
        linked = {n for how, n in links.values() if how == "written"}
        self.collected = [
            n
            for n in range(len(self.part.written))
            if n not in linked or n in self.part.kept
        ]

    def run(self, residuals: Residuals, cotangents: Perturbations, jets: Jets) -> Terms:
        """Passes jets through all parts."""
        primals = [
            [x for op in part.ops for x in values_of(op.inputs, residuals.values)]
            for part in self.parts
        ]
        some = [[cotangents.get(n) for n in part.numbers] for part in self.parts]
        rows = [
            [
                jets[v].first.values if how not in (None, -1) else None
                for v, how in zip(part.read, self.layout, strict=True)
            ]
            for part in self.parts
        ]
        starts = np.array([self._starts(part, jets) for part in self.parts], np.int32)
        fixed, xs = _scan_inputs((primals, some, rows))

        def iterate(carry: tuple, scanned: tuple) -> tuple:
            carried, *totals = carry
            x, places = scanned
            primals, cotangents, rows = fixed(x)
            found, more = self._pass(primals, cotangents, rows, places, carried)
            totals = [a + b for a, b in zip(totals, more, strict=True)]
            after = {
                n: found[m] if how == "written" else carried[m]
                for n, (how, m) in self.links.items()
            }
            return (after, *totals), [found[n] for n in self.collected]

        before = {
            n: self._dense(jets.get(v, Jet()), residuals.values[v])
            for n, v in enumerate(self.part.read)
            if self.layout[n] == -1
        }
        zeros = Terms().total(self.everyone, self.request.dtype)
        (after, *totals), ys = jax.lax.scan(iterate, (before, *zeros), (xs, starts))
        self._enter(jets, after, ys)
        return Terms.of_totals(self.everyone, *totals)

    def _starts(self, part: Part, jets: Jets) -> list[int]:
        """The first subset of each group of parameters."""
        pairs = zip(part.read, self.layout, strict=True)
        starts = {
            how[1]: jets[v].first.start for v, how in pairs if how not in (None, -1)
        }
        return [starts[n] for n in sorted(starts)]

    def _dense(self, jet: Jet, like: jax.Array) -> list[jax.Array]:
        """A row for every subset, for each requested order."""
        orders = 2 if self.request.third_order else 1
        return [densify(x, self.everyone, like) for x in jet[:orders]]

    def _pass(
        self,
        primals: Sequence[Any],
        cotangents: Sequence[Any],
        rows: Sequence[jax.Array | None],
        places: jax.Array,
        carried: dict[int, list[jax.Array]],
    ) -> tuple[list[list[jax.Array]], tuple[jax.Array, jax.Array]]:
        """The rows of the results of one part, and the sums of its terms."""
        starts = [DynamicIndex(x, self.everyone.count) for x in places]
        jets: Jets = {}
        for n, (v, how) in enumerate(zip(self.part.read, self.layout, strict=True)):
            if how == -1:
                jets[v] = Jet(*(Tangent(x) for x in carried[n]))
            elif how is not None:
                jets[v] = Jet(Tangent(rows[n], starts[how[1]]))
        inputs = [v for op in self.part.ops for v in op.inputs]
        pairs = zip(inputs, primals, strict=True)
        values = {v: x for v, x in pairs if is_variable(v)}
        numbers = self.part.numbers
        terms = sweep(
            zip(numbers, self.part.ops, strict=True),
            Residuals(values, {}),
            dict(zip(numbers, cotangents, strict=True)),
            jets,
            self.request,
        )
        found = [
            self._dense(jets.get(v, Jet()), compat.zeros(v, ()))
            for v in self.part.written
        ]
        return found, terms.total(self.everyone, self.request.dtype)

    def _enter(
        self,
        jets: Jets,
        after: dict[int, list[jax.Array]],
        ys: list[list[jax.Array]],
    ) -> None:
        """Adds the jets of the results of all parts to `jets`."""
        for n, stacks in zip(self.collected, ys, strict=True):
            for k, part in enumerate(self.parts):
                jets[part.written[n]] = Jet(*(Tangent(x[k]) for x in stacks))
        for n, (how, m) in self.links.items():
            if how == "written":
                jets[self.parts[-1].written[m]] = Jet(*map(Tangent, after[n]))


def _scan_inputs(columns: Any) -> tuple[Callable[[list], Any], list[jax.Array]]:
    """Stacked values of all parts, the input of a scan.

    Args:
      columns: a pytree in which each subtree is a list with an entry for each part.

    Returns:
      From the values of one iteration to those of one part, and the stacks.
    """
    parts = list(zip(*columns, strict=True))
    flat = [jax.tree.flatten(part, is_leaf=lambda x: x is None) for part in parts]
    treedef = flat[0][1]
    rows = list(zip(*(leaves for leaves, _ in flat), strict=True))
    is_fixed = [all(x is row[0] for x in row) for row in rows]
    stacks = [
        jnp.stack(row) for row, flag in zip(rows, is_fixed, strict=True) if not flag
    ]

    def of_part(some: list[jax.Array]) -> Any:
        rest = iter(some)
        leaves = [
            row[0] if flag else next(rest)
            for row, flag in zip(rows, is_fixed, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)

    return of_part, stacks
