"""How tangents pass a step, and what the step adds to the derivatives of the loss.

Write z = f(x) for a step, xdot_s for the tangent of its input when subset s moves,
xddot_s for the second derivative of its input along s, and lambda for the adjoint of
its output, dL/dz. A rule returns

    zdot_s  = Df[xdot_s]
    zddot_s = D2f[xdot_s, xdot_s] + Df[xddot_s]

and adds to the sums over all steps

    hessian_st += lambda . D2f[xdot_s, xdot_t]
    third_s    += lambda . (D3f[xdot_s, xdot_s, xdot_s] + 3 D2f[xdot_s, xddot_s]).

`local` does so for any function, by way of jax; all other rules are there for speed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partnewton._strictness import at_least_float32
from partnewton.engines import products, reductions, versions
from partnewton.engines.program import Step, varies
from partnewton.engines.rows import Rows, add, apply, map_rows, runs, taken

__all__ = ["RULES", "Sums", "Tangents", "dots", "where_moved"]

# For the inner products of long rows on a CPU.
_BEYOND_CACHE = 2**23  # numbers
_BLOCK = 2**10  # numbers of each row
_MANY_ROWS = 8  # with fewer, each is read but a few times


class Tangents(NamedTuple):
    """The tangents of some values, of first and second order; None for none at all.

    Attributes:
      first: xdot of each.
      second: xddot of each; all None where no third order is asked for.
    """

    first: Sequence[Rows | None]
    second: Sequence[Rows | None]


@dataclasses.dataclass(frozen=True)
class _Block:
    """Inner products, by subsets.

    Attributes:
      subsets: those of each axis.
      factor: what they are multiplied by.
      values: all in one axis.
    """

    subsets: tuple[tuple[int, ...], ...]
    factor: float
    values: jax.Array

    def places(self, shape: tuple[int, ...]) -> np.ndarray:
        """Where they are in an array of this shape, as one axis."""
        places = np.ravel_multi_index(np.ix_(*self.subsets), shape)
        return places.astype(np.int32).ravel()


jax.tree_util.register_dataclass(
    _Block, data_fields=["values"], meta_fields=["subsets", "factor"]
)


@dataclasses.dataclass
class Sums:
    """The sums over all steps, S x S and S.

    What steps add is kept as it is and put in its place at the end, all at once.

    Attributes:
      size: S.
      dtype: of the sums.
      third_order: whether the sums of third order are asked for.
      hessian, third: what was added.
    """

    size: int
    dtype: np.dtype
    third_order: bool
    hessian: list[_Block] = dataclasses.field(default_factory=list)
    third: list[_Block] = dataclasses.field(default_factory=list)

    def add_hessian(
        self,
        left: Rows,
        right: Rows,
        *,
        weight: jax.Array | None = None,
        factor: float = 1.0,
    ) -> None:
        """Adds the inner products of some rows, whose symmetric part will count."""
        products = self.everywhere(gram(left.values, right.values, weight))
        subsets = left.subsets, right.subsets
        self.hessian.append(_Block(subsets, factor, products.ravel()))

    def add_third(
        self, subsets: tuple[int, ...], values: jax.Array, *, factor: float = 1.0
    ) -> None:
        """Adds a number to each of some subsets."""
        self.third.append(_Block((subsets,), factor, self.everywhere(values)))

    def add_totals(self, hessian: jax.Array, third: jax.Array) -> None:
        """Adds sums over all subsets, from the inside of a loop."""
        everyone = tuple(range(self.size))
        self.hessian.append(_Block((everyone, everyone), 1.0, hessian.ravel()))
        self.third.append(_Block((everyone,), 1.0, third))

    def empty(self) -> "Sums":
        """Sums of the same kind to which nothing was added."""
        return Sums(self.size, self.dtype, self.third_order)

    def extend(self, other: "Sums") -> None:
        """Adds what was added to others."""
        self.hessian.extend(other.hessian)
        self.third.extend(other.third)

    def placed(self, rows: Rows) -> jax.Array:
        """Rows of scalars as an array (S,)."""
        values = rows.values.real.astype(self.dtype)
        return self._total([_Block((rows.subsets,), 1.0, values)], (self.size,))

    def totals(self) -> tuple[jax.Array, jax.Array]:
        """The hessian (S, S), of which the symmetric part counts, and third (S,)."""
        return (
            self._total(self.hessian, (self.size, self.size)),
            self._total(self.third, (self.size,)),
        )

    def _total(self, blocks: list[_Block], shape: tuple[int, ...]) -> jax.Array:
        total = jnp.zeros(math.prod(shape), self.dtype)
        for factor in sorted({block.factor for block in blocks}):
            some = [block for block in blocks if block.factor == factor]
            places = np.concatenate([block.places(shape) for block in some])
            values = jnp.concatenate([block.values for block in some])
            total = total.at[places].add(factor * values, mode="promise_in_bounds")
        return total.reshape(shape)

    def everywhere(self, x: jax.Array) -> jax.Array:
        """The sum over the devices of a `shard_map`, as far as they have their own."""
        axes = versions.varying_axes(x)
        return (jax.lax.psum(x, axes) if axes else x).astype(self.dtype)


jax.tree_util.register_dataclass(
    Sums,
    data_fields=["hessian", "third"],
    meta_fields=["size", "dtype", "third_order"],
)


def gram(a: jax.Array, b: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The inner products of rows, (r, *shape) x (c, *shape) -> (r, c), in real numbers.

    Tangents pair with adjoints without conjugation, as in jax's transposition.

    Args:
      a, b: the rows.
      weight: what the terms of each inner product are multiplied by, (*shape).
    """
    dtype = _wide_dtype(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    if versions.may_be_sharded(a, b):
        # To join axes that are sharded would be to gather them.
        a = a if weight is None else weight * a
        explicit = versions.is_explicit(a) or versions.is_explicit(b)
        kwargs = {"out_sharding": jax.P(None, None)} if explicit else {}
        return _inner(a, b, **kwargs).real
    # One contracted axis: with more, some backends take a much slower way.
    operands = [a.reshape(len(a), -1), b.reshape(len(b), -1)]
    if weight is not None:
        operands.append(weight.astype(dtype).reshape(1, -1))
    if min(len(a), len(b)) < _MANY_ROWS or a.size + b.size < _BEYOND_CACHE:
        return _weighted(*operands).real
    return jax.lax.platform_dependent(
        *operands, cpu=_weighted_in_blocks, default=_weighted
    ).real


def _weighted(a: jax.Array, b: jax.Array, *weight: jax.Array) -> jax.Array:
    for w in weight:
        a = w * a
    return _inner(a, b)


def _weighted_in_blocks(a: jax.Array, b: jax.Array, *weight: jax.Array) -> jax.Array:
    """The same, block by block of the long axis: each is read from memory once.

    The matrix product of a CPU reads rows that are far apart again and again.
    """
    count, rest = divmod(a.shape[1], _BLOCK)

    def block(n: jax.typing.ArrayLike, size: int) -> jax.Array:
        return _weighted(
            *(
                jax.lax.dynamic_slice_in_dim(x, n * _BLOCK, size, axis=1)
                for x in (a, b, *weight)
            )
        )

    total = block(0, _BLOCK)
    total = jax.lax.fori_loop(1, count, lambda n, x: x + block(n, _BLOCK), total)
    return total + block(count, rest) if rest else total


def _inner(a: jax.Array, b: jax.Array, **kwargs: Any) -> jax.Array:
    axes = tuple(range(1, a.ndim))
    return jax.lax.dot_general(
        a,
        b,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=a.dtype,
        **kwargs,
    )


def dots(a: jax.Array, b: jax.Array, *, is_guarded: bool = False) -> jax.Array:
    """The inner products of rows with rows of the same place, (r, *shape) -> (r,).

    Where `is_guarded`, zero times infinity is zero.
    """
    dtype = _wide_dtype(a, b)
    return _total_of_each(_product(a.astype(dtype), b.astype(dtype), is_guarded).real)


def _product(a: jax.Array, b: jax.Array, is_guarded: bool) -> jax.Array:
    """The product; if guarded, zero times anything is zero, even infinity."""
    product = a * b
    if not is_guarded:
        return product
    return jnp.where((a == 0) | (b == 0), jnp.zeros_like(product), product)


def where_moved(x: jax.Array, *rows: Rows | None) -> jax.Array:
    """x, but zero at the entries that some of the tangents leave where they are."""
    for some in rows:
        if some is not None:
            x = jnp.where(jnp.any(some.values != 0, axis=0), x, jnp.zeros_like(x))
    return x


def _total_of_each(rows: jax.Array) -> jax.Array:
    """The sum of all entries of each row, (r, *shape) -> (r,)."""
    return reductions.total(rows, tuple(range(1, rows.ndim)))


Rule = Callable[
    [Step, Sequence[jax.Array], Sequence[jax.Array], Tangents, Sums], Tangents
]


# --- Linear operations -----------------------------------------------------------


def linear(
    step: Step,
    inputs: Sequence[jax.Array],
    adjoints: Sequence[jax.Array],
    tangents: Tangents,
    sums: Sums,
) -> Tangents:
    """z = A x: zdot = A xdot, and nothing is added."""
    del adjoints, sums
    function = step.active(step.function_of_rows, inputs)
    active = [inputs[i] for i in step.active_inputs]

    def of_members(members: tuple[int, ...]) -> Callable:
        def of(*tangents: jax.Array) -> list[jax.Array]:
            everything = [jnp.zeros_like(x) for x in active]
            for i, x in zip(members, tangents, strict=True):
                everything[i] = x
            return function(*everything)

        return of

    def push(rows: Sequence[Rows | None]) -> list[Rows] | None:
        return map_rows(of_members, rows, takes_rows=step.takes_rows)

    return _each_order(step, push, tangents)


def piecewise_linear(
    step: Step,
    inputs: Sequence[jax.Array],
    adjoints: Sequence[jax.Array],
    tangents: Tangents,
    sums: Sums,
) -> Tangents:
    """z = f(x) with f linear around x: zdot = Df xdot, and nothing is added."""
    del adjoints, sums
    return _each_order(step, lambda rows: _pushed(step, inputs, rows), tangents)


def _each_order(
    step: Step, push: Callable[[Sequence], list[Rows] | None], tangents: Tangents
) -> Tangents:
    nothing = [None] * len(step.active_outputs)
    return Tangents(push(tangents.first) or nothing, push(tangents.second) or nothing)


def _pushed(
    step: Step, inputs: Sequence[jax.Array], rows: Sequence[Rows | None]
) -> list[Rows] | None:
    """Df applied to all rows."""

    def of_members(members: tuple[int, ...]) -> Callable:
        function, active = _restricted(step, inputs, members)
        return _pushforward(function, active)

    return map_rows(of_members, rows)


def _restricted(
    step: Step, inputs: Sequence[jax.Array], members: Sequence[int]
) -> tuple[Callable, list[jax.Array]]:
    """The step as a function of some of its active inputs, and their values."""
    function = step.active(step.function, inputs)
    active = [inputs[i] for i in step.active_inputs]

    def restricted(*some: jax.Array) -> list[jax.Array]:
        everything = list(active)
        for i, x in zip(members, some, strict=True):
            everything[i] = x
        return function(*everything)

    return restricted, [active[i] for i in members]


# --- Products --------------------------------------------------------------------


def product(
    step: Step,
    inputs: Sequence[jax.Array],
    adjoints: Sequence[jax.Array],
    tangents: Tangents,
    sums: Sums,
) -> Tangents:
    """z = B(a, b), bilinear: all that is not linear is the cross term.

    zdot = B(adot, b) + B(a, bdot);  zddot = B(addot, b) + 2 B(adot, bdot) + B(a, bddot)
    hessian_st += lambda . (B(adot_s, bdot_t) + B(adot_t, bdot_s))
    third_s    += 3 lambda . (B(addot_s, bdot_s) + B(adot_s, bddot_s))
    """
    function = step.active(step.function_of_rows, inputs)
    to_be_transposed = step.active(step.function_to_be_transposed, inputs)
    at = [inputs[i] for i in step.active_inputs]
    (adjoint,) = adjoints
    how = {"takes_rows": step.takes_rows}

    def with_fixed(members: tuple[int, ...]) -> Callable:
        """B(adot, b), B(a, bdot) or the sum of both."""

        def of(*tangents: jax.Array) -> list[jax.Array]:
            terms = []
            for i, x in zip(members, tangents, strict=True):
                operands = [x, at[1]] if i == 0 else [at[0], x]
                terms.append(function(*operands)[0])
            return [sum(terms[1:], start=terms[0])]

        return of

    def pulled(rows: Rows, i: int) -> Rows:
        """B(., bdot)' lambda for the rows of bdot, or B(adot, .)' lambda."""
        other = 1 - i

        def pull(x: jax.Array, adjoint: jax.Array) -> jax.Array:
            def of_other(y: jax.Array) -> jax.Array:
                return to_be_transposed(*([x, y] if i == 0 else [y, x]))[0]

            return jax.linear_transpose(of_other, at[other])(adjoint)[0]

        if step.takes_rows:
            pull = products.repeating(pull, (at[i].ndim, adjoint.ndim))
        (values,) = apply(lambda x: [pull(x, adjoint)], rows.values, **how)
        if step.is_guarded:
            values = where_moved(values, tangents.first[i - 1])
        return Rows(rows.subsets, values)

    def crossed(x: Rows, y: Rows) -> Rows | None:
        """B(x_s, y_s) on the subsets of both."""
        common = tuple(s for s in x.subsets if s in y.subsets)
        if not common:
            return None
        (values,) = apply(function, taken(x, common), taken(y, common), **how)
        return Rows(common, values)

    def add_third(rows: Rows | None) -> None:
        if rows is not None:
            weights = jnp.broadcast_to(adjoint, rows.values.shape)
            values = dots(rows.values, weights, is_guarded=step.is_guarded)
            sums.add_third(rows.subsets, values, factor=3.0)

    (a, b), (aa, bb) = tangents
    first = map_rows(with_fixed, [a, b], **how)
    cross = None
    if a is not None and b is not None:
        # The symmetric part counts, hence the factor 2. The side with fewer rows, a
        # weight as a rule, meets the adjoint.
        if len(b.subsets) <= len(a.subsets):
            sums.add_hessian(pulled(b, 1), a, factor=2.0)
        else:
            sums.add_hessian(pulled(a, 0), b, factor=2.0)
        if sums.third_order:
            cross = crossed(a, b)
    second = map_rows(with_fixed, [aa, bb], **how)
    if cross is not None:
        doubled = Rows(cross.subsets, 2 * cross.values)
        second = [add(second[0] if second else None, doubled)]
    if aa is not None and b is not None:
        add_third(crossed(aa, b))
    if a is not None and bb is not None:
        add_third(crossed(a, bb))
    return Tangents(first or [None], second or [None])


# --- Elementwise functions ---------------------------------------------------------

# Arrays by the places of the inputs that they are derivatives by, ascending; what is
# missing is zero.
Partials = dict[tuple[int, ...], jax.Array]


def elementwise(
    step: Step,
    inputs: Sequence[jax.Array],
    adjoints: Sequence[jax.Array],
    tangents: Tangents,
    sums: Sums,
) -> Tangents:
    """z = f(x_1, x_2, ...) entry by entry: all derivatives are weights.

    With partial derivatives f_i, f_ij, f_ijk, and summed over all i, j and k,

    zdot = f_i xdot_i;  zddot = f_ij xdot_i xdot_j + f_i xddot_i
    hessian_st += sum(lambda f_ij xdot_i,s xdot_j,t)
    third_s    += sum(lambda f_ijk xdot_i xdot_j xdot_k + 3 lambda f_ij xdot_i xddot_j)
    """
    at = [inputs[i] for i in step.active_inputs]
    function = step.active(step.function, inputs)
    partials = _partials(function, at, order=3 if sums.third_order else 2)
    along = functools.partial(_along, is_guarded=step.is_guarded)
    weights: Partials = {}  # lambda . f_ij and lambda . f_ijk
    for f, adjoint in zip(partials, adjoints, strict=True):
        for places, x in f.items():
            if len(places) > 1:
                is_guarded = step.is_guarded or step.has_mask
                term = _product(_wide(adjoint), x, is_guarded)
                weights[places] = weights[places] + term if places in weights else term
    first, second = tangents

    bends = [places for places in weights if len(places) == 2]
    for i, j in bends:
        if first[i] is not None and first[j] is not None:
            weight = weights[i, j]
            if step.is_guarded:
                weight = where_moved(weight, first[i], first[j])
            _add_weighted(sums, first[i], first[j], weight, is_cross=i != j)

    zeros = [jnp.zeros_like(adjoint) for adjoint in adjoints]

    def of_first(members: tuple[int, ...]) -> Callable:
        def of(*v: jax.Array) -> list[jax.Array]:
            xdot = dict(zip(members, map(_wide, v), strict=True))
            zdot = [along(f, [xdot]) for f in partials]
            return _like(zeros, zdot)

        return of

    def of_both(members: tuple[int, ...]) -> Callable:
        def of(*v: jax.Array) -> list[jax.Array]:
            moved = dict(zip(members, map(_wide, v), strict=True))
            xdot = {i: x for i, x in moved.items() if i < len(at)}
            xddot = {i - len(at): x for i, x in moved.items() if i >= len(at)}
            zddot = [along(f, [xdot, xdot]) + along(f, [xddot]) for f in partials]
            third = along(weights, [xdot, xdot, xdot])
            third += 3 * along(weights, [xdot, xddot])
            return _like([*zeros, _wide(zeros[0])], [*zddot, third])

        return of

    passed = [map_rows(of_first, first), None]
    if bends and sums.third_order:
        found = map_rows(of_both, [*first, *second])
        if found:
            *passed[1], third = found
            sums.add_third(third.subsets, _total_of_each(third.values))
    else:
        passed[1] = map_rows(of_first, second)
    nothing = [None] * len(zeros)
    return Tangents(*(x or nothing for x in passed))


def _partials(
    function: Callable, at: Sequence[jax.Array], order: int
) -> list[Partials]:
    """The partial derivatives of each output, in float32 at least."""
    found: list[Partials] = []
    front = {(): (function, None)}
    for _ in range(order):
        derivatives = {}
        for places, (f, jaxpr) in front.items():
            for i in range(places[-1] if places else 0, len(at)):
                if jaxpr is None or varies(jaxpr, i):
                    derivative = versions.traced(_derivative(f, i), *at)
                    derivatives[*places, i] = derivative
        front = derivatives
        for places, (f, _) in front.items():
            columns = f(*at)
            found = found or [{} for _ in columns]
            for partials, x in zip(found, columns, strict=True):
                partials[places] = _wide(x)
    return found


def _derivative(function: Callable, place: int) -> Callable:
    def derivative(*x: jax.Array) -> list[jax.Array]:
        def of_one(y: jax.Array) -> list[jax.Array]:
            return function(*x[:place], y, *x[place + 1 :])

        return jax.jvp(of_one, (x[place],), (jnp.ones_like(x[place]),))[1]

    return derivative


def _along(
    partials: Partials,
    directions: Sequence[dict[int, jax.Array]],
    is_guarded: bool,
) -> Any:
    """The sum of f_ij.. v_i w_j .. for the directions v, w, .. by place."""
    total = 0.0
    for places in itertools.product(*directions):
        term = partials.get(tuple(sorted(places)))
        if term is not None:
            for v, i in zip(directions, places, strict=True):
                term = _product(term, v[i], is_guarded)
            total = total + term
    return total


def _add_weighted(
    sums: Sums, x: Rows, y: Rows, weight: jax.Array, *, is_cross: bool
) -> None:
    """Adds the inner products of x and y, each of which may be of fewer entries.

    One that has axes of length 1 where `weight` is longer, as the mean has in
    ``x - mean``, meets the sum over these axes.
    """
    factor = 2.0 if is_cross else 1.0
    of_x, of_y = x.values.shape[1:], y.values.shape[1:]
    if of_x == of_y:
        sums.add_hessian(x, y, weight=_summed_to(of_x, weight), factor=factor)
        return
    if np.prod(of_x) < np.prod(of_y):
        x, y, of_y = y, x, of_x

    def meets(v: jax.Array) -> list[jax.Array]:
        return [_summed_to(of_y, weight * _wide(v))]

    (met,) = apply(meets, x.values)
    sums.add_hessian(Rows(x.subsets, met), y, factor=factor)


def _summed_to(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The sum over the axes that an array of this shape would be spread over."""
    if not shape:
        return jnp.sum(x)
    pairs = enumerate(zip(shape, x.shape, strict=True))
    axes = tuple(n for n, (length, longer) in pairs if length != longer)
    return reductions.total(x, axes).reshape(shape) if axes else x


def _like(zeros: Sequence[jax.Array], values: Sequence[Any]) -> list[jax.Array]:
    """Sums of no terms, the number 0, become arrays; all get their types."""
    return [
        zero if isinstance(x, float) else x.astype(zero.dtype)
        for zero, x in zip(zeros, values, strict=True)
    ]


def _wide(x: jax.Array) -> jax.Array:
    """In float32 at least."""
    return x.astype(_wide_dtype(x))


def _wide_dtype(*arrays: jax.Array) -> np.dtype:
    """The common dtype of some arrays, float32 at least; float8 has no other."""
    wide = [jnp.float32 if x.dtype.itemsize == 1 else x.dtype for x in arrays]
    return at_least_float32(*wide)


# --- Any function ------------------------------------------------------------------


def local(
    step: Step,
    inputs: Sequence[jax.Array],
    adjoints: Sequence[jax.Array],
    tangents: Tangents,
    sums: Sums,
) -> Tangents:
    """z = f(x1, x2, ...) for any f that jax can differentiate.

    With F(x) = lambda . f(x), hessian_st += <xdot_s, D2F xdot_t>, from the derivative
    of the gradient of F along each tangent.
    """
    nothing = [None] * len(step.active_outputs)
    if all(rows is None for rows in tangents.first):
        return Tangents(nothing, nothing)
    active = [inputs[i] for i in step.active_inputs]
    function = step.active(step.function, inputs)

    def gradient(*x: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(function, *x)
        return pull(list(adjoints))

    def linearized(function: Callable) -> Callable[[tuple[int, ...]], Callable]:
        """Its derivative along some of the operands, linearised once for all."""
        _, push = jax.linearize(function, *active)

        def of_members(members: tuple[int, ...]) -> Callable:
            def of(*some: jax.Array) -> Sequence[jax.Array]:
                everything = list(map(jnp.zeros_like, active))
                for i, x in zip(members, some, strict=True):
                    everything[i] = x
                return push(*everything)

            return of

        return of_members

    push, turn = linearized(function), linearized(gradient)
    first, second = (map_rows(push, rows) for rows in tangents)
    bends: list[list[Rows]] = []
    for subsets, members in runs(tangents.first):
        columns = [taken(tangents.first[i], subsets) for i in members]
        turned = apply(turn(members), *columns)
        for rows, w in zip(tangents.first, turned, strict=True):
            if rows is not None:
                sums.add_hessian(Rows(subsets, where_moved(w, rows)), rows)
        if not sums.third_order:
            continue
        for rows, w in zip(tangents.second, turned, strict=True):
            common = [s for s in subsets if rows is not None and s in rows.subsets]
            if common:
                w, v = taken(Rows(subsets, w), common), taken(rows, common)
                values = dots(w, v, is_guarded=True)
                sums.add_third(tuple(common), values, factor=3.0)
        curve = _curve(*_restricted(step, inputs, members))
        second_derivatives, third_derivatives = _split(apply(curve, *columns))
        bends.append([Rows(subsets, x) for x in second_derivatives])
        sums.add_third(
            subsets,
            sum(
                dots(x, jnp.broadcast_to(a, x.shape), is_guarded=True)
                for a, x in zip(adjoints, third_derivatives, strict=True)
            ),
        )
    columns = [list(column) for column in zip(*bends, strict=True)]
    if second is not None:
        columns = columns or [[] for _ in second]
        for column, rows in zip(columns, second, strict=True):
            column.append(rows)
    return Tangents(first or nothing, [add(*x) for x in columns] or nothing)


def _split(derivatives: list[jax.Array]) -> tuple[list, list]:
    half = len(derivatives) // 2
    return derivatives[:half], derivatives[half:]


def _pushforward(
    function: Callable, at: Sequence[jax.Array]
) -> Callable[..., list[jax.Array]]:
    """v -> Df(at)[v]."""
    return jax.linearize(function, *at)[1]


def _curve(function: Callable, at: Sequence[jax.Array]) -> Callable:
    """v -> (D2f(at)[v, v], ..., D3f(at)[v, v, v], ...), all outputs in a row."""

    def along(f: Callable, v: Sequence[jax.Array]) -> Callable:
        return lambda *x: jax.jvp(f, x, v)

    def curve(*v: jax.Array) -> list[jax.Array]:
        def d1(*x: jax.Array) -> list[jax.Array]:
            return jax.jvp(function, x, v)[1]

        def d2(*x: jax.Array) -> list[jax.Array]:
            return along(d1, v)(*x)[1]

        second, third = along(d2, v)(*at)
        return [*second, *third]

    return curve


RULES: dict[str, Rule] = {
    "affine": piecewise_linear,
    "elementwise": elementwise,
    "linear": linear,
    "local": local,
    "piecewise_linear": piecewise_linear,
    "product": product,
}
