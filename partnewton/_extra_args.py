"""The arguments of an update function beside updates, and states found in a chain."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax


def check_arguments(
    name: str, params: optax.Params | None, value_fn: Callable[..., Any] | None
) -> None:
    """Raises if what the update function called `name` needs beside updates is wrong.

    Raises:
      ValueError: one of the two is missing.
      TypeError: `value_fn` is no function.
    """
    if params is None:
        raise ValueError(
            f"params: {name} needs the parameters; call "
            "tx.update(updates, state, params, value_fn=loss)."
        )
    if value_fn is None:
        raise ValueError(
            f"value_fn: {name} needs the loss as a function of "
            "the parameters; call tx.update(updates, state, params, value_fn=loss)."
        )
    if not callable(value_fn):
        raise TypeError(
            "value_fn must be a function from params to a scalar loss, got "
            f"{type(value_fn).__name__}."
        )


def picked(fn: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `fn` names in its signature, as optax's line searches do."""
    names = inspect.signature(fn).parameters
    return {name: x for name, x in arguments.items() if name in names}


def states_of(kind: type, state: optax.OptState) -> list[Any]:
    """The states of a kind, wherever in `state` they stand."""

    def is_it(node: Any) -> bool:
        return isinstance(node, kind)

    return [x for x in jax.tree.leaves(state, is_leaf=is_it) if is_it(x)]
