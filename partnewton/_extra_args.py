"""The arguments of an update function besides the updates and the state."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from partnewton._checks import check_value_fn

__all__ = ["check_arguments", "extract_fn_kwargs"]


def check_arguments(
    name: str, params: optax.Params | None, value_fn: Callable[..., Any] | None
) -> None:
    """Check that an update function received `params` and `value_fn`.

    Args:
      name: the transformation, for the message.
      params: the parameters.
      value_fn: the loss.

    Raises:
      ValueError: one of the two is missing.
      TypeError: `value_fn` is not a function.
    """
    if params is None:
        raise ValueError(
            f"params: {name} needs the parameters; call "
            "tx.update(updates, state, params, value_fn=loss)."
        )
    if value_fn is None:
        raise ValueError(
            f"value_fn: {name} needs the loss as a function of the parameters; call "
            "tx.update(updates, state, params, value_fn=loss). Some wrappers drop "
            "extra arguments, such as flax's TrainState.apply_gradients: use "
            "partnewton.flax.TrainState, or write updates, opt_state = "
            "state.tx.update(grads, state.opt_state, state.params, value_fn=loss)."
        )
    check_value_fn(value_fn)


def extract_fn_kwargs(
    fn: Callable[..., Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The arguments named in the signature of `fn`, as optax's line searches do it.

    Raises:
      TypeError: another argument of `fn`, besides the first one, has no default.
    """
    signature = inspect.signature(fn)
    found = {name: x for name, x in arguments.items() if name in signature.parameters}
    try:
        signature.bind(None, **found)
    except TypeError as error:
        raise TypeError(
            f"value_fn: {error}. It is called with params, and with those arguments of "
            "update that have the names of its other arguments: tx.update(updates, "
            "state, params, value_fn=loss, x=x, y=y)."
        ) from None
    return found
