"""Groups of equations that become one operation.

All elementwise equations that depend on the same single variable, those of a gelu for
example, are one function of that variable, with one weighted Gram matrix instead of one
for each equation.
"""

import graphlib
import heapq
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from partnewton.engines.adjoint import dataflow, properties
from partnewton.engines.adjoint.dataflow import active_places
from partnewton.engines.adjoint.registry import registered_rule
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
    """Divides equations into groups: runs of elementwise ones, and single equations.

    A run consists of all elementwise equations that depend on the same single variable.
    It ends where an equation depends on a result of the run by another path, too.
    Equations with a registered rule are not in runs.
    """
    # The run of each result. A run is named by the variable that it is a function of,
    # or by its first result if there is such a run already.
    run_of: dict[Variable, Variable] = {}
    runs: dict[Variable, list[int]] = {}
    sources: dict[Any, set[Variable]] = {}  # the runs on which each variable depends
    run_sources: dict[Variable, set[Variable]] = {}  # those on which each run depends
    groups = []
    for i in places:
        equation = equations[i]
        awaited = dataflow.awaited(equation)
        read = {v for v in awaited if v in active}
        written = [v for v in equation.outvars if v in relevant]
        # A result of a run counts as the run, any other active variable as itself.
        names = {run_of.get(v, v) for v in read}
        depends_on = set().union(*(sources.get(v, set()) for v in awaited))
        # A run must not depend on its own results through other operations, such as a
        # mask or a stop_gradient.
        fixed = [sources.get(v, set()) for v in awaited if v not in read]
        is_start = not names.isdisjoint(_all_before(set().union(*fixed), run_sources))
        # An infinite derivative after a mask would make that of the whole run NaN.
        is_start |= singularities.is_singular(equation) and not read.isdisjoint(
            singularities.masked & run_of.keys()
        )
        if (
            written
            and len(read if is_start else names) == 1
            and len({v.aval.shape for v in (*read, *written)}) == 1
            and all(
                jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (*read, *written)
            )
            and properties.is_elementwise(equation)
            and registered_rule(equation, active_places(equation, active)) is None
        ):
            name = equation.outvars[0] if is_start else names.pop()
            run_of.update(dict.fromkeys(equation.outvars, name))
            if name not in runs:
                groups.append(runs.setdefault(name, []))
            runs[name].append(i)
            run_sources.setdefault(name, set()).update(depends_on - {name})
            depends_on = {name}
        else:
            groups.append([i])
        sources.update(dict.fromkeys(dataflow.provided(equation), depends_on))
    return groups


def _all_before(
    runs: Iterable[Variable], run_sources: dict[Variable, set[Variable]]
) -> set[Variable]:
    """Some runs and all runs that they depend on."""
    found, left = set(), list(runs)
    while left:
        run = left.pop()
        if run not in found:
            found.add(run)
            left.extend(run_sources.get(run, ()))
    return found


def ordered(
    groups: Sequence[list[int]], equations: Sequence[Equation]
) -> list[list[int]]:
    """The groups in an order of execution, by their first equations where possible."""
    group_of = {i: n for n, group in enumerate(groups) for i in group}
    sorter = graphlib.TopologicalSorter(dict.fromkeys(range(len(groups)), ()))
    writer: dict[Any, int] = {}
    for i, n in sorted(group_of.items()):
        read = dataflow.awaited(equations[i])
        sorter.add(n, *({writer[v] for v in read if v in writer} - {n}))
        writer.update(dict.fromkeys(dataflow.provided(equations[i]), n))
    sorter.prepare()
    ready, result = [], []
    while sorter.is_active():
        for n in sorter.get_ready():
            heapq.heappush(ready, (groups[n][0], n))
        _, n = heapq.heappop(ready)
        result.append(groups[n])
        sorter.done(n)
    return result
