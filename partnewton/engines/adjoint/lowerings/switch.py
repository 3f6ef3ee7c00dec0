"""Selects between the implementations for CPUs and those for all platforms."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from partnewton.engines import compat

__all__ = ["are_enabled", "disabled", "on_cpu"]

_enabled = contextvars.ContextVar("lowerings_are_enabled", default=True)


def are_enabled() -> bool:
    """Whether lowerings are used, that is, outside of :func:`disabled`."""
    return _enabled.get()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which no lowering is used."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def on_cpu(
    fast: Callable,
    plain: Callable,
    *operands: jax.Array,
    elsewhere: Callable | None = None,
) -> Any:
    """The result of `fast` if the default backend is a CPU, else that of `elsewhere`.

    The result of `plain`, which is also the default of `elsewhere`, if no lowering is
    used.
    """
    if not are_enabled() or compat.may_be_sharded(*operands):
        return plain(*operands)
    # Not `jax.lax.platform_dependent`, which traces and lowers both.
    on_cpu = jax.default_backend() == "cpu"
    return (fast if on_cpu else elsewhere or plain)(*operands)
