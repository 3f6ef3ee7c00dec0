"""Checks of the arguments of constructors, so that errors are raised in that call."""

import inspect
import warnings
from typing import Any

import jax
import numpy as np
import optax

__all__ = [
    "check_average",
    "check_batch_size",
    "check_learning_rate",
    "check_number",
    "check_rule",
    "check_transformation",
    "check_value_fn",
]


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0,
    strict: bool = False,
    below: float = np.inf,
) -> None:
    """Check that `value` is a number within bounds.

    Arrays of shape () are accepted whatever their value, because they may be traced, as
    by :func:`optax.inject_hyperparams`.

    Args:
      name: the argument, for the message.
      value: what was given.
      minimum: the lower bound.
      strict: whether `value` must be greater than `minimum`.
      below: the strict upper bound.

    Raises:
      TypeError: `value` is neither a number nor an array of shape ().
      ValueError: a number is NaN or out of bounds.
    """
    if isinstance(value, int | float | np.integer | np.floating):
        if not (value > minimum if strict else value >= minimum):
            raise ValueError(f"{name} must {_bound(minimum, strict)}, got {value}.")
        if np.isfinite(below) and value >= below:
            raise ValueError(f"{name} must be less than {below}, got {value}.")
    elif not isinstance(value, np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number, got {_described(value)}.")
    elif np.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got shape {np.shape(value)}.")


def check_learning_rate(value: Any, stacklevel: int = 3) -> None:
    """Check `learning_rate`, and warn about a value that would suit Adam.

    Args:
      value: a number, an array of shape () or a schedule.
      stacklevel: the frame that a warning refers to; 3 is the caller of the caller.

    Raises:
      TypeError: neither a number nor a function.
      ValueError: a number is negative or NaN.

    Warns:
      UserWarning: a number is positive and less than 0.01.
    """
    if callable(value):
        return
    if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(
            f"learning_rate must be a number or a schedule, got {_described(value)}."
        )
    check_number("learning_rate", value)
    if isinstance(value, int | float | np.number) and 0 < value < _SMALL:
        warnings.warn(
            f"learning_rate={value} multiplies step lengths that are computed from "
            "second derivatives; it is not a learning rate like Adam's. 1 applies them "
            "in full, 0.2 is the default. With this value, training will be slower by "
            "orders of magnitude. Leave the argument out; if such short steps are "
            "intended, pass a schedule, such as "
            f"optax.constant_schedule({value}).",
            UserWarning,
            stacklevel=stacklevel,
        )


_SMALL = 0.01  # a smaller factor is probably a learning rate tuned for Adam


def check_transformation(name: str, value: Any) -> None:
    """Check that `value` is a transformation of optax.

    Raises:
      TypeError: it is something else, such as a function that returns one.
    """
    if isinstance(value, optax.GradientTransformation):
        return
    hint = f" Call it: {_name(value)}(...)." if callable(value) else ""
    raise TypeError(
        f"{name} must be an optax.GradientTransformation, such as "
        f"optax.scale_by_adam(), got {_described(value)}.{hint}"
    )


def check_value_fn(value: Any) -> None:
    """Check that `value` can be a loss.

    Raises:
      TypeError: it is no function.
    """
    if not callable(value):
        raise TypeError(
            "value_fn must be a function from params to a scalar loss, got "
            f"{type(value).__name__}."
        )


def check_rule(value: Any) -> None:
    """Check that `value` can be a rule.

    Raises:
      TypeError: it is not a function, or a function that returns rules.
    """
    if not callable(value):
        raise TypeError(
            "rule must be a function from a Summary to a Proposal, such as "
            f"rules.cubic(), got {_described(value)}."
        )
    is_constructor = inspect.isfunction(value) or inspect.isclass(value)
    if is_constructor and value.__module__.startswith("partnewton.rules"):
        raise TypeError(
            "rule must be a function from a Summary to a Proposal; "
            f"rules.{value.__name__} returns such a function. Call it: "
            f"rule=rules.{value.__name__}(...)."
        )


def check_average(name: str, value: Any) -> None:
    """Check that `value` is a running average.

    Raises:
      TypeError: it is something else, such as a function that returns one.
    """
    if hasattr(value, "init") and hasattr(value, "update"):
        return
    hint = f" Call it: {_name(value)}(...)." if callable(value) else ""
    raise TypeError(
        f"{name} must be an optax.GradientTransformation of summaries, such as "
        f"averaging.exponential(), got {_described(value)}.{hint}"
    )


def _bound(minimum: float, strict: bool) -> str:
    if minimum == 0:
        return "be positive" if strict else "not be negative"
    return f"be more than {minimum}" if strict else f"be at least {minimum}"


def _described(value: Any) -> str:
    """What was given instead, for a message."""
    if isinstance(value, str):
        return f"the string {value!r}"
    if callable(value):
        return f"the function {_name(value)}"
    return f"{value!r}, a {type(value).__name__}" if value is not None else "None"


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def check_batch_size(value: Any) -> None:
    """Check that `value` is None or an integer of at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"batch_size must be at least 1, got {value}.")
