"""Operations without a rule of their own, differentiated by jax."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint.inner import dots, where_moved
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.primitives.linear import jets_of, linearized
from partnewton.engines.adjoint.rows import apply, group_by_support, push
from partnewton.engines.adjoint.spans import Span, overlap
from partnewton.engines.adjoint.tangent import Jet, Tangent, add, restrict
from partnewton.engines.adjoint.terms import Terms

__all__ = ["GENERIC"]


def generic(
    op: Op,
    primals: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = f(x1, x2, ...) for any f that jax can differentiate.

    With F(x) = lambda . f(x), hessian_st = <xdot_s, D2F xdot_t>, where D2F xdot_t is
    the derivative of the gradient of F along xdot_t.
    """
    active = op.take_active(primals)
    function = op.function_of_active(primals)

    def gradient(*x: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(function, *x)
        return pull(list(cotangents))

    jvp, hvp = linearized(function, active), linearized(gradient, active)
    first, second = ([x[n] for x in jets] for n in (0, 1))
    terms = Terms()
    bent: list[list[Tangent]] = [[] for _ in op.active_outputs]  # D2f[xdot, xdot]
    for span, members in group_by_support(first):
        columns = [restrict(first[n], span) for n in members]
        products = apply(hvp(members), *columns)
        terms += _hessian_terms(products, first, span)
        if request.third_order:
            terms += _cross_third(products, second, span)
            at = [active[n] for n in members]
            along = _derivatives_along(op.function_of_active(primals, members), at)
            d2, d3 = _halves(apply(along, *columns))
            for column, x in zip(bent, d2, strict=True):
                column.append(Tangent(x, span.start))
            terms += Terms.of_third(span, _paired(cotangents, d3))
    if not request.third_order:
        return jets_of(op, push(jvp, first)), terms
    pushed = push(jvp, second) or [None] * len(bent)
    second = [add(*column, x) for column, x in zip(bent, pushed, strict=True)]
    return jets_of(op, push(jvp, first), second), terms


def _hessian_terms(products: Sequence[jax.Array], first: Sequence, span: Span) -> Terms:
    """<xdot_s, D2F xdot_t> for t in a span."""
    terms = Terms()
    for x, product in zip(first, products, strict=True):
        if x is not None:
            left = Tangent(where_moved(product, x), span.start)
            terms += Terms.of_hessian(left, x)
    return terms


def _cross_third(products: Sequence[jax.Array], second: Sequence, span: Span) -> Terms:
    """3 <xddot_s, D2F xdot_s> for s in a span."""
    terms = Terms()
    for x, product in zip(second, products, strict=True):
        common = overlap(x.span, span) if x is not None else None
        if common is not None:
            some = restrict(Tangent(product, span.start), common)
            values = dots(some, restrict(x, common), is_guarded=True)
            terms += Terms.of_third(common, values, factor=3.0)
    return terms


def _derivatives_along(function: Callable, at: Sequence[jax.Array]) -> Callable:
    """v -> [*D2f(at)[v, v], *D3f(at)[v, v, v]], each with all outputs of f."""

    def along(f: Callable, v: Sequence[jax.Array]) -> Callable:
        return lambda *x: jax.jvp(f, x, v)

    def derivatives(*v: jax.Array) -> list[jax.Array]:
        def d1(*x: jax.Array) -> list[jax.Array]:
            return jax.jvp(function, x, v)[1]

        def d2(*x: jax.Array) -> list[jax.Array]:
            return along(d1, v)(*x)[1]

        second, third = along(d2, v)(*at)
        return [*second, *third]

    return derivatives


def _halves(derivatives: list[jax.Array]) -> tuple[list, list]:
    half = len(derivatives) // 2
    return derivatives[:half], derivatives[half:]


def _paired(cotangents: Sequence[jax.Array], rows: Sequence[jax.Array]) -> jax.Array:
    """lambda . z_s for each row, summed over all outputs."""
    pairs = zip(cotangents, rows, strict=True)
    return sum(dots(x, jnp.broadcast_to(a, x.shape), is_guarded=True) for a, x in pairs)


GENERIC = OpRule("generic", generic)
