"""Directions for matrices whose rows or columns have different scales."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton import partitions
from partnewton._checks import check_transformation
from partnewton._strictness import at_least_float32, permissive
from partnewton.partitions.partition import gathered

__all__ = ["EquilibratedState", "equilibrated"]


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
