"""Products z = B(a, b) of two active operands."""

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp

from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.inner import dots, where_moved
from partnewton.engines.adjoint.lowerings.products import repeating
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.primitives.linear import jets_of
from partnewton.engines.adjoint.properties import is_bilinear
from partnewton.engines.adjoint.rows import on_common_rows
from partnewton.engines.adjoint.tangent import Jet, Tangent, add
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Equation

__all__ = ["BILINEAR", "is_product"]


def is_product(equation: Equation, active: Collection[int]) -> bool:
    """Whether an equation is a product of two different variables, both active.

    Entrywise products of real numbers do not count: they are elementwise functions.
    """
    if not is_bilinear(equation) or len(active) < 2:
        return False
    left, right = equation.invars
    dtype = equation.outvars[0].aval.dtype
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return left is not right and (is_complex or equation.primitive.name != "mul")


def bilinear(
    op: Op,
    primals: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = B(a, b), bilinear.

    zdot = B(adot, b) + B(a, bdot);  zddot = B(addot, b) + 2 B(adot, bdot) + B(a, bddot)
    hessian_st = lambda . (B(adot_s, bdot_t) + B(adot_t, bdot_s))
    third_s    = 3 lambda . (B(addot_s, bdot_s) + B(adot_s, bddot_s))
    """
    product = _Product(op, primals, *cotangents)
    (a, aa), (b, bb) = jets
    zdot, zddot = product.jvp(a, b), product.jvp(aa, bb)
    terms = product.hessian_terms(a, b)
    if request.third_order:
        cross = product.of_rows(product.function, a, b)
        zddot = add(zddot, cross, cross)
        terms += product.third_terms(aa, b) + product.third_terms(a, bb)
    return jets_of(op, [zdot], [zddot]), terms


class _Product:
    """A product at a point."""

    def __init__(self, op: Op, primals: Sequence[jax.Array], cotangent: jax.Array):
        by_rows, self.takes_rows = lowerings.function_of_rows(op)
        self.function = op.function_of_active(primals, function=by_rows)
        transposable = lowerings.transposable(op)
        self.transposable = op.function_of_active(primals, function=transposable)
        self.at = op.take_active(primals)
        self.cotangent = cotangent
        self.is_guarded = op.is_guarded

    def of_rows(self, function: Callable, *x: Tangent | None) -> Tangent | None:
        return on_common_rows(function, *x, takes_rows=self.takes_rows)

    def jvp(self, a: Tangent | None, b: Tangent | None) -> Tangent | None:
        """B(adot, b) + B(a, bdot)."""
        x, y = self.at
        return add(
            self.of_rows(lambda row: self.function(row, y), a),
            self.of_rows(lambda row: self.function(x, row), b),
        )

    def hessian_terms(self, a: Tangent | None, b: Tangent | None) -> Terms:
        """2 lambda . B(adot_s, bdot_t), of which the symmetric part is used.

        The vector-Jacobian products are those of the operand with fewer rows, which
        usually is a weight.
        """
        if a is None or b is None:
            return Terms()
        if b.span.count <= a.span.count:
            return Terms.of_hessian(self.vjp(b, 1, a), a, factor=2.0)
        return Terms.of_hessian(self.vjp(a, 0, b), b, factor=2.0)

    def vjp(self, tangent: Tangent, n: int, other: Tangent) -> Tangent:
        """B(., bdot)' lambda for n = 1, and B(adot, .)' lambda for n = 0."""

        def pull(x: jax.Array, cotangent: jax.Array) -> jax.Array:
            def of_other(y: jax.Array) -> jax.Array:
                return self.transposable(*([x, y] if n == 0 else [y, x]))[0]

            return jax.linear_transpose(of_other, self.at[1 - n])(cotangent)[0]

        if self.takes_rows:
            pull = repeating(pull, (self.at[n].ndim, self.cotangent.ndim))
        found = self.of_rows(lambda row: [pull(row, self.cotangent)], tangent)
        if self.is_guarded:
            return Tangent(where_moved(found.values, other), found.start)
        return found

    def third_terms(self, x: Tangent | None, y: Tangent | None) -> Terms:
        """3 lambda . B(x_s, y_s)."""
        cross = self.of_rows(self.function, x, y)
        if cross is None:
            return Terms()
        values = dots(cross.values, self.cotangent, is_guarded=self.is_guarded)
        return Terms.of_third(cross.span, values, factor=3.0)


BILINEAR = OpRule("bilinear", bilinear)
