"""Elementwise functions of up to three inputs, whose derivatives are arrays."""

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint import lowerings
from partnewton.engines.adjoint.graph import depends_on
from partnewton.engines.adjoint.inner import guarded_product, where_moved, widened
from partnewton.engines.adjoint.op import Op, OpRule, Request
from partnewton.engines.adjoint.primitives.linear import jets_of
from partnewton.engines.adjoint.properties import is_elementwise
from partnewton.engines.adjoint.registry import register_elementwise
from partnewton.engines.adjoint.rows import on_common_rows
from partnewton.engines.adjoint.tangent import (
    Jet,
    Tangent,
    add,
    common_rows,
    sums_by_span,
)
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Equation, Variable

__all__ = ["ELEMENTWISE", "is_real_function"]

# There is a partial derivative for each pair and each triple of inputs.
_MOST_INPUTS = 3

# fmt: off
register_elementwise(
    "abs", "add", "add_any", "and", "asinh", "atan", "bessel_i0e", "bessel_i1e", "ceil",
    "clamp", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "eq",
    "erf", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "is_finite", "le",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "one_minus_square", "or", "polynomial", "reduce_precision", "rem", "round",
    "select_n", "sign", "sin", "sinh", "square", "stop_gradient", "sub", "tanh", "xor",
)
register_elementwise(
    "atan2", "cbrt", "digamma", "div", "integer_pow", "lgamma", "log", "log1p", "log2",
    "pow", "rsqrt", "sqrt",
    singular="zero",
)
# fmt: on
register_elementwise(
    "acos", "acosh", "asin", "atanh", "erf_inv", "tan", singular="elsewhere"
)

# Partial derivatives by the positions of their inputs, in ascending order. Missing ones
# are zero.
Partials = dict[tuple[int, ...], jax.Array]


def is_real_function(
    equations: Sequence[Equation],
    active_inputs: Sequence[Variable],
    active: Collection[Variable],
) -> bool:
    """Whether equations form one elementwise function of a few real inputs."""
    written = [v.aval for e in equations for v in e.outvars if v in active]
    read = [v.aval for v in active_inputs]
    ndim = written[0].ndim
    return (
        all(is_elementwise(e) for e in equations)
        and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (*read, *written))
        and len({x.shape for x in written}) == 1
        and all(x.ndim in (0, ndim) for x in read)
        and len(read) <= _MOST_INPUTS
    )


def elementwise(
    op: Op,
    primals: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    jets: Sequence[Jet],
    request: Request,
) -> tuple[list[Jet], Terms]:
    """z = f(x_1, x_2, ...) entry by entry.

    With partial derivatives f_i, f_ij, f_ijk, and summed over all i, j and k,

    zdot = f_i xdot_i;  zddot = f_ij xdot_i xdot_j + f_i xddot_i
    hessian_st = sum(lambda f_ij xdot_i,s xdot_j,t)
    third_s    = sum(lambda f_ijk xdot_i xdot_j xdot_k + 3 lambda f_ij xdot_i xddot_j)
    """
    order = 3 if request.third_order else 2
    partials = _partials(op.function_of_active(primals), op.take_active(primals), order)
    weights = _weighted_by(cotangents, partials, op.is_guarded or op.has_mask)
    first, second = zip(*jets, strict=True)
    contracted = functools.partial(_contracted, is_guarded=op.is_guarded)

    zdot, zddot = [], []
    for f, cotangent in zip(partials, cotangents, strict=True):
        cast = operator.methodcaller("astype", cotangent.dtype)
        bent = contracted(f, first, first) if request.third_order else []
        zdot.append(jax.tree.map(cast, add(*contracted(f, first))))
        zddot.append(jax.tree.map(cast, add(*bent, *contracted(f, second))))

    terms = _hessian_terms(op, weights, first)
    if request.third_order:
        cross = contracted(weights, first, second)
        cross = [Tangent(3 * x.values, x.start) for x in cross]
        for x in sums_by_span([*contracted(weights, first, first, first), *cross]):
            total = lowerings.sum_over(x.values, tuple(range(1, x.values.ndim)))
            terms += Terms.of_third(x.span, total)
    return jets_of(op, zdot, zddot), terms


