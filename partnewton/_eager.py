"""Updates outside of :func:`jax.jit`, compiled once instead of at every step."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
import optax

from partnewton._extra_args import extract_fn_kwargs
from partnewton.engines import compat
from partnewton.engines.keys import key_of_program

__all__ = ["compiled_direction", "compiled_when_eager"]

_PROGRAMS = 16  # cached per transformation


def compiled_when_eager(
    update_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., Any]:
    """An update function with a `value_fn`, compiled if its arguments are not traced.

    The loss may be a different function at each step, a closure over the next batch,
    and variables that it reads can change. So it is traced at each step, which takes
    milliseconds. Arrays that it closes over become arguments, and the update is
    compiled once for each distinct program. If the arguments are traced, as inside
    :func:`jax.jit`, or if programs cannot be compared, `update_fn` is called as it is.

    Args:
      update_fn: the update function of a transformation.
      has_aux: whether `value_fn` returns ``(loss, aux)``; aux is ignored.

    Returns:
      An update function; its `__wrapped__` is `update_fn`.
    """

    @functools.lru_cache(maxsize=_PROGRAMS)
    def compiled(loss: _KeyedLoss) -> Callable[..., Any]:
        def update(
            constants: list[Any],
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params,
        ) -> tuple[optax.Updates, optax.OptState]:
            def value_fn(params: optax.Params) -> Any:
                (value,) = loss.function(*constants, *jax.tree.leaves(params))
                return (value, None) if has_aux else value

            return update_fn(updates, state, params, value_fn=value_fn)

        return jax.jit(update)

    @functools.wraps(update_fn)
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        arguments = updates, state, params
        program = None
        if callable(value_fn) and params is not None and _are_concrete(arguments):
            program = _loss_program(value_fn, params, extra_args, has_aux)
        if program is None:
            return update_fn(*arguments, value_fn=value_fn, **extra_args)
        loss, constants = program
        return compiled(loss)(constants, *arguments)

    return update


def compiled_direction(
    direction: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """A transformation without extra arguments, compiled unless it is traced."""
    compiled = jax.jit(direction.update)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        arguments = updates, state, params
        update = compiled if _are_concrete(arguments) else direction.update
        return update(*arguments)

    return optax.GradientTransformation(direction.init, update_fn)


class _KeyedLoss:
    """A loss as a function of its constants and the leaves of the parameters.

    Losses with the same key compute the same function, and compare equal.
    """

    def __init__(self, function: Callable[..., list[jax.Array]], key: Hashable):
        self.function = function
        self._key, self._hash = key, hash(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KeyedLoss) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash


def _loss_program(
    value_fn: Callable[..., Any],
    params: optax.Params,
    extra_args: dict[str, Any],
    has_aux: bool,
) -> tuple[_KeyedLoss, list[Any]] | None:
    """The loss and the arrays it closes over; None if programs cannot be compared."""
    loss_args = extract_fn_kwargs(value_fn, extra_args)

    def loss(params: optax.Params) -> jax.Array:
        result = value_fn(params, **loss_args)
        return result[0] if has_aux else result

    try:
        closed = jax.make_jaxpr(loss)(params)
        key = key_of_program(closed)
    except Exception:  # no key, or an error that the update function will raise
        return None
    jaxpr, constants = compat.open_jaxpr(closed), compat.constants_of(closed)
    is_scalar = len(jaxpr.outvars) == 1 and jaxpr.outvars[0].aval.shape == ()
    if not is_scalar or any(isinstance(x, jax.core.Tracer) for x in constants):
        return None
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    function = compat.function_of(jaxpr.eqns, inputs, jaxpr.outvars)
    return _KeyedLoss(function, key), constants


def _are_concrete(tree: Any) -> bool:
    """Whether all leaves are arrays or numbers, and none is traced."""
    return all(
        isinstance(x, jax.Array | np.ndarray | np.generic | int | float)
        and not isinstance(x, jax.core.Tracer)
        for x in jax.tree.leaves(tree)
    )
