"""Operations without a rule of their own, differentiated by jax."""

from collections.abc import Callable, Sequence

import jax

from partnewton.engines.adjoint.inner import dots, where_moved
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.primitives.linear import jets_of, linearized
from partnewton.engines.adjoint.rows import apply, group_by_support, push
from partnewton.engines.adjoint.tangent import Jet, Tangent, add, common_rows, restrict
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
    first, second = zip(*jets, strict=True)
    terms = Terms()
    bent: list[list[Tangent]] = [[] for _ in op.active_outputs]  # D2f[xdot, xdot]
    for span, members in group_by_support(first):
        columns = [restrict(first[n], span) for n in members]
        products = [Tangent(x, span.start) for x in apply(hvp(members), *columns)]
        terms += _hessian_terms(products, first)
        if request.third_order:
            terms += _cross_third(products, second)
            at = [active[n] for n in members]
            along = _derivatives_along(op.function_of_active(primals, members), at)
            found = apply(along, *columns)
            d2, d3 = found[: len(bent)], found[len(bent) :]
            for column, x in zip(bent, d2, strict=True):
                column.append(Tangent(x, span.start))
            pairs = zip(d3, cotangents, strict=True)
            values = sum(dots(x, cotangent, is_guarded=True) for x, cotangent in pairs)
            terms += Terms.of_third(span, values)
    pushed = push(jvp, second) or [None] * len(bent)
    second = [add(*column, x) for column, x in zip(bent, pushed, strict=True)]
    return jets_of(op, push(jvp, first), second), terms


def _hessian_terms(products: Sequence[Tangent], first: Sequence) -> Terms:
    """<xdot_s, D2F xdot_t> for the subsets t of the products."""
    terms = Terms()
    for x, product in zip(first, products, strict=True):
        if x is not None:
            left = Tangent(where_moved(product.values, x), product.start)
            terms += Terms.of_hessian(left, x)
    return terms


def _cross_third(products: Sequence[Tangent], second: Sequence) -> Terms:
    """3 <xddot_s, D2F xdot_s> for the subsets s of the products."""
    terms = Terms()
    for x, product in zip(second, products, strict=True):
        span, rows = common_rows(product, x)
        if span is not None:
            terms += Terms.of_third(span, dots(*rows, is_guarded=True), factor=3.0)
    return terms


def _derivatives_along(function: Callable, at: Sequence[jax.Array]) -> Callable:
    """v -> [*D2f(at)[v, v], *D3f(at)[v, v, v]], each with all outputs of f."""

    def derivatives(*v: jax.Array) -> list[jax.Array]:
        def along(f: Callable) -> Callable:
            return lambda *x: jax.jvp(f, x, v)[1]

        second, third = jax.jvp(along(along(function)), tuple(at), v)
        return [*second, *third]

    return derivatives


GENERIC = OpRule("generic", generic)