def _partials(
    function: Callable, at: Sequence[jax.Array], order: int
) -> list[Partials]:
    """The partial derivatives of each output, in float32 or wider."""
    found: list[Partials] = []
    front = {(): (function, None)}
    for _ in range(order):
        derivatives = {}
        for places, (f, jaxpr) in front.items():
            for i in range(places[-1] if places else 0, len(at)):
                if jaxpr is None or depends_on(jaxpr, i):
                    derivative = compat.traced(_partial_derivative(f, i), *at)
                    derivatives[*places, i] = derivative
        front = derivatives
        for places, (f, _) in front.items():
            columns = f(*at)
            found = found or [{} for _ in columns]
            for partials, x in zip(found, columns, strict=True):
                partials[places] = widened(x)
    return found


def _partial_derivative(function: Callable, place: int) -> Callable:
    def derivative(*x: jax.Array) -> list[jax.Array]:
        def of_one(y: jax.Array) -> list[jax.Array]:
            return function(*x[:place], y, *x[place + 1 :])

        return jax.jvp(of_one, (x[place],), (jnp.ones_like(x[place]),))[1]

    return derivative


def _weighted_by(
    cotangents: Sequence[jax.Array], partials: Sequence[Partials], is_guarded: bool
) -> Partials:
    """lambda . f_ij and lambda . f_ijk, the sums over all outputs."""
    weights: Partials = {}
    for f, cotangent in zip(partials, cotangents, strict=True):
        for places, x in f.items():
            if len(places) > 1:
                term = guarded_product(widened(cotangent), x, is_guarded)
                weights[places] = weights[places] + term if places in weights else term
    return weights


def _contracted(
    partials: Partials, *columns: Sequence[Tangent | None], is_guarded: bool
) -> list[Tangent]:
    """The sum of f_ij.. v_i w_j .. for columns v, w, .., one tangent for each span."""
    terms = []
    for places in itertools.product(range(len(columns[0])), repeat=len(columns)):
        term = partials.get(tuple(sorted(places)))
        if term is None:
            continue
        pairs = zip(columns, places, strict=True)
        span, rows = common_rows(*(column[i] for column, i in pairs))
        if span is not None:
            axes = tuple(range(1, 1 + term.ndim))
            for x in map(widened, rows):
                x = jnp.expand_dims(x, axes) if x.ndim == 1 else x  # of a scalar
                term = guarded_product(term, x, is_guarded)
            terms.append(Tangent(term, span.start))
    return sums_by_span(terms)


def _hessian_terms(op: Op, weights: Partials, first: Sequence[Tangent | None]) -> Terms:
    terms = Terms()
    for places, weight in weights.items():
        if len(places) > 2 or any(first[i] is None for i in places):
            continue
        x, y = (first[i] for i in places)
        if op.is_guarded:
            weight = where_moved(weight, x, y)
        factor = 1.0 if places[0] == places[1] else 2.0
        terms += _gram_terms(x, y, weight, factor)
    return terms


def _gram_terms(x: Tangent, y: Tangent, weight: jax.Array, factor: float) -> Terms:
    """The weighted inner products of the rows of x and y.

    If one of them has axes of length 1, as the mean in ``x - mean``, the weighted rows
    of the other one are summed over these axes before.
    """
    of_x, of_y = x.values.shape[1:], y.values.shape[1:]
    if of_x == of_y:
        weight = _summed_to(of_x, weight)
        return Terms.of_hessian(x, y, weight=weight, factor=factor)
    if np.prod(of_x) < np.prod(of_y):
        x, y, of_y = y, x, of_x

    def summed(v: jax.Array) -> list[jax.Array]:
        return [_summed_to(of_y, weight * widened(v))]

    return Terms.of_hessian(on_common_rows(summed, x), y, factor=factor)


def _summed_to(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The sum over the axes along which an array of this shape is broadcast."""
    if not shape:
        return jnp.sum(x)
    pairs = enumerate(zip(shape, x.shape, strict=True))
    axes = tuple(n for n, (length, longer) in pairs if length != longer)
    return lowerings.sum_over(x, axes).reshape(shape) if axes else x


ELEMENTWISE = OpRule("elementwise", elementwise)
