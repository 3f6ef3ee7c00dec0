"""Arguments of constructors, checked where a wrong one is still seen in the call."""

import warnings
from typing import Any

import jax
import numpy as np
import optax


def check_number(
    name: str, value: Any, *, minimum: float = 0, strict: bool = False
) -> None:
    """Raises if `value` is no number, or a plain number that is too small or NaN.

    Numbers that are arrays may be traced, as :func:`optax.inject_hyperparams` makes
    them, and may have any value.

    Args:
      name: the argument, for the message.
      value: what was given.
      minimum: the least that is allowed.
      strict: whether `minimum` itself is not allowed.

    Raises:
      TypeError: `value` is neither a number nor an array of shape ().
      ValueError: a plain number is below `minimum`.
    """
    if isinstance(value, int | float | np.integer | np.floating):
        if not (value > minimum if strict else value >= minimum):
            raise ValueError(f"{name} must {_bound(minimum, strict)}, got {value}.")
    elif not isinstance(value, np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number, got {_described(value)}.")
    elif np.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got shape {np.shape(value)}.")


def check_learning_rate(value: Any, stacklevel: int = 3) -> None:
    """Raises if the factor on what is solved for is none, warns if it is tiny.

    Args:
      value: a number, an array of shape () or a schedule.
      stacklevel: whose call a warning points to: 3 for the caller of the caller.

    Raises:
      TypeError: neither a number nor a function.
      ValueError: a plain number is negative or NaN.

    Warns:
      UserWarning: a plain number is that small out of habit.
    """
    if callable(value):
        return
    if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(
            f"learning_rate must be a number or a schedule, got {_described(value)}."
        )
    check_number("learning_rate", value)
    if isinstance(value, int | float | np.number) and 0 < value < TINY:
        warnings.warn(
            f"learning_rate={value} is a factor on steps whose lengths are solved for, "
            "not a learning rate like Adam's: 1 takes them in full, 0.2 is the default."
            " Training will be slower by orders of magnitude. Leave it out; if steps "
            "are meant to be so short, pass a schedule, such as "
            f"optax.constant_schedule({value}).",
            UserWarning,
            stacklevel=stacklevel,
        )


TINY = 0.01
"""Below this a factor on the solution of the model is taken for Adam's."""


def check_transformation(name: str, value: Any) -> None:
    """Raises if `value` is no transformation of optax.

    Raises:
      TypeError: something else, such as a function that makes one.
    """
    if isinstance(value, optax.GradientTransformation):
        return
    hint = f" Call it: {_name(value)}(...)." if callable(value) else ""
    raise TypeError(
        f"{name} must be an optax.GradientTransformation, such as "
        f"optax.scale_by_adam(), got {_described(value)}.{hint}"
    )


def check_rule(value: Any) -> None:
    """Raises if `value` cannot be a rule.

    Raises:
      TypeError: no function, or one of :mod:`partnewton.rules` that makes rules.
    """
    if not callable(value):
        raise TypeError(
            "rule must be a function from a Summary to a Proposal, such as "
            f"rules.cubic(), got {_described(value)}."
        )
    name = getattr(value, "__qualname__", "")
    module = getattr(value, "__module__", None) or ""
    if module.startswith("partnewton.rules") and "." not in name:
        raise TypeError(
            f"rule must be a function from a Summary to a Proposal; rules.{name} makes "
            f"such functions. Call it: rule=rules.{name}(...)."
        )


def check_average(name: str, value: Any) -> None:
    """Raises if `value` is no running average.

    Raises:
      TypeError: something else, such as a function that makes one.
    """
    if hasattr(value, "init") and hasattr(value, "update"):
        return
    hint = f" Call it: {_name(value)}(...)." if callable(value) else ""
    raise TypeError(
        f"{name} must be an averaging.Average, such as averaging.exponential(), got "
        f"{_described(value)}.{hint}"
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
