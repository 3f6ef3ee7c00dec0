"""The final step: operations that jax differentiates as one function.

It begins with operations that have to be differentiated in this way, such as those with
a `custom_vjp`, and contains all that depend on them. Let F(x) be the loss as a function
of the inputs x of the final step, and g = `jax.grad(F)`. The gradient of the loss is
x'(theta)^T g(x(theta)). Its derivatives are the terms of the operations before, with g
as the cotangent of x, and

    hessian_st += <xdot_s, Dg[xdot_t]>
    third_s    += <xdot_s, D2g[xdot_s, xdot_s] + Dg[xddot_s]> + 2 <xddot_s, Dg[xdot_s]>.

By its custom rules, g need not be the gradient of any function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from partnewton.engines import nesting
from partnewton.engines.adjoint.inner import dots, where_moved
from partnewton.engines.adjoint.op import Op, Request
from partnewton.engines.adjoint.rows import apply, with_zeros
from partnewton.engines.adjoint.spans import hull
from partnewton.engines.adjoint.sweep import Jets
from partnewton.engines.adjoint.tangent import Tangent, add, densify
from partnewton.engines.adjoint.terms import Terms, over_all_devices

__all__ = ["Final", "sweep_final"]

_MOST_PRODUCT_BYTES = 2**30  # written at once by products with several vectors


@dataclasses.dataclass(frozen=True)
class Final:
    """The final step of a program at a point, and its linearized gradient.

    Attributes:
      op: all of its equations, as one operation.
      function: from the active inputs to the loss and the other outputs of the step.
      point: the values of the active inputs.
      linear: value, gradient and products with the derivative of the gradient.
    """

    op: Op
    function: Callable[[list[jax.Array]], tuple[jax.Array, Any]]
    point: list[jax.Array]
    linear: nesting.LinearizedGradient

    @property
    def product_bytes(self) -> int:
        """The bytes that a product with one vector writes, at least 1."""
        written = [v for e in self.op.equations for v in e.outvars]
        return max(1, sum(v.aval.size * v.aval.dtype.itemsize for v in written))


def sweep_final(
    final: Final, jets: Jets, request: Request
) -> tuple[Tangent | None, Terms]:
    """The derivatives of the loss along the subsets, and terms of the final step."""
    moved = [(n, v) for n, v in enumerate(final.op.read) if v in jets]
    if not moved:
        return None, Terms()
    places = [n for n, _ in moved]
    first, second = ([jets[v][n] for _, v in moved] for n in (0, 1))
    span = hull([x.span for x in first])
    columns = [densify(x, span) for x in first]

    filled = with_zeros(lambda *x: list(x), final.point, places)

    def hvp(*xdot: jax.Array) -> list[jax.Array]:
        product = final.linear.product(*filled(*xdot))
        return [product[n] for n in places]

    def third(*moved: jax.Array) -> list[jax.Array]:
        xdot, xddot = filled(*moved[: len(places)]), None
        if len(moved) > len(places):
            xddot = filled(*moved[len(places) :])
        along = nesting.third(final.function, final.point, xdot, xddot, request.dtype)
        return [along]

    batch_size = max(1, _MOST_PRODUCT_BYTES // final.product_bytes)
    products = apply(hvp, *columns, batch_size=batch_size)
    terms, slopes = Terms(), []
    for n, x, product in zip(places, first, products, strict=True):
        terms += Terms.of_hessian(Tangent(where_moved(product, x), span.start), x)
        slope = dots(x.values, final.linear.gradient[n], is_guarded=True)
        slopes.append(Tangent(over_all_devices(slope), x.start))
    if request.third_order:
        if any(x is not None for x in second):
            pairs = zip(places, second, strict=True)
            columns += [densify(x, span, like=final.point[n]) for n, x in pairs]
        terms += Terms.of_third(span, apply(third, *columns, batch_size=batch_size)[0])
    return add(*slopes), terms
