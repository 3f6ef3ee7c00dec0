"""`scale_by_subspace_newton`: Newton's method in a subspace of each subset.

The gradient, a quasi-Newton direction and the last steps span a subspace of a few
dimensions on each subset of the parameters. The exact gradient and Hessian of the loss
on the sum of these subspaces determine one coefficient per direction and subset. It is
the sequential subspace optimisation of Narkiss and Zibulevsky with an exact Hessian,
and one subspace per subset instead of one for all parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import engines, partitions
from partnewton._checks import check_number, check_transformation
from partnewton._eager import compiled_when_eager
from partnewton._extra_args import check_arguments, extract_fn_kwargs
from partnewton.directions import skip_nonfinite
from partnewton.partitions.partition import is_frozen, zeros_of_frozen
from partnewton.subspace.point import Point

__all__ = ["ScaleBySubspaceNewtonState", "scale_by_subspace_newton"]


class ScaleBySubspaceNewtonState(NamedTuple):
    """State of :func:`scale_by_subspace_newton`. S is the number of subsets.

    Attributes:
      count: the number of updates, shape (), int32.
      loss: the loss before the last update, shape ().
      learning_rates: the root mean square (RMS) change of the entries of each subset in
        the last update, shape (S,).
      damping: of the last accepted step in the subspace, relative to the largest
        curvature, shape ().
      decrease: the decrease of the loss by the last update, shape (); 0 if its step
        was refused.
      predicted_decrease: the same by the quadratic model, shape ().
      noise: the rounding errors of the loss, measured at every tenth update, after a
        refused one, and where slopes contradict the loss, shape ().
      summary_count: the number of updates at which the subspace was used, shape (),
        int32.
      refused_count: the number of updates at which no step decreased the loss, or only
        one below the last digit of all parameters; they return zeros, shape (), int32.
      notfinite_count: the number of updates at which the incoming updates or the
        derivatives of the loss were not finite, which then return zeros, shape (),
        int32.
      steps: the last steps, newest first, as a tuple of trees like the parameters, with
        None for leaves that are frozen.
      direction: the state of `direction`, or an empty tuple.
      subsets: as in :class:`~partnewton.ScaleByPartitionNewtonState`.
    """

    count: jax.Array
    loss: jax.Array
    learning_rates: jax.Array
    damping: jax.Array
    decrease: jax.Array
    predicted_decrease: jax.Array
    noise: jax.Array
    summary_count: jax.Array
    refused_count: jax.Array
    notfinite_count: jax.Array
    steps: tuple[optax.Params, ...]
    direction: optax.OptState
    subsets: dict[str, None]


def scale_by_subspace_newton(
    history: int = 3,
    *,
    direction: optax.GradientTransformation | None = None,
    damping: jax.typing.ArrayLike = 1e-3,
    param_labels: partitions.ParamLabels | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method in a subspace of each subset, for losses without noise.

    The incoming updates are the gradient of the loss, or a multiple of it. The
    gradient, the updates that `direction` makes of it, and the last steps are K
    directions. Let q^k_s be an orthonormal basis of their span on subset s. The
    outgoing updates are
    sum_ks eta_ks q^k_s, with the sign of a gradient. The coefficients minimise

        - gradient . eta + 1/2 eta' |hessian| eta + damping/2 ||D eta||^2

    with the exact gradient and Hessian of the loss L(params - sum_ks eta_ks q^k_s) at
    0, see :func:`partnewton.summarize`. In |hessian| the eigenvalues, in units of D,
    are replaced by their absolute values, and D_s^2 is the norm of the diagonal block
    of subset s. So the step depends neither on the scale of a direction nor on that of
    a subset. The loss is evaluated for three dampings, a tenth, once and ten times the
    last one, and the step with the largest decrease is taken. If its decrease is less
    than a tenth of the predicted one, the damping is increased further. If no step
    decreases the loss, the outgoing updates are zero.

    Such a step costs some tens of gradients. The updates of `direction`, if they
    have the length of a Newton step, are tried first, in full and up to four times
    shortened. If one of them decreases the loss sufficiently, it is the step; then an
    update costs one or two evaluations of the loss.

    Where a decrease may be one of rounding errors, it is computed from slopes, with one
    more gradient. The rounding errors are measured: they are the change of the loss if
    the last digit of all parameters changes. So the loss decreases at each step, also
    in float32, and no line search is needed.

    It is meant for the whole data set, or a large fixed part of it. The loss may change
    between updates. The update function needs `params` and `value_fn`, see
    :func:`partnewton.scale_by_partition_newton`. Frozen entries do not move.

    Args:
      history: the number of last steps among the directions; the state has a copy of
        the parameters for each.
      direction: a transformation with the length of a Newton step, such as
        :func:`partnewton.scale_by_broyden` or ``optax.scale_by_lbfgs(20)``; by default
        none, and the subspace is used at each update.
      damping: the damping of the first step, relative to the largest curvature.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default each
        leaf is a subset. With one subset per entry this is Newton's method.
      engine: how summaries are computed, see :func:`partnewton.summarize`.
      has_aux: whether `value_fn` returns ``(loss, aux)``; aux is ignored.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, whose state is a
      :class:`ScaleBySubspaceNewtonState`.

    Raises:
      ValueError, TypeError: if an argument is invalid; from `init` and `update` at
        trace time.

    Example:
      >>> loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> tx = optax.chain(scale_by_subspace_newton(history=1), optax.scale(-1.0))
      >>> x = jnp.array([-1.2, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(30):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> print(bool(loss(x) < 1e-10))
      True

    References:
      G. Narkiss and M. Zibulevsky, "Sequential subspace optimization method for
        large-scale unconstrained problems", Technion, 2005.
      P. Wolinski, arXiv 2312.03885: derivatives per subset.
    """
    param_labels = partitions.per_tensor if param_labels is None else param_labels
    if isinstance(history, bool) or not isinstance(history, int | np.integer):
        raise TypeError(f"history must be an integer, got {history!r}.")
    check_number("history", history)
    check_number("damping", damping, strict=True)
    source = None
    if direction is not None:
        check_transformation("direction", direction)
        source = skip_nonfinite(direction, param_labels=param_labels)

    def init_fn(params: optax.Params) -> ScaleBySubspaceNewtonState:
        size, dtype, subsets, steps = 1, np.dtype(np.float32), jnp.zeros(()), params
        is_placeholder = partitions.is_placeholder(params)
        if not is_placeholder:
            partition = partitions.partition_of(params, param_labels)
            size, dtype = partition.size, partition.dtype
            subsets = {f"{s} {name}": None for s, name in enumerate(partition.names)}
            steps = partition.take(params)

        def zero() -> jax.Array:  # new buffers each time, so that all can be donated
            return jnp.zeros((), dtype)

        def zeros() -> optax.Params:
            return steps if is_placeholder else jax.tree.map(_zeros_like, steps)

        return ScaleBySubspaceNewtonState(
            count=jnp.zeros((), jnp.int32),
            loss=zero(),
            learning_rates=jnp.zeros(size, dtype),
            damping=jnp.full((), damping, dtype),
            decrease=zero(),
            predicted_decrease=zero(),
            noise=zero(),
            summary_count=jnp.zeros((), jnp.int32),
            refused_count=jnp.zeros((), jnp.int32),
            notfinite_count=jnp.zeros((), jnp.int32),
            steps=tuple(zeros() for _ in range(history)),
            direction=() if source is None else source.init(params),
            subsets=subsets,
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySubspaceNewtonState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySubspaceNewtonState]:
        check_arguments("scale_by_subspace_newton", params, value_fn)
        loss_args = extract_fn_kwargs(value_fn, extra_args)
        partition = partitions.partition_of(params, param_labels)
        incoming = partitions.checked_direction(updates, params, "updates", partition)
        made, source_state = [incoming], ()
        if source is not None:
            outgoing, source_state = source.update(updates, state.direction, params)
            made.append(jax.tree.leaves(outgoing))
        directions = [
            *([jnp.asarray(x) for x in partition.take_active(u)] for u in made),
            *(jax.tree.leaves(step) for step in state.steps),
        ]
        point = Point(lambda x: value_fn(x, **loss_args), params, partition, has_aux)
        was_refused = (state.count > 0) & (state.decrease == 0)
        noise = point.noise(state.noise, state.count, was_refused)
        arguments = directions, state.damping, engine, noise
        if source is None:
            found = point.subspace_step(*arguments)
        else:
            found = point.step(*arguments, skips_second=state.count == 0)
        found = point.moving(found)
        steps = state.steps
        if steps:
            treedef = jax.tree.structure(steps[0])
            newest = jax.tree.unflatten(treedef, found.step)
            steps = jax.tree.map(
                lambda x, y: jnp.where(found.is_accepted, x, y),
                (newest, *steps[:-1]),
                steps,
            )
        is_refused = found.is_finite & ~found.is_accepted
        new = ScaleBySubspaceNewtonState(
            count=optax.safe_increment(state.count),
            loss=jnp.where(found.is_finite, found.loss, state.loss),
            learning_rates=found.rms,
            damping=jnp.where(found.is_finite, found.damping, state.damping),
            decrease=found.decrease,
            predicted_decrease=found.predicted_decrease,
            noise=found.noise,
            summary_count=_incremented(state.summary_count, found.is_of_subspace),
            refused_count=_incremented(state.refused_count, is_refused),
            notfinite_count=_incremented(state.notfinite_count, ~found.is_finite),
            steps=steps,
            direction=source_state,
            subsets=state.subsets,
        )
        leaves = [
            zeros_of_frozen(x) if is_frozen(label) else None
            for x, label in zip(jax.tree.leaves(params), partition.labels, strict=True)
        ]
        leaves = partition.put_active(leaves, found.step)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), new

    return optax.GradientTransformationExtraArgs(
        init_fn, compiled_when_eager(update_fn, has_aux)
    )


def _zeros_like(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, x.dtype)


def _incremented(count: jax.Array, condition: jax.Array) -> jax.Array:
    return jnp.where(condition, optax.safe_increment(count), count)
