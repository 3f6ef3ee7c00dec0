"""Transformations that produce update directions.

Any transformation of optax makes a direction. These two wrap one: `skip_nonfinite`, so
that a bad batch and frozen parameters leave no trace in its state, and `equilibrated`,
for matrices whose rows or columns have units of their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton._checks import check_transformation
from partnewton._strictness import at_least_float32, permissive
from partnewton._tree import select
from partnewton.engines.compat import outlined

__all__ = ["EquilibratedState", "equilibrated", "skip_nonfinite"]


def skip_nonfinite(
    direction: optax.GradientTransformation,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that does not see updates that are not finite.

    Where the sum of squares of the incoming updates is not finite, the state stays as
    it was and the outgoing updates are NaN, for
    :func:`~partnewton.scale_by_partition_newton` to replace by zeros and to count. A
    bad batch leaves no trace: without this, the averages of Adam would be NaN for ever.
    Traced hyperparameters do not change the dtypes of a state.

    With `param_labels`, the transformation does not see frozen parameters either: it is
    given trees with None in the place of leaves that are frozen, for which it keeps no
    state, and zeros at the entries that are frozen inside a leaf. The outgoing updates
    of frozen leaves are zero.

    Args:
      direction: any transformation; the state of the result is its state.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is looked at;
        by default no leaf is frozen, and `params` is not needed.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Example:
      >>> tx = skip_nonfinite(optax.trace(0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (2.0, jnp.nan, 6.0):
      ...     sums, state = tx.update(jnp.array([grad]), state)
      >>> print(sums)
      [7.]
    """
    check_transformation("direction", direction)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
        if param_labels is not None and not partitions.is_placeholder(params):
            partition = partitions.partition_of(params, param_labels)
            params = partition.take(params)
        # A state like a weakly typed parameter would change its type at an update.
        return jax.tree.map(
            lambda x: x.astype(x.dtype) if isinstance(x, jax.Array) else x,
            direction.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        partition = None
        if param_labels is not None:
            if params is None:
                raise ValueError("params: skip_nonfinite needs the parameters.")
            partition = partitions.partition_of(params, param_labels)
            everything = params
            partitions.checked_direction(updates, params, "updates", partition)
            updates, params = partition.take(updates), partition.take(params)
        is_finite = _has_finite_squares(updates)
        with permissive():
            outgoing, new = direction.update(updates, state, params, **extra_args)
        factor = jnp.where(is_finite, 1, jnp.nan)
        outgoing = jax.tree.map(
            lambda u, like: (factor * u).astype(like.dtype), outgoing, updates
        )
        if partition is not None:
            outgoing = partition.put(everything, outgoing)
        return outgoing, select(is_finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _has_finite_squares(tree: optax.Updates) -> jax.Array:
    """Whether the sum of all squares in a tree is finite, in float32 at least."""
    # By itself: XLA would sum again in each kernel that reads the result.
    check = outlined(_sum_of_squares_is_finite)
    return check([jnp.asarray(x) for x in jax.tree.leaves(tree)])


def _sum_of_squares_is_finite(leaves: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for x in leaves:
        total = total + jnp.sum(x.astype(_wide(x)) ** 2)
    return jnp.isfinite(total)


class EquilibratedState(NamedTuple):
    """State of :func:`equilibrated`.

    Attributes:
      count: how many updates were made, shape (), int32.
      rows: for each matrix the running mean square of each row of its gradient, (n, 1);
        None for all other leaves.
      columns: the same of each column, (1, m).
      inner: the state of the direction.
    """

    count: jax.Array
    rows: Any
    columns: Any
    inner: Any


def equilibrated(
    direction: optax.GradientTransformation,
    power: jax.typing.ArrayLike = 0.25,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that works in units in which rows and columns are alike.

    Where one input of a layer is a hundred times the size of another, so is its row of
    the gradient, and the best weights are a hundredth. An orthogonalised momentum moves
    both rows alike and has to be so slow as suits the larger. With r and c the mean
    squares of the rows and columns of a matrix of gradients, over time and relative to
    their mean, and R = diag(r + eps), C = diag(c + eps), the direction is

        U = R^-p direction(R^-p G C^-p) C^-p,

    the steepest descent, of the kind of the inner one, for the weights R^p W C^p. With
    p = 1/2 it is the same, in these units, for inputs of any size, and inputs that are
    rarely seen get large weights; 1/4 is half of the way. Leaves that are no matrices
    go through the inner direction as they are.

    Args:
      direction: any transformation, such as that of :func:`optax.contrib.muon`.
      power: p, not negative; 0 leaves the inner direction as it is.
      decay: how much of the past the running means keep at each update.
      eps: what is added to r and c, whose mean is 1: a bound for rows that are hardly
        ever seen.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, whose state is a
      :class:`EquilibratedState`.

    Example:
      >>> tx = equilibrated(optax.identity(), power=0.5, eps=0.0)
      >>> grads = jnp.array([[100.0, 100.0], [1.0, 1.0]])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates[0, 0] / updates[1, 0])
      0.01
    """
    check_transformation("direction", direction)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> EquilibratedState:
        if partitions.is_placeholder(params):
            rows = columns = jnp.zeros(())  # nothing here is like the parameters
        else:
            rows = _of_matrices(lambda x: jnp.zeros((x.shape[0], 1), _wide(x)), params)
            columns = _of_matrices(
                lambda x: jnp.zeros((1, x.shape[1]), _wide(x)), params
            )
        return EquilibratedState(
            jnp.zeros((), jnp.int32), rows, columns, direction.init(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: EquilibratedState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, EquilibratedState]:
        running = functools.partial(_running_mean_square, decay=decay)
        rows = _of_matrices(functools.partial(running, axis=1), updates, state.rows)
        columns = _of_matrices(
            functools.partial(running, axis=0), updates, state.columns
        )
        unit = functools.partial(_unit, power=power, eps=eps)
        units = _of_matrices(lambda u, r, c: unit(r) * unit(c), updates, rows, columns)
        with permissive():
            outgoing, inner = direction.update(
                _multiplied(updates, units), state.inner, params, **extra_args
            )
        count = optax.safe_increment(state.count)
        new = EquilibratedState(count, rows, columns, inner)
        return _multiplied(outgoing, units), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _running_mean_square(
    u: jax.Array, before: jax.Array, *, axis: int, decay: jax.typing.ArrayLike
) -> jax.Array:
    """The running mean of the mean squares of rows (axis 1) or columns (axis 0)."""
    square = jnp.mean(u.astype(_wide(u)) ** 2, axis, keepdims=True)
    return (decay * before + (1 - decay) * square).astype(before.dtype)


def _unit(
    mean: jax.Array, power: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> jax.Array:
    """What the rows or columns of a matrix are multiplied by, from mean squares."""
    overall = jnp.mean(mean)  # the correction for initial zeros cancels in the quotient
    relative = mean / jnp.where(overall > 0, overall, 1)
    # A row without any gradient has no units, and nothing to scale.
    factor = jnp.where(relative > 0, relative + eps, 1) ** -power
    return jnp.where(relative > 0, factor, 1)


def _multiplied(tree: optax.Updates, units: Any) -> optax.Updates:
    """The matrices of a tree times their units, all other leaves as they are."""
    leaves, treedef = jax.tree.flatten(tree)
    factors = treedef.flatten_up_to(units)
    return jax.tree.unflatten(
        treedef,
        [
            u if factor is None else (factor * u).astype(u.dtype)
            for u, factor in zip(leaves, factors, strict=True)
        ],
    )


def _of_matrices(fn: Any, tree: Any, *others: Any) -> Any:
    """`fn` of each matrix and of what stands in its place in the others, None else."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in others]
    return jax.tree.unflatten(
        treedef,
        [
            fn(*row) if jnp.ndim(row[0]) == 2 else None
            for row in zip(leaves, *columns, strict=True)
        ],
    )


def _wide(x: jax.Array) -> Any:
    """What squares are summed in: float32, or float64 if `x` is."""
    return at_least_float32(jnp.result_type(x))
