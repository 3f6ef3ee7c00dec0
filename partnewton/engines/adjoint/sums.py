"""Gradient, Hessian and third order: the sums of all terms, by one or more sweeps."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.final import sweep_final
from partnewton.engines.adjoint.op import Request
from partnewton.engines.adjoint.partitioned import (
    Leaves,
    Linearized,
    PartitionedProgram,
)
from partnewton.engines.adjoint.program import Perturbations, Residuals
from partnewton.engines.adjoint.rolled import sweep_repeat
from partnewton.engines.adjoint.spans import Span
from partnewton.engines.adjoint.support import bytes_of_a_row, spans_in
from partnewton.engines.adjoint.sweep import Jets, sweep
from partnewton.engines.adjoint.tangent import Jet, Tangent
from partnewton.engines.adjoint.terms import Terms, placed
from partnewton.engines.components import Components

__all__ = ["sums_along", "third_order_tensor"]

_MOST_BYTES = 2**30  # upper bound on the tangents that one operation writes
_CACHED_BYTES = 2**23  # with fewer, a sweep is compiled as one


def sums_along(
    partitioned: PartitionedProgram,
    parts: Components,
    point: Linearized,
    third_order: bool,
    batch_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradient (K S,), hessian (K S, K S) and third (K S,) or None.

    An entry of the hessian needs the tangents of two subsets in the same sweep. If the
    memory does not suffice for all subsets, they are divided into blocks, and there is
    one sweep for each pair of blocks.

    Args:
      partitioned: the program of the loss, and a partition of its inputs.
      parts: the components of the directions.
      point: the linearization of the loss.
      third_order: whether third is requested.
      batch_size: the number of subsets in one sweep; by default as many as 1 GiB holds.
    """
    M, dtype = parts.size, parts.dtype
    row = _bytes_of_a_row(partitioned) * parts.num_directions
    request = Request(third_order, dtype)
    shapes = [(M,), (M, M), (M,)]
    totals = [jnp.zeros(shape, dtype) for shape in shapes]
    known = [np.zeros(shape, bool) for shape in shapes]  # from the sweeps so far
    for subsets in _subsets_of_sweeps(
        partitioned.order, batch_size or _MOST_BYTES // row
    ):
        included = np.zeros(M, bool)
        included[_components_of(parts, subsets)] = True
        computed = [included, np.outer(included, included), included]
        missing = [x & ~y for x, y in zip(computed, known, strict=True)]
        is_large = len(subsets) * row > _CACHED_BYTES
        sums = _one_sweep(partitioned, parts, point, subsets, request, is_large)
        # If the loss is not finite, neither are its derivatives.
        value = point.outputs[0]
        if not compat.varying_axes(value):
            sums = [jnp.where(jnp.isfinite(value), x, jnp.nan) for x in sums]
        columns = zip(missing, sums, totals, strict=True)
        totals = [jnp.where(*column) for column in columns]
        known = [x | y for x, y in zip(known, computed, strict=True)]
    gradient, hessian, third = totals
    return gradient, hessian, third if third_order else None


def third_order_tensor(
    partitioned: PartitionedProgram,
    parts: Components,
    leaves: Leaves,
    batch_size: int | None,
) -> jax.Array:
    """All of the third order, (K S, K S, K S).

    With M_s the derivative of the sum of all terms along (xdot_s / 3, lambdadot_s),
    where the tangents in these terms are constants, and s, t, r components,

        D3 L[u_s, u_t, u_r] = M_s[t, r] + M_t[s, r] + M_r[s, t].
    """
    request = Request(False, parts.dtype, tangents_are_fixed=True)

    def linearize(leaves: Leaves) -> tuple[Residuals, Perturbations]:
        point = partitioned.linearize(leaves)
        return point.residuals, point.cotangents

    values, treedef = jax.tree.flatten(linearize(leaves))
    is_active = jax.tree.leaves(partitioned.program.active_residuals())
    num_values = sum(is_active)
    is_active += [True] * (len(values) - len(is_active))  # the cotangents

    def active_values(leaves: Leaves) -> list[jax.Array]:
        pairs = zip(jax.tree.leaves(linearize(leaves)), is_active, strict=True)
        return [x for x, flag in pairs if flag]

    def sum_of_terms(some: Sequence[jax.Array]) -> jax.Array:
        """The hessian, as a function of the active residuals and the cotangents."""
        rest = iter(some)
        pairs = zip(values, is_active, strict=True)
        filled = [next(rest) if flag else x for x, flag in pairs]
        residuals, cotangents = jax.tree.unflatten(treedef, filled)
        point = Linearized([], residuals, cotangents, None)
        return _one_sweep(partitioned, parts, point, partitioned.order, request)[1]

    start, values_along = jax.linearize(active_values, list(leaves))
    _, terms_along = jax.linearize(sum_of_terms, start)

    def pass_of(m: jax.Array) -> jax.Array:
        derivatives = values_along(parts[m])
        thirds = [x / 3 for x in derivatives[:num_values]]
        return terms_along([*thirds, *derivatives[num_values:]])

    m = jax.lax.map(pass_of, jnp.arange(parts.size), batch_size=batch_size)
    s, t, r = np.sort(np.indices(m.shape).reshape(3, -1), axis=0)
    tensor = m[s, t, r] + m[t, s, r] + m[r, s, t]
    return tensor.reshape(m.shape)  # read in sorted order, hence symmetric


