"""Which equations make one operation.

All elementwise equations that depend on one and the same variable alone, a gelu for
example, are one function of that variable: one weighted Gram product at its input,
instead of one for each of them.
"""

import heapq
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from partnewton.engines.adjoint import dataflow, registry
from partnewton.engines.adjoint.singularities import Singularities
from partnewton.engines.compat import Equation, Variable

__all__ = ["grouped", "ordered"]


def grouped(
    equations: Sequence[Equation],
    places: Iterable[int],
    active: Collection[Variable],
    relevant: Collection[Variable],
    singularities: Singularities,
) -> list[list[int]]:
    """The equations at some places in groups.

    All elementwise equations that depend on one and the same variable alone, a gelu for
    example, are one group: one function of that variable. Every other equation is a
    group of its own.
    """
    run_of: dict[Variable, Variable] = {}  # a run is called as what it starts from
    runs: dict[Variable, list[int]] = {}
    behind: dict[Variable, set[Variable]] = {}  # the runs that a variable comes after
    before: dict[Variable, set[Variable]] = {}  # the runs that a run comes after
    groups = []
    for i in places:
        equation = equations[i]
        awaited = dataflow.awaited(equation)
        read = {v for v in awaited if v in active}
        names = {run_of.get(v, v) for v in read}
        written = [v for v in equation.outvars if v in relevant]
        # No run may wait for what comes after itself, by way of a mask or of a
        # stop_gradient for example.
        fixed = [behind.get(v, set()) for v in awaited if v not in read]
        is_start = not names.isdisjoint(_all_before(set().union(*fixed), before))
        # What is infinite behind a mask would spoil the derivative of the whole run.
        is_start |= singularities.is_singular(equation) and not read.isdisjoint(
            singularities.masked & run_of.keys()
        )
        after = set().union(*(behind.get(v, set()) for v in awaited))
        if (
            written
            and len(read if is_start else names) == 1
            and len({v.aval.shape for v in (*read, *written)}) == 1
            and all(_is_real(v.aval) for v in (*read, *written))
            and registry.is_elementwise(equation)
        ):
            name = equation.outvars[0] if is_start else names.pop()
            run_of.update(dict.fromkeys(equation.outvars, name))
            if name not in runs:
                groups.append(runs.setdefault(name, []))
            runs[name].append(i)
            before.setdefault(name, set()).update(after - {name})
            after = {name}
        else:
            groups.append([i])
        behind.update(dict.fromkeys(dataflow.provided(equation), after))
    return groups


def _all_before(
    runs: Iterable[Variable], before: dict[Variable, set[Variable]]
) -> set[Variable]:
    """Some runs and all that they come after."""
    found, left = set(), list(runs)
    while left:
        run = left.pop()
        if run not in found:
            found.add(run)
            left.extend(before.get(run, ()))
    return found


def ordered(
    groups: Sequence[list[int]], equations: Sequence[Equation]
) -> list[list[int]]:
    """The groups in an order in which they can be executed, as near to the old one."""
    group_of = {i: n for n, group in enumerate(groups) for i in group}
    waits_for: list[set[int]] = [set() for _ in groups]
    writer: dict[Any, int] = {}
    for i, n in sorted(group_of.items()):
        waits_for[n].update(
            writer[v] for v in dataflow.awaited(equations[i]) if v in writer
        )
        writer.update(dict.fromkeys(dataflow.provided(equations[i]), n))
    waits_for = [others - {n} for n, others in enumerate(waits_for)]
    waiting: dict[int, list[int]] = {}
    for n, others in enumerate(waits_for):
        for other in others:
            waiting.setdefault(other, []).append(n)
    left = [len(others) for others in waits_for]
    ready = [(groups[n][0], n) for n, count in enumerate(left) if count == 0]
    heapq.heapify(ready)
    result = []
    while ready:
        _, n = heapq.heappop(ready)
        result.append(groups[n])
        for other in waiting.get(n, ()):
            left[other] -= 1
            if left[other] == 0:
                heapq.heappush(ready, (groups[other][0], other))
    return result


def _is_real(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)
