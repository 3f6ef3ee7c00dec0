"""`subspace_newton`: the optimizer with its default directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton import engines, partitions
from partnewton.broyden import ScaleByBroydenState, scale_by_broyden
from partnewton.directions import KeepsFinite
from partnewton.subspace.lbfgs import LbfgsDirectionState, lbfgs_direction
from partnewton.subspace.transform import scale_by_subspace_newton

__all__ = ["subspace_newton"]


def subspace_newton(
    history: int = 3,
    *,
    direction: optax.GradientTransformation | None = None,
    damping: jax.typing.ArrayLike = 1e-3,
    param_labels: partitions.ParamLabels | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for losses without noise: quasi-Newton or exact Newton steps.

    A step of a self-scaled quasi-Newton method is taken if it decreases the loss. If it
    does not, the gradient, the quasi-Newton direction and the last steps span a
    subspace of each tensor, in which the loss is minimised by a damped Newton step with
    its exact Hessian, see :func:`scale_by_subspace_newton`. It replaces L-BFGS where
    the loss is computed on all data: physics-informed networks, fits, small models. It
    continues to descend in float32 where line searches fail.

    Args:
      history: the number of last steps among the directions.
      direction: the quasi-Newton direction; by default :func:`scale_by_broyden` up to
        2500 parameters, with a matrix of all pairs of parameters in the state, and
        L-BFGS with 50 steps for more.
      damping, param_labels, engine, has_aux: as in :func:`scale_by_subspace_newton`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update function needs
      `params` and `value_fn`. No line search should follow.

    Raises:
      ValueError, TypeError: as in :func:`scale_by_subspace_newton`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> tx = subspace_newton()
      >>> x = jnp.array([-1.2, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(60):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> print(bool(loss(x) < 1e-10))
      True
    """
    return optax.chain(
        scale_by_subspace_newton(
            history,
            direction=quasi_newton() if direction is None else direction,
            damping=damping,
            param_labels=param_labels,
            engine=engine,
            has_aux=has_aux,
        ),
        optax.scale(-1.0),
    )


class QuasiNewtonState(NamedTuple):
    """State of :func:`quasi_newton`; that of the unused method is of scalars.

    So all states have the same structure, as :func:`optax.tree.map_params` needs, and
    no array is empty, which orbax does not save.

    Attributes:
      broyden: the state of :func:`scale_by_broyden`.
      lbfgs: the state of :func:`lbfgs_direction`.
    """

    broyden: ScaleByBroydenState
    lbfgs: LbfgsDirectionState


def quasi_newton(
    max_size: int = 2500, memory_size: int = 50
) -> optax.GradientTransformation:
    """The direction of Broyden's method, or of L-BFGS for many parameters."""
    dense, sparse = scale_by_broyden(max_size), lbfgs_direction(memory_size)

    def init_fn(params: optax.Params) -> QuasiNewtonState:
        if optax.tree.size(params) <= max_size:
            like = jax.tree.map(lambda x: jnp.zeros((), jnp.result_type(x)), params)
            return QuasiNewtonState(dense.init(params), sparse.init(like))
        return QuasiNewtonState(dense.init(jnp.zeros(())), sparse.init(params))

    def update_fn(
        updates: optax.Updates,
        state: QuasiNewtonState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, QuasiNewtonState]:
        if optax.tree.size(updates) <= max_size:
            updates, broyden = dense.update(updates, state.broyden, params)
            return updates, state._replace(broyden=broyden)
        updates, lbfgs = sparse.update(updates, state.lbfgs, params)
        return updates, state._replace(lbfgs=lbfgs)

    return KeepsFinite(init_fn, update_fn)