def _one_sweep(
    partitioned: PartitionedProgram,
    parts: Components,
    point: Linearized,
    subsets: Sequence[int],
    request: Request,
    outline_each: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient, hessian and third, zero at all entries of other subsets."""
    components = _components_of(parts, subsets)
    program, everyone = partitioned.program, Span(0, len(components))

    def run(
        directions: Leaves, residuals: Residuals, cotangents: Perturbations
    ) -> tuple[list[Jet], Terms]:
        jets = _jets_of_leaves(partitioned, directions, subsets)
        terms = _sweep_ops(
            partitioned, residuals, cotangents, jets, request, outline_each
        )
        return [jets.get(v, Jet()) for v in ends], terms

    ends = program.final.read if program.final else program.outputs[:1]
    ends = list(filter(is_variable, ends))
    # Not inlined: XLA would recompute values and cotangents for each consumer.
    found, terms = lowerings.outlined(run)(
        parts.directions, point.residuals, point.cotangents
    )
    jets = {v: x for v, x in zip(ends, found, strict=True) if x.first}
    slope = jets[ends[0]].first if jets else None
    if point.final:
        slope, more = sweep_final(point.final, jets, request)
        terms += more
    gradient = placed(slope, everyone, request.dtype)
    hessian, third = terms.total(everyone, request.dtype)
    hessian = 0.5 * (hessian + hessian.T)  # exactly symmetric
    return _spread(parts.size, components, gradient, hessian, third)


def _sweep_ops(
    partitioned: PartitionedProgram,
    residuals: Residuals,
    cotangents: Perturbations,
    jets: Jets,
    request: Request,
    outline_each: bool,
) -> Terms:
    """Propagates jets through all operations, and adds those of all variables."""
    ops = list(enumerate(partitioned.program.ops))
    spans = spans_in(partitioned.program, {v: x.first.span for v, x in jets.items()})
    common = residuals, cotangents, jets, request
    leaves = frozenset(partitioned.inputs)
    terms, n = Terms(), 0
    for repeat in partitioned.repeats:
        terms += sweep(ops[n : repeat.start], *common, outline_each=outline_each)
        terms += sweep_repeat(repeat, leaves, spans, *common)
        n = repeat.stop
    return terms + sweep(ops[n:], *common, outline_each=outline_each)


def _components_of(parts: Components, subsets: Sequence[int]) -> np.ndarray:
    """The component, direction and subset, of each row of a sweep.

    Rows are ordered by subset, with the K directions of a subset side by side, so that
    those of a weight are contiguous. Components are ordered by direction.
    """
    K, S = parts.shape
    return (np.array(subsets)[:, None] + S * np.arange(K)).ravel()


def _spread(size: int, places: np.ndarray, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Scatters arrays over some components to arrays over all components."""
    if len(places) == size:
        back = np.argsort(places)
        return tuple(x[np.ix_(*[back] * x.ndim)] for x in arrays)
    return tuple(
        jnp.zeros((size,) * x.ndim, x.dtype).at[np.ix_(*[places] * x.ndim)].set(x)
        for x in arrays
    )


def _jets_of_leaves(
    partitioned: PartitionedProgram, directions: Leaves, subsets: Sequence[int]
) -> Jets:
    """The directions of each leaf, with K rows for each subset with entries in it."""
    places = {s: n for n, s in enumerate(subsets)}
    jets = {}
    for v, u, label in zip(
        partitioned.inputs, directions, partitioned.partition.labels, strict=True
    ):
        found = [places[s] for s in np.unique(label).tolist() if s in places]
        if not found:
            continue
        start, stop = min(found), max(found) + 1
        rows = u  # (K, *shape)
        if isinstance(label, np.ndarray):
            some = np.array(subsets[start:stop]).reshape(-1, 1, *[1] * label.ndim)
            rows = jnp.where(label == some, u, jnp.zeros_like(u))
            rows = rows.reshape(-1, *label.shape)
        jets[v] = Jet(Tangent(rows, start * len(u)))
    return jets


def _subsets_of_sweeps(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """The subsets of each sweep, in the order in which the loss uses them."""
    S = len(order)
    if batch_size >= S:
        return [list(order)]
    size = max(1, batch_size // 2)
    blocks = [list(order[n : n + size]) for n in range(0, S, size)]
    return [x + y for x, y in itertools.combinations(blocks, 2)]


def _bytes_of_a_row(partitioned: PartitionedProgram) -> int:
    """The bytes per subset of the tangents of the largest operation; at least 1."""
    place = {s: n for n, s in enumerate(partitioned.order)}
    spans = {}
    for v, label in zip(partitioned.inputs, partitioned.partition.labels, strict=True):
        found = [place[s] for s in np.unique(label).tolist() if s in place]
        if found:
            spans[v] = Span(min(found), max(found) - min(found) + 1)
    return bytes_of_a_row(partitioned.program, spans)
