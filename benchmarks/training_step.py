"""One training step with any optimizer of optax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

__all__ = ["training_step"]


def training_step(
    loss: Callable[[Any, Any], Any],
    tx: optax.GradientTransformationExtraArgs,
    *,
    has_aux: bool = False,
) -> Callable[[Any, Any, Any], tuple[Any, Any, Any]]:
    """From parameters, state and batch to the next parameters and state, and the loss.

    Args:
      loss: a function of parameters and batch.
      tx: the optimizer; it receives `value_fn`, `value` and `grad`.
      has_aux: whether the loss returns a pair of its value and something else; the step
        then returns this pair, and `value_fn` is the value alone.

    The demo has a step of its own, `partnewton.demo.training`: it passes the images and
    labels as arguments of `value_fn`, as a user's script does, and takes the batch
    inside of the compiled step.
    """

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        loss_fn = functools.partial(loss, batch=batch)
        found, grad = jax.value_and_grad(loss_fn, has_aux=has_aux)(params)
        value = found[0] if has_aux else found
        value_fn = (lambda params: loss_fn(params)[0]) if has_aux else loss_fn
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, found

    return step
