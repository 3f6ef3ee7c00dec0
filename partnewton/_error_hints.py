"""Errors raised inside a user's loss, with a hint at the likely cause."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from partnewton import partitions

__all__ = ["with_error_hints"]


def with_error_hints(
    value_fn: Callable[..., Any], params: optax.Params
) -> Callable[..., Any]:
    """Wrap `value_fn` so that its errors explain what is unusual about `params`.

    A loss that was not written for the parameters it receives fails with an error that
    mentions neither the parameters nor the optimizer. If :func:`optax.masked` or
    :func:`optax.partition` removed leaves, the error is replaced by one that says so.
    Typical mistakes with nnx and Equinox models are explained in a note that is added
    to the original error.
    """

    @functools.wraps(value_fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return value_fn(*args, **kwargs)
        except Exception as error:
            masked = _paths_of(optax.MaskedNode, params)
            message = _MASKED.format(path=masked[0]) if masked else ""
            if masked and str(error) != message:
                raise ValueError(message) from error
            for note in _notes(error, params):
                if note not in getattr(error, "__notes__", ()):
                    error.add_note(note)
            raise

    return wrapped


_MASKED = (
    "value_fn failed on parameters without the leaf {path!r}, which optax.masked, "
    "optax.partition or optax.multi_transform replaced by a MaskedNode. Do not wrap "
    "the optimizer in one of these: label the parameters that it must not change "
    "partitions.FROZEN in param_labels, and add the updates of another optimizer for "
    "them, optax.tree.add(newton_updates, other_updates); see docs/faq.md."
)
_COPY = (
    "value_fn changes variables of an nnx model that was created outside of it (as "
    "BatchNorm and Dropout do). Let it change a copy: "
    "nnx.merge(graphdef, params, rest, copy=True), as partnewton.flax.value_fn does."
)
_MODEL = (
    "value_fn receives the parameters, an nnx.State, not the model. Use "
    "partnewton.flax.value_fn(model, loss, ...), or after "
    "graphdef, _, rest = nnx.split(model, nnx.Param, ...) write "
    "lambda params: loss(nnx.merge(graphdef, params, rest, copy=True))."
)
_NONE = (
    "value_fn receives the parameters, in which {paths} is None. "
    "For an Equinox model, params, static = eqx.partition(model, eqx.is_inexact_array),"
    " write lambda params: loss(eqx.combine(params, static)), see docs/recipes.md."
)


def _notes(error: Exception, params: optax.Params) -> list[str]:
    """The likely cause of an error raised by the loss."""
    kind, text = type(error).__name__, str(error)
    if kind in ("TraceContextError", "TraceContextException"):
        return [_COPY]
    if not isinstance(error, TypeError | AttributeError):
        return []
    if type(params).__name__ == "State" and "State" in text:
        return [_MODEL]
    if "NoneType" in text:
        paths = _paths_of(type(None), params)
        return [_NONE.format(paths=partitions.listing(paths))] if paths else []
    return []


def _paths_of(kind: type, tree: Any) -> list[str]:
    """The key paths of all nodes of type `kind`."""

    def is_it(node: Any) -> bool:
        return isinstance(node, kind)

    names = partitions.leaf_names(tree, is_it)
    nodes = jax.tree.leaves(tree, is_leaf=is_it)
    return [name for name, x in zip(names, nodes, strict=True) if is_it(x)]
