"""The fast engine: local second derivatives against one adjoint.

Write the loss as a sequence of steps z_k = f_k(inputs of k). With lambda_k = dL/dz_k,
the adjoints of an ordinary gradient, and xdot_s the tangents of the inputs of step k
when subset s moves,

    D2 L[u_s, u_t] = sum_k lambda_k . D2 f_k [xdot_s, xdot_t],

because the adjoint takes up every second-order term but those that a step creates by
itself. So there is no Hessian-vector product, and nothing of the shape of a weight:
values go forwards, adjoints backwards, tangents forwards, and the sums are taken on the
way. Tangents of second order give the diagonal of the third order likewise; see
:mod:`partnewton.engines.rules`.

All of the third order needs only first derivatives of values and of adjoints, by the
"2n + 1 rule": with lambdadot_s the derivative of the adjoints along s,

    D3 L[u_s, u_t, u_r] = sum_k   lambda_k . D3 f_k [xdot_s, xdot_t, xdot_r]
                                + lambdadot_k,s . D2 f_k [xdot_t, xdot_r]
                                + lambdadot_k,t . D2 f_k [xdot_s, xdot_r]
                                + lambdadot_k,r . D2 f_k [xdot_s, xdot_t].
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import jvp_of_grad, nesting, versions
from partnewton.engines.axes import refuse_named_axes
from partnewton.engines.final import Final, sweep_final
from partnewton.engines.program import (
    BranchPoint,
    Loop,
    Program,
    Record,
    Step,
    branch_point_of,
    program_of,
    values_of,
)
from partnewton.engines.rows import Rows, expanded, union
from partnewton.engines.rules import RULES, Sums, Tangents
from partnewton.engines.versions import Variable
from partnewton.partitions import FROZEN, Partition

PyTree = Any
Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]
Moved = dict[Variable, Rows]  # tangents of the variables that have any

_MOST_BYTES = 2**30  # of the tangents that one step writes
_CACHED_BYTES = 2**23  # with fewer, a sweep is compiled as one


def summarize(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    *,
    third_order: bool,
    batch_size: int | None,
) -> tuple[tuple[jax.Array, Any], jax.Array, jax.Array, jax.Array | None]:
    """Value and aux, gradient (S,), hessian (S, S), third (S,) or None."""
    problem = _Problem(loss, leaves, direction, partition)
    try:
        outputs, *sums = _summarize(problem, leaves, third_order, batch_size)
        return problem.value_and_aux(outputs), *sums
    except _ReverseModeError:
        return jvp_of_grad.summarize(
            loss,
            leaves,
            direction,
            partition,
            third_order=third_order,
            batch_size=batch_size,
        )


def _summarize(
    problem: "_Problem", leaves: Leaves, third_order: bool, batch_size: int | None
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array | None]:
    """The outputs of the loss, gradient, hessian and third.

    A `cond` around most of a loss would be one local step, which takes several times as
    long to compile. So each of its branches has a program of its own.
    """
    point = problem.branch_point
    if point is not None:
        branches = [
            functools.partial(
                _summarize, problem.in_branch(i), leaves, third_order, batch_size
            )
            for i in point.branches
        ]
        return jax.lax.switch(point.index(*leaves), branches)

    def compute() -> tuple:
        outputs, *found = problem.linearise(leaves)
        return outputs, *problem.sums(outputs[0], *found, third_order, batch_size)

    return problem.attempted(compute)


def derivative_tensors(
    loss: Loss,
    leaves: Leaves,
    direction: Leaves,
    partition: Partition,
    *,
    order: int,
    batch_size: int | None,
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
    """Value and aux, and the tensors of order 1 to `order`.

    The third order takes one pass for each subset. Beyond it, and where a part of the
    loss is left to jax, the reference engine does the work.
    """
    if order <= 3:
        problem = _Problem(loss, leaves, direction, partition)

        def compute() -> tuple | None:
            if order == 3 and problem.program.final:
                return None
            outputs, *found = problem.linearise(leaves)
            *tensors, _ = problem.sums(outputs[0], *found, False, batch_size)
            if order == 3:
                tensors.append(problem.third_order(leaves, batch_size))
            return problem.value_and_aux(outputs), tuple(tensors[:order])

        with contextlib.suppress(_ReverseModeError):
            found = problem.attempted(compute)
            if found is not None:
                return found
    return jvp_of_grad.derivative_tensors(
        loss, leaves, direction, partition, order=order, batch_size=batch_size
    )


class _StepError(Exception):
    """jax cannot do with a step by itself what its rule asks for."""

    def __init__(self, step: Step):
        self.step = step


class _ReverseModeError(Exception):
    """jax cannot differentiate the loss in reverse mode."""


class _Problem:
    """A loss as a program, and the tangents to start from.

    Inside, subsets are numbered in the order in which the program meets them, so that
    the rows of most values are those up to some number.
    """

    def __init__(
        self, loss: Loss, leaves: Leaves, direction: Leaves, partition: Partition
    ):
        _, self._jaxpr = versions.traced(self._flat(loss), list(leaves))
        refuse_named_axes(self._jaxpr)
        self._opaque: set[int] = set()
        self._branches: dict[int, int] = {}
        self.direction = direction
        self.partition = partition
        self._make_program()

    def _make_program(self) -> None:
        self.program, self.constants = program_of(
            self._jaxpr, self._opaque, self._branches
        )
        self.inputs = self.program.inputs[len(self.constants) :]
        self.order = _order_of_use(self.program, self.inputs, self.partition)
        self.__dict__.pop("_bytes_of_a_row", None)

    @functools.cached_property
    def branch_point(self) -> BranchPoint | None:
        """The `cond` that most of the loss is inside of, if there is one."""
        return branch_point_of(self._jaxpr, self._branches)

    def in_branch(self, number: int) -> "_Problem":
        """The same problem in one of the branches of its branch point."""
        problem = copy.copy(self)
        problem._opaque = set()
        problem._branches = {**self._branches, self.branch_point.place: number}
        problem.__dict__.pop("branch_point")
        problem._make_program()
        return problem

    def attempted(self, compute: Callable[[], Any]) -> Any:
        """The result of a function that goes through the program.

        A step that jax cannot differentiate by itself is left to the final step.
        """
        while True:
            try:
                return compute()
            except _StepError as error:
                self._opaque.update(error.step.places)
                self._make_program()

    def _flat(self, loss: Loss) -> Callable[[Leaves], list[jax.Array]]:
        """The loss as a function to arrays; what else is in aux is kept aside."""

        def flat(leaves: Leaves) -> list[jax.Array]:
            value, aux = loss(leaves)
            parts, self._aux_tree = jax.tree.flatten(aux)
            self._aux = [None if _is_array(x) else x for x in parts]
            return [value, *(x for x in parts if _is_array(x))]

        return flat

    def linearise(
        self, leaves: Leaves
    ) -> tuple[list[jax.Array], Record, dict[int, Any], Final | None]:
        """Two sweeps: outputs, record, adjoints, and the final step."""
        try:
            if self.program.final:
                outputs, record, adjoints, final = self._linearise_with_final(leaves)
            else:
                outputs, record, adjoints = self._linearise(leaves)
                final = None
        except Exception as error:  # jax has no common class for what it refuses
            raise _ReverseModeError from error
        return outputs, record, adjoints, final

    def value_and_aux(self, outputs: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
        """What the loss returns, from the outputs of its program."""
        value, *aux = outputs
        arrays = iter(aux)
        parts = [next(arrays) if x is None else x for x in self._aux]
        return value, jax.tree.unflatten(self._aux_tree, parts)

    def _linearise(
        self, leaves: Leaves
    ) -> tuple[list[jax.Array], Record, dict[int, Any]]:
        def run(taps: dict[int, Any]) -> tuple[jax.Array, tuple]:
            outputs, record = self.program.run([*self.constants, *leaves], taps)
            return outputs[0], (outputs, record)

        adjoints, found = jax.grad(run, has_aux=True)(self.program.taps())
        return *found, adjoints

    def _linearise_with_final(
        self, leaves: Leaves
    ) -> tuple[list[jax.Array], Record, dict[int, Any], Final]:
        program, step = self.program, self.program.final
        values = dict(zip(program.inputs, [*self.constants, *leaves], strict=True))
        moving = [step.inputs[i] for i in step.active_inputs]

        def begin(taps: dict[int, Any]) -> tuple[list[jax.Array], tuple]:
            values, record = program.begin([*self.constants, *leaves], taps)
            handed_on = [values[v] for v in program.handed_on]
            return [values[v] for v in moving], (handed_on, record)

        point, pull, (handed_on, record) = jax.vjp(begin, program.taps(), has_aux=True)
        values.update(zip(program.handed_on, handed_on, strict=True))
        read = values_of(step.inputs, values)

        def function(x: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            everything = list(read)
            for place, y in zip(step.active_inputs, x, strict=True):
                everything[place] = y
            value, *others = step.function(*everything)
            return value, others

        linear = nesting.linearize(function, point)
        (adjoints,) = pull(linear.gradient)
        values.update(zip(step.outputs, (linear.value, *linear.aux), strict=True))
        final = Final(step, function, point, linear)
        return program.end(values), record, adjoints, final

    def sums(
        self,
        value: jax.Array,
        record: Record,
        adjoints: dict[int, Any],
        final: Final | None,
        third_order: bool,
        batch_size: int | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Gradient, hessian and third, by as many sweeps as the memory asks for.

        Two subsets meet only if their tangents are there at the same time. So subsets
        come in blocks, each block with each other one.
        """
        S, dtype = self.partition.size, self.partition.dtype
        shapes = [(S,), (S, S), (S,)]
        found = [jnp.zeros(shape, dtype) for shape in shapes]
        known = [np.zeros(shape, bool) for shape in shapes]
        for numbers in self._meetings(batch_size):
            moving = np.zeros(S, bool)
            moving[[self.order[n] for n in numbers]] = True
            now = [moving, np.outer(moving, moving), moving]
            new = [x & ~y for x, y in zip(now, known, strict=True)]

            more = self.sweep(
                record,
                adjoints,
                third_order,
                final=final,
                numbers=numbers,
                apart=self._is_large(numbers),
            )
            # Where the loss is not finite there is nothing to be measured.
            if not versions.varying_axes(value):
                more = [jnp.where(jnp.isfinite(value), x, jnp.nan) for x in more]
            columns = zip(new, more, found, strict=True)
            found = [jnp.where(*column) for column in columns]
            known = [x | y for x, y in zip(known, now, strict=True)]
        gradient, hessian, third = found
        return gradient, hessian, third if third_order else None

    def _meetings(self, batch_size: int | None) -> list[tuple[int, ...]]:
        """The subsets of each sweep, by their numbers inside."""
        S = self.partition.size
        if batch_size is None:
            batch_size = _MOST_BYTES // self._bytes_of_a_row
        if batch_size >= S:
            return [tuple(range(S))]
        block = max(1, batch_size // 2)
        blocks = [tuple(range(n, min(n + block, S))) for n in range(0, S, block)]
        return [x + y for x, y in itertools.combinations(blocks, 2)]

    @functools.cached_property
    def _bytes_of_a_row(self) -> int:
        """What one subset takes where most tangents are alive; at least 1."""
        numbers = {
            v: _numbers(label, self.order)
            for v, label in zip(self.inputs, self.partition.labels, strict=True)
        }
        return max(1, _widest_row(self.program, numbers))

    def _is_large(self, numbers: Sequence[int]) -> bool:
        """Whether the rows of some subsets go beyond the cache of a CPU."""
        return len(numbers) * self._bytes_of_a_row > _CACHED_BYTES

    def sweep(
        self,
        record: Record,
        adjoints: dict[int, Any],
        third_order: bool,
        *,
        final: Final | None = None,
        numbers: Sequence[int] | None = None,
        hold: bool = False,
        apart: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One sweep of tangents: gradient, hessian and third.

        Args:
          record: from :meth:`linearise`.
          adjoints: from there.
          third_order: whether third is asked for; else it is zero.
          final: from there, too.
          numbers: the subsets that move, by their numbers inside; by default all.
          hold: as for `_sweep`.
          apart: as for `_sweep`.
        """
        size, dtype = self.partition.size, self.partition.dtype
        numbers = range(size) if numbers is None else numbers
        sums = Sums(size, dtype, third_order)
        first, second = {}, {}
        for v, u, label in zip(
            self.inputs, self.direction, self.partition.labels, strict=True
        ):
            rows = _rows_of_leaf(u, label, self.order, numbers)
            if rows is not None:
                first[v] = rows
        steps = list(enumerate(self.program.steps))
        _sweep(steps, record, adjoints, first, second, sums, hold=hold, apart=apart)
        gradient = jnp.zeros(size, dtype)
        value = self.program.outputs[0]
        if final:
            gradient = sweep_final(final, first, second, sums)
        elif isinstance(value, Variable) and value in first:
            gradient = sums.placed(first[value])
        hessian, third = sums.totals()
        hessian = 0.5 * (hessian + hessian.T)  # symmetric to the last bit
        back = np.argsort(self.order)
        return gradient[back], hessian[back][:, back], third[back]

    def third_order(self, leaves: Leaves, batch_size: int | None) -> jax.Array:
        """All of the third order, (S, S, S).

        With M_s the derivative of the sum of all local products along
        (xdot_s / 3, lambdadot_s), the tangents in these products being held fixed,

            D3 L[u_s, u_t, u_r] = M_s[t, r] + M_t[s, r] + M_r[s, t].
        """

        def linearise(leaves: Leaves) -> tuple[Record, dict[int, Any]]:
            _, record, adjoints, _ = self.linearise(leaves)
            return record, adjoints

        found = linearise(leaves)
        parts, treedef = jax.tree.flatten(found)
        moving = jax.tree.leaves(self.program.moving())
        num_values = sum(moving)
        moving += [True] * (len(parts) - len(moving))  # the adjoints

        def moving_parts(leaves: Leaves) -> list[jax.Array]:
            pairs = zip(jax.tree.leaves(linearise(leaves)), moving, strict=True)
            return [x for x, flag in pairs if flag]

        def products(some: Sequence[jax.Array]) -> jax.Array:
            rest = iter(some)
            pairs = zip(parts, moving, strict=True)
            filled = [next(rest) if flag else x for x, flag in pairs]
            record, adjoints = jax.tree.unflatten(treedef, filled)
            return self.sweep(record, adjoints, third_order=False, hold=True)[1]

        start, push = jax.linearize(moving_parts, list(leaves))
        _, turn = jax.linearize(products, start)

        def pass_of(s: jax.Array) -> jax.Array:
            moved = push(self.partition.part(self.direction, s))
            thirds = [x / 3 for x in moved[:num_values]]
            return turn([*thirds, *moved[num_values:]])

        subsets = jnp.arange(self.partition.size)
        m = jax.lax.map(pass_of, subsets, batch_size=batch_size)
        s, t, r = np.sort(np.indices(m.shape).reshape(3, -1), axis=0)
        tensor = m[s, t, r] + m[t, s, r] + m[r, s, t]
        return tensor.reshape(m.shape)  # read in sorted order: exactly symmetric


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _order_of_use(
    program: Program, inputs: Sequence[Variable], partition: Partition
) -> list[int]:
    """The subsets in the order in which the program meets them."""
    met: dict[Variable, int] = {}
    for n, step in enumerate(program.steps):
        for v in step.inputs:
            if isinstance(v, Variable):
                met.setdefault(v, n)
    never = len(program.steps)
    when = [never] * partition.size
    for v, label in zip(inputs, partition.labels, strict=True):
        for s in np.unique(label).tolist():
            if s != FROZEN:
                when[s] = min(when[s], met.get(v, never))
    return sorted(range(partition.size), key=lambda s: (when[s], s))


def _numbers(label: int | np.ndarray, order: Sequence[int]) -> tuple[int, ...]:
    """The numbers, in an order, of the subsets that have a part in a leaf."""
    subsets = set(np.unique(label).tolist()) - {FROZEN}
    return tuple(sorted(order.index(s) for s in subsets))


def _rows_of_leaf(
    u: jax.Array, label: int | np.ndarray, order: Sequence[int], moving: Sequence[int]
) -> Rows | None:
    """The direction at a leaf, a row for each moving subset that has a part in it."""
    numbers = tuple(n for n in _numbers(label, order) if n in set(moving))
    if not numbers:
        return None
    if not isinstance(label, np.ndarray):
        return Rows(numbers, u[None])
    subsets = np.array([order[n] for n in numbers]).reshape(-1, *[1] * label.ndim)
    return Rows(numbers, jnp.where(label == subsets, u, jnp.zeros_like(u)))


def _widest_row(program: Program, numbers: dict[Variable, tuple[int, ...]]) -> int:
    """The bytes that one row takes, where most bytes of tangents are alive."""
    reached = _reached(program, numbers)
    size = len({n for x in numbers.values() for n in x})
    widest = 0
    for step in program.steps:
        written = [step.outputs[i] for i in step.active_outputs]
        alive = sum(
            len(reached.get(v, ())) * v.aval.size * v.aval.dtype.itemsize
            for v in written
        )
        widest = max(widest, -(-alive // size))
        if step.loop:
            inputs = step.loop.body.inputs[len(step.loop.closed) :]
            read = [(inputs[i], step.inputs[i]) for i in step.active_inputs]
            inside = {v: reached.get(w, ()) for v, w in read}
            inside = {v: x or tuple(range(size)) for v, x in inside.items()}
            widest = max(widest, _widest_row(step.loop.body, inside))
    return widest


def _sweep(
    steps: Sequence[tuple[int, Step]],
    record: Record,
    adjoints: dict[int, Any],
    first: Moved,
    second: Moved,
    sums: Sums,
    *,
    hold: bool,
    apart: bool = False,
) -> None:
    """Passes tangents through some steps, adds to the sums.

    Args:
      steps: with their numbers in the program.
      record: the values at the inputs of the steps.
      adjoints: at the outputs of the curved steps, as the taps of the program.
      first: the tangents of what the steps read; those of what they write are entered.
      second: likewise, of second order.
      sums: what is added to.
      hold: whether derivatives of the sums are to leave out those of the tangents.
      apart: whether each step is compiled by itself.
    """
    for n, step in steps:
        if not step.active_outputs:
            continue
        read = [step.inputs[i] for i in step.active_inputs]
        tangents = Tangents([first.get(v) for v in read], [second.get(v) for v in read])
        if all(rows is None for rows in tangents.first):
            continue
        values = values_of(step.inputs, record.values)
        local = record.loops.get(n), adjoints.get(n), tangents
        run = functools.partial(_sweep_step, step, values, *local, sums.empty(), hold)
        try:
            passed, more = versions.apart(run)() if apart and step.is_curved else run()
        except Exception as error:  # jax has no common class for what it refuses
            raise _StepError(step) from error
        sums.extend(more)
        if hold:
            passed = jax.lax.stop_gradient(passed)
        written = [step.outputs[i] for i in step.active_outputs]
        for moved, columns in zip((first, second), passed, strict=True):
            pairs = zip(written, columns, strict=True)
            moved.update((v, rows) for v, rows in pairs if rows is not None)


def _sweep_step(
    step: Step,
    values: Sequence[jax.Array],
    loop: Record | None,
    adjoints: Any,
    tangents: Tangents,
    sums: Sums,
    hold: bool,
) -> tuple[Tangents, Sums]:
    """Passes tangents through one step; returns `sums`, too, with what it adds."""
    if step.loop:
        passed = _sweep_loop(step, values, loop, adjoints, tangents, sums, hold)
    else:
        passed = RULES[step.kind](step, values, adjoints, tangents, sums)
    return passed, sums


def _sweep_loop(
    step: Step,
    values: Sequence[jax.Array],
    record: Record,
    adjoints: dict[int, Any],
    tangents: Tangents,
    sums: Sums,
    hold: bool,
) -> Tangents:
    """Passes tangents through a `scan`: another one carries them along.

    The rows of the carry are the same in each iteration: all that ever appear.
    """
    loop, body = step.loop, step.loop.body
    inputs = body.inputs[len(loop.closed) :]
    read = [inputs[i] for i in step.active_inputs]
    orders = 2 if sums.third_order else 1
    moved = [_entered(read, column) for column in tangents[:orders]]
    value_of = dict(zip(inputs, values, strict=True))
    of_constants, of_carry, of_xs = loop.split(inputs)
    known = body.invariants([*loop.closed, *(value_of[v] for v in of_constants)])

    reached = _reached_in_loop(loop, {v: x.subsets for v, x in moved[0].items()})
    carried = [
        (v, w)
        for v, w in zip(of_carry, body.outputs[: loop.num_carry], strict=True)
        if reached.get(v)
    ]
    y_places = [i for i in step.active_outputs if i >= loop.num_carry]
    y_places = [i for i in y_places if reached.get(body.outputs[i])]
    of_xs = [[v for v in of_xs if v in x] for x in moved]

    def of_carried(x: Moved, places: int) -> list[jax.Array]:
        return [
            expanded(x.get(pair[places]), reached[pair[0]], value_of[pair[0]])
            for pair in carried
        ]

    def iterate(carry: tuple, scanned: tuple) -> tuple:
        carried_rows, hessian, third = carry
        inside_record, inside_adjoints, x_rows = scanned
        inside: list[Moved] = [{}, {}]
        for order in range(orders):
            outside = moved[order]
            inside[order].update((v, outside[v]) for v in of_constants if v in outside)
            for (v, _), x in zip(carried, carried_rows[order], strict=True):
                inside[order][v] = Rows(reached[v], x)
            for v, x in zip(of_xs[order], x_rows[order], strict=True):
                inside[order][v] = Rows(outside[v].subsets, x)
        inside_sums = sums.empty()
        inside_record = Record({**known, **inside_record.values}, inside_record.loops)
        steps = list(enumerate(body.steps))
        _sweep(steps, inside_record, inside_adjoints, *inside, inside_sums, hold=hold)
        totals = inside_sums.totals()
        ys = [
            [
                expanded(x.get(y), reached[y], versions.zeros(y, ()))
                for y in (body.outputs[i] for i in y_places)
            ]
            for x in inside[:orders]
        ]
        after = [of_carried(x, 1) for x in inside[:orders]]
        return (after, hessian + totals[0], third + totals[1]), ys

    before = [of_carried(x, 0) for x in moved]
    xs = [
        [jnp.moveaxis(x[v].values, 1, 0) for v in variables]
        for x, variables in zip(moved, of_xs, strict=True)
    ]
    nothing = sums.empty().totals()
    (after, *totals), ys = jax.lax.scan(
        iterate,
        (before, *nothing),
        (record, adjoints, xs),
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    sums.add_totals(*totals)

    passed: list[list[Rows | None]] = [[None] * len(step.active_outputs)] * 2
    for order in range(orders):
        rows = {
            of_carry.index(v): Rows(reached[v], x)
            for (v, _), x in zip(carried, after[order], strict=True)
        }
        for i, y in zip(y_places, ys[order], strict=True):
            rows[i] = Rows(reached[body.outputs[i]], jnp.moveaxis(y, 0, 1))
        passed[order] = [rows.get(i) for i in step.active_outputs]
    return Tangents(*passed)


def _entered(
    variables: Sequence[Variable], rows: Sequence[Rows | None]
) -> dict[Variable, Rows]:
    pairs = zip(variables, rows, strict=True)
    return {v: x for v, x in pairs if x is not None}


def _reached(
    program: Program, subsets: dict[Variable, tuple[int, ...]]
) -> dict[Variable, tuple[int, ...]]:
    """The subsets that move each variable, from those that move the inputs."""
    reached = dict(subsets)
    for step in program.steps:
        if not step.active_outputs:
            continue
        read = [reached.get(step.inputs[i], ()) for i in step.active_inputs]
        if step.loop:
            inputs = step.loop.body.inputs[len(step.loop.closed) :]
            inside = {
                inputs[i]: x for i, x in zip(step.active_inputs, read, strict=True) if x
            }
            inside = _reached_in_loop(step.loop, inside)
            results = [step.loop.body.outputs[i] for i in step.active_outputs]
            found = [inside.get(v, ()) for v in results]
        else:
            found = [union(*read)] * len(step.active_outputs)
        written = [step.outputs[i] for i in step.active_outputs]
        pairs = zip(written, found, strict=True)
        reached.update((v, x) for v, x in pairs if x)
    return reached


def _reached_in_loop(
    loop: Loop, subsets: dict[Variable, tuple[int, ...]]
) -> dict[Variable, tuple[int, ...]]:
    """The same inside of a loop, over all of its iterations."""
    inputs = loop.body.inputs[len(loop.closed) :]
    _, carry, _ = loop.split(inputs)
    results = loop.body.outputs[: loop.num_carry]
    while True:
        reached = _reached(loop.body, subsets)
        grown = dict(subsets)
        for v, w in zip(carry, results, strict=True):
            # A result may be a literal, which nothing reaches and nothing hashes.
            found = reached.get(w, ()) if isinstance(w, Variable) else ()
            grown[v] = union(subsets.get(v, ()), found)
        if grown == subsets:
            return reached
        subsets = grown
