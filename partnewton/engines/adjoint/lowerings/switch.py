"""Where the ways that are fast on CPUs are taken."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from partnewton.engines import compat

__all__ = ["are_enabled", "disabled", "on_cpu"]

_enabled = contextvars.ContextVar("lowerings_are_enabled", default=True)


def are_enabled() -> bool:
    """Whether one is not inside of :func:`disabled`."""
    return _enabled.get()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which everything is computed in the plain way."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def on_cpu(fast: Callable, plain: Callable, *operands: jax.Array) -> Any:
    """The result of `fast` on a CPU, else that of `plain`, which is the same."""
    if not are_enabled() or compat.may_be_sharded(*operands):
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cpu=fast, default=plain)
