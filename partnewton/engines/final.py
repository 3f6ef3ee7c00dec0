"""The final step: all from the first operation on that jax has to differentiate.

Write the loss as F(x), with x what the final step reads, and g for the gradient of F
as `jax.grad` has it. The gradient of the loss is x'(theta)^T g(x(theta)). Its
derivatives along the direction are those of the steps before, with g as the adjoint of
x, and besides

    hessian_st += <xdot_s, Dg[xdot_t]>
    third_s    += <xdot_s, D2g[xdot_s, xdot_s] + Dg[xddot_s]> + 2 <xddot_s, Dg[xdot_s]>.

Nothing is assumed about g, which need not be the gradient of anything.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from partnewton.engines import nesting
from partnewton.engines.program import Step
from partnewton.engines.rows import Rows, add, apply, expanded, union
from partnewton.engines.rules import Sums, dots, where_moved
from partnewton.engines.versions import Variable

__all__ = ["Final", "sweep_final"]

_MOST_BYTES = 2**30  # of what the products with several vectors write at once


@dataclasses.dataclass(frozen=True)
class Final:
    """The final step of a program at a point, and its linearised gradient.

    Attributes:
      step: the step.
      function: from what moves to the loss and what else the step computes.
      point: what moves.
      linear: value, gradient and products with the derivative of the gradient.
    """

    step: Step
    function: Callable[[list[jax.Array]], tuple[jax.Array, Any]]
    point: list[jax.Array]
    linear: nesting.Linearized

    @property
    def bytes_of_a_row(self) -> int:
        """What the products with one vector take, at least 1."""
        written = [v for e in self.step.equations for v in e.outvars]
        return max(1, sum(v.aval.size * v.aval.dtype.itemsize for v in written))


def sweep_final(
    final: Final, first: dict[Variable, Rows], second: dict[Variable, Rows], sums: Sums
) -> jax.Array:
    """Adds what the final step adds; returns the gradient (S,)."""
    moving = [final.step.inputs[i] for i in final.step.active_inputs]
    places = [i for i, v in enumerate(moving) if v in first]
    if not places:
        return jnp.zeros(sums.size, sums.dtype)
    moved = [moving[i] for i in places]
    subsets = union(*(first[v].subsets for v in moved))
    columns = [expanded(first[v], subsets, final.point[moving.index(v)]) for v in moved]

    def filled(some: Sequence[jax.Array]) -> list[jax.Array]:
        everything = list(map(jnp.zeros_like, final.point))
        for i, x in zip(places, some, strict=True):
            everything[i] = x
        return everything

    def turn(*xdot: jax.Array) -> list[jax.Array]:
        turned = final.linear.product(*filled(xdot))
        return [turned[i] for i in places]

    def third(*moved: jax.Array) -> list[jax.Array]:
        xdot, xddot = filled(moved[: len(places)]), None
        if len(moved) > len(places):
            xddot = filled(moved[len(places) :])
        return [nesting.third(final.function, final.point, xdot, xddot, sums.dtype)]

    most = max(1, _MOST_BYTES // final.bytes_of_a_row)
    turned = apply(turn, *columns, most=most)
    slopes = []
    for v, i, w in zip(moved, places, turned, strict=True):
        rows = first[v]
        sums.add_hessian(Rows(subsets, where_moved(w, rows)), rows)
        slope = dots(rows.values, final.linear.gradient[i][None], is_guarded=True)
        slopes.append(Rows(rows.subsets, sums.everywhere(slope)))
    if sums.third_order:
        if any(v in second for v in moved):
            points = [final.point[i] for i in places]
            pairs = zip(moved, points, strict=True)
            columns += [expanded(second.get(v), subsets, x) for v, x in pairs]
        sums.add_third(subsets, apply(third, *columns, most=most)[0])
    return sums.placed(add(*slopes))
