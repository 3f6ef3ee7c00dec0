"""Directions: what stands before the link in a chain.

Any transformation of optax makes a direction. What is here knows what those do not:
that a bad batch must leave no trace, that the rows of a matrix may have units of their
own, and what a subset is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import partitions
from partnewton.summary import checked_direction

__all__ = ["BalancedState", "balanced", "guarded", "normalize_by_subset"]


def guarded(
    direction: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that forgets whatever is not finite.

    Where the incoming updates, the outgoing ones or the new state are not finite, the
    state stays as it was and the outgoing updates are NaN, for
    :func:`~partnewton.scale_by_partition_newton` to refuse and to count. A bad batch
    leaves no trace: without this, the averages of Adam would be NaN for ever. Traced
    hyperparameters do not change the dtypes of a state.

    Args:
      direction: any transformation; the state of the result is its state.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Example:
      >>> tx = guarded(optax.trace(0.5))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (2.0, jnp.nan, 6.0):
      ...     sums, state = tx.update(jnp.array([grad]), state)
      >>> print(sums)
      [7.]
    """
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
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
        new_updates, new_state = direction.update(updates, state, params, **extra_args)
        good = all_finite((updates, new_updates, new_state))
        nan = jax.tree.map(lambda u: jnp.full_like(u, jnp.nan), updates)
        return select(good, new_updates, nan), select(good, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class BalancedState(NamedTuple):
    """State of :func:`balanced`.

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


def balanced(
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
      :class:`BalancedState`.

    Example:
      >>> tx = balanced(optax.identity(), power=0.5, eps=0.0)
      >>> grads = jnp.array([[100.0, 100.0], [1.0, 1.0]])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates[0, 0] / updates[1, 0])
      0.01
    """
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> BalancedState:
        if partitions.is_placeholder(params):
            rows = columns = jnp.zeros(())  # nothing here is like the parameters
        else:
            rows = _of_matrices(lambda x: jnp.zeros((x.shape[0], 1), _wide(x)), params)
            columns = _of_matrices(
                lambda x: jnp.zeros((1, x.shape[1]), _wide(x)), params
            )
        return BalancedState(
            jnp.zeros((), jnp.int32), rows, columns, direction.init(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: BalancedState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, BalancedState]:
        count = optax.safe_increment(state.count)

        def running(axis: int, old: Any) -> Any:
            def mean(u: jax.Array, before: jax.Array) -> jax.Array:
                square = jnp.mean(u.astype(_wide(u)) ** 2, axis, keepdims=True)
                new = decay * before + (1 - decay) * square
                return new.astype(before.dtype)

            return _of_matrices(mean, updates, old)

        rows, columns = running(1, state.rows), running(0, state.columns)

        def unit(mean: jax.Array) -> jax.Array:
            overall = jnp.mean(mean)  # in which the correction for zeros cancels
            relative = mean / jnp.where(overall > 0, overall, 1)
            # A row without any gradient has no units, and nothing to scale.
            factor = jnp.where(relative > 0, relative + eps, 1) ** -power
            return jnp.where(relative > 0, factor, 1)

        units = _of_matrices(lambda u, r, c: unit(r) * unit(c), updates, rows, columns)

        def scaled(tree: optax.Updates) -> optax.Updates:
            leaves, treedef = jax.tree.flatten(tree)
            factors = treedef.flatten_up_to(units)
            return jax.tree.unflatten(
                treedef,
                [
                    u if factor is None else (factor * u).astype(u.dtype)
                    for u, factor in zip(leaves, factors, strict=True)
                ],
            )

        outgoing, inner = direction.update(
            scaled(updates), state.inner, params, **extra_args
        )
        return scaled(outgoing), BalancedState(count, rows, columns, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def normalize_by_subset(
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    *,
    root_mean_square: bool = False,
) -> optax.GradientTransformation:
    """Give each subset of the updates the norm 1, or the root mean square 1.

    With u_s the updates on subset s, the outgoing updates are u_s / ||u_s||, and zero
    where u_s is zero or frozen. A learning rate of such a direction is the length of a
    step. Lengths, unlike rates, can be kept while the norm of a gradient changes, and
    the derivatives along unit directions can be averaged over time. With the root mean
    square in place of the norm, a learning rate is by how much the entries of a subset
    move, whatever their number: what Adam's is, and alike for large and small tensors.

    Args:
      param_labels: the partition, see :mod:`partnewton.partitions`.
      root_mean_square: whether that is 1, over all entries of the subset.

    Returns:
      A :class:`optax.GradientTransformation`, without state; its update function needs
      `params`.

    Raises:
      ValueError, TypeError: from `update`, at trace time, if an argument does not fit.

    Example:
      >>> tx = normalize_by_subset()
      >>> updates, params = jnp.array([3.0, 4.0]), jnp.zeros(2)
      >>> print(tx.update(updates, tx.init(params), params)[0])
      [0.6 0.8]
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if params is None:
            raise ValueError("params: normalize_by_subset needs the parameters.")
        leaves = checked_direction(updates, params, "updates")
        partition = partitions.partition_of(params, param_labels)
        active = [jnp.asarray(leaves[i]) for i in partition.active]
        norms = jnp.sqrt(partition.of_active().inner(active, active))
        unit_norms = np.sqrt(partition.counts(leaves)) if root_mean_square else 1.0
        inverse = jnp.where(norms == 0, 0, unit_norms / jnp.where(norms == 0, 1, norms))
        inverse = inverse.astype(norms.dtype)
        factors = partition.spread(inverse)
        unit = [
            (factor * u).astype(jnp.result_type(u))
            for u, factor in zip(leaves, factors, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), unit), state

    return optax.GradientTransformation(init_fn, update_fn)


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
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def all_finite(tree: object) -> jax.Array:
    """Whether all numbers in a tree are finite."""
    finite = [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return jnp.all(jnp.stack([jnp.array(True), *finite]))


def select(condition: jax.Array, new: object, old: object) -> object:
    """`new` or `old`, in the dtypes of `old`: a state never changes its types."""
    return jax.tree.map(
        lambda x, y: jnp.where(condition, jnp.asarray(x).astype(y.dtype), y), new, old
    )
