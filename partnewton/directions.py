"""Transformations that produce update directions.

Any transformation of optax can produce a direction. `orthogonal_momentum` is the one of
Muon. The two other functions of this module wrap a direction: `skip_nonfinite`, so that
updates that are not finite and frozen parameters do not enter its state, and
`equilibrated`, for matrices whose rows or columns have different scales.
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
from partnewton.engines.compat import as_call
from partnewton.orthogonal import orthogonal_momentum
from partnewton.partitions.partition import gathered

__all__ = [
    "EquilibratedState",
    "equilibrated",
    "orthogonal_momentum",
    "skip_nonfinite",
]


class KeepsFinite(optax.GradientTransformation):
    """A transformation whose state does not change by updates that are not finite.

    :func:`skip_nonfinite` then does not select between two states, which for a state
    with a large matrix takes time.
    """


def skip_nonfinite(
    direction: optax.GradientTransformation,
    *,
    param_labels: partitions.ParamLabels | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation so that nonfinite updates do not change its state.

    If the sum of squares of the incoming updates is not finite, the state is kept and
    the outgoing updates are NaN, which :func:`~partnewton.scale_by_partition_newton`
    replaces by zeros and counts. Without this, one NaN would make the averages of Adam
    NaN for the rest of the training. The dtypes of the state do not change, even if
    hyperparameters are traced.

    With `param_labels`, the transformation receives no frozen parameters either: frozen
    leaves are replaced by None, so that it stores no state for them, and frozen entries
    inside a leaf by zeros. The outgoing updates of frozen leaves are zero.

    Args:
      direction: any transformation; the state of the result is its state.
      param_labels: the partition, of which only :data:`partitions.FROZEN` is used; by
        default no leaf is frozen, and `params` is not needed.

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
    keeps_finite = isinstance(direction, KeepsFinite)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
        if param_labels is not None and not partitions.is_placeholder(params):
            partition = partitions.partition_of(params, param_labels)
            params = partition.take(params)
        # A weakly typed state, as of weakly typed parameters, would change its type at
        # the first update.
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
                raise ValueError(
                    "params: skip_nonfinite needs the parameters; call "
                    "tx.update(updates, state, params, ...)."
                )
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
        return outgoing, new if keeps_finite else select(is_finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _has_finite_squares(tree: optax.Updates) -> jax.Array:
    """Whether the sum of all squares in a tree is finite, in float32 at least."""
    # Not inlined: XLA would fuse the sums into each kernel that reads the result.
    check = as_call(_sum_of_squares_is_finite)
    return check([jnp.asarray(x) for x in jax.tree.leaves(tree)])


def _sum_of_squares_is_finite(leaves: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for x in leaves:
        total = total + jnp.sum(x.astype(_accumulation_dtype(x)) ** 2)
    return jnp.isfinite(total)


class EquilibratedState(NamedTuple):
    """State of :func:`equilibrated`.

    Attributes:
      count: the number of updates, shape (), int32.
      rows: for each matrix, the running mean square of each row of its gradient, shape
        (n, 1); None for all other leaves.
      columns: the same for each column, shape (1, m).
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
    """Apply a transformation to matrices with equilibrated rows and columns.

    If one input of a layer is a hundred times as large as another, so is its row of the
    gradient, and its best weights are a hundred times smaller. Orthogonalised momentum
    moves both rows by similar amounts, and needs a learning rate that is small enough
    for the row of the larger input. Let G be a matrix of gradients, r and c the running
    mean squares of its rows and columns, each divided by its mean, R = diag(r + eps)
    and C = diag(c + eps). The direction is

        U = R^-p direction(R^-p G C^-p) C^-p,

    which is the step that the wrapped transformation makes for the weights R^p W C^p.
    With p = 1/2 the direction in the scaled weights does not depend on the scale of the
    inputs, but inputs that are rarely nonzero get large weights; 1/4 is a compromise.
    Leaves that are not matrices are not scaled.

    Args:
      direction: any transformation, such as :func:`orthogonal_momentum`.
      power: p, nonnegative; 0 applies the direction without scaling.
      decay: the decay of the running means.
      eps: added to r and c, whose mean is 1; it bounds the scaling of rows whose
        gradient is nearly always zero.

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
            rows = columns = jnp.zeros(())  # no state leaf is like a parameter
        else:
            rows = _of_matrices(
                lambda x: jnp.zeros((x.shape[0], 1), _accumulation_dtype(x)), params
            )
            columns = _of_matrices(
                lambda x: jnp.zeros((1, x.shape[1]), _accumulation_dtype(x)), params
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
    square = jnp.mean(u.astype(_accumulation_dtype(u)) ** 2, axis, keepdims=True)
    return (decay * before + (1 - decay) * gathered(square)).astype(before.dtype)


def _unit(
    mean: jax.Array, power: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> jax.Array:
    """The factors of the rows or columns of a matrix, from their mean squares."""
    overall = jnp.mean(mean)  # the correction for initial zeros cancels in the quotient
    relative = mean / jnp.where(overall > 0, overall, 1)
    # A row without gradient is not scaled.
    factor = jnp.where(relative > 0, relative + eps, 1) ** -power
    return jnp.where(relative > 0, factor, 1)


def _multiplied(tree: optax.Updates, units: Any) -> optax.Updates:
    """The matrices of a tree times `units`; all other leaves are not changed."""
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
    """`fn` of each matrix and its counterparts in the other trees, otherwise None."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in others]
    return jax.tree.unflatten(
        treedef,
        [
            fn(*row) if jnp.ndim(row[0]) == 2 else None
            for row in zip(leaves, *columns, strict=True)
        ],
    )


def _accumulation_dtype(x: jax.Array) -> Any:
    """The dtype in which squares are summed: float32, or float64 if `x` is."""
    return at_least_float32(jnp.result_type(x))
