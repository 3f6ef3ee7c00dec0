"""`subspace_newton`: the optimizer with its default directions."""

import jax
import optax

from partnewton import engines, partitions
from partnewton.subspace.lbfgs import lbfgs_direction
from partnewton.subspace.transform import scale_by_subspace_newton

__all__ = ["subspace_newton"]


def subspace_newton(
    history: int = 2,
    *,
    memory_size: int = 20,
    damping: jax.typing.ArrayLike = 1e-3,
    param_labels: partitions.ParamLabels | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method in a subspace of each tensor, for losses without noise.

    On each subset of the parameters, the gradient, the direction of L-BFGS and the last
    steps span a subspace, in which the loss is minimised by a damped Newton step with
    its exact Hessian, see :func:`scale_by_subspace_newton`. It replaces L-BFGS where
    the loss is computed on all data: physics-informed networks, fits, small models. It
    continues to descend in float32 where line searches fail.

    Args:
      history: the number of last steps among the directions.
      memory_size: of the L-BFGS direction, whose state has twice as many copies of the
        parameters; 0 for no such direction.
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
      >>> for _ in range(30):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> print(bool(loss(x) < 1e-10))
      True
    """
    directions = [lbfgs_direction(memory_size)] if memory_size else []
    return optax.chain(
        scale_by_subspace_newton(
            history,
            directions=directions,
            damping=damping,
            param_labels=param_labels,
            engine=engine,
            has_aux=has_aux,
        ),
        optax.scale(-1.0),
    )
