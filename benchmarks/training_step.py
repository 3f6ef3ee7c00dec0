"""One training step with any optimizer of optax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

__all__ = ["training_step"]


def training_step(
    loss: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformationExtraArgs,
) -> Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """From parameters, state and batch to the next parameters and state, and the loss.

    Args:
      loss: a function of parameters and batch.
      tx: the optimizer; it receives `value_fn`, `value` and `grad`.

    The demo has a step of its own, `partnewton.demo.training`: it passes the images and
    labels as arguments of `value_fn`, as a user's script does, and takes the batch
    inside of the compiled step.
    """

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value_fn = functools.partial(loss, batch=batch)
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    return step
