"""The arguments of an update function beside updates, and states found in a chain."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from partnewton import partitions


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
            f"value_fn: {name} needs the loss as a function of the parameters; call "
            "tx.update(updates, state, params, value_fn=loss). A wrapper may drop it, "
            "as flax's TrainState.apply_gradients does: use the TrainState of "
            "docs/recipes.md, or write updates, opt_state = state.tx.update(grads, "
            "state.opt_state, state.params, value_fn=loss)."
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


def explained(value_fn: Callable[..., Any], params: optax.Params) -> Callable[..., Any]:
    """`value_fn`, whose errors say what is unusual about `params`, if that is likely.

    The errors of a loss that was not written for the parameters it is given name
    neither the parameters nor the optimizer. Where :func:`optax.masked` or
    :func:`optax.partition` took leaves out, the error becomes one that says so; what
    goes wrong with the models of nnx and Equinox is explained in a note.
    """

    @functools.wraps(value_fn)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return value_fn(*args, **kwargs)
        except Exception as error:
            masked = _places_of(optax.MaskedNode, params)
            message = _MASKED.format(place=masked[0]) if masked else ""
            if masked and str(error) != message:
                raise ValueError(message) from error
            for note in _notes(error, params):
                if note not in getattr(error, "__notes__", ()):
                    error.add_note(note)
            raise

    return explaining


_MASKED = (
    "value_fn failed on parameters that lack the leaf {place!r}: optax.masked, "
    "optax.partition and optax.multi_transform put a MaskedNode in its place. Do not "
    "wrap the optimizer: label what it is to leave alone partitions.FROZEN in "
    "param_labels, and add the updates of another optimizer for that, "
    "optax.tree.add(ours, theirs); see docs/faq.md."
)
_COPY = (
    "value_fn changes variables of an nnx model that was made outside of it (BatchNorm "
    "and Dropout do). Let it change a copy: "
    "nnx.merge(graphdef, params, rest, copy=True), see docs/recipes.md."
)
_MODEL = (
    "value_fn is called with the parameters, an nnx.State, and not with the model. "
    "With graphdef, _, rest = nnx.split(model, nnx.Param, ...) it is "
    "lambda params: loss(nnx.merge(graphdef, params, rest, copy=True)), see "
    "docs/recipes.md."
)
_NONE = (
    "value_fn is called with the parameters, which have None in the place of {places}. "
    "Of an Equinox model, params, static = eqx.partition(model, eqx.is_inexact_array), "
    "it is lambda params: loss(eqx.combine(params, static)), see docs/recipes.md."
)


def _notes(error: Exception, params: optax.Params) -> list[str]:
    """What is likely to be the cause of an error of the loss."""
    kind, text = type(error).__name__, str(error)
    if kind in ("TraceContextError", "TraceContextException"):
        return [_COPY]
    if not isinstance(error, TypeError | AttributeError):
        return []
    if type(params).__name__ == "State" and "State" in text:
        return [_MODEL]
    if "NoneType" in text:
        places = _places_of(type(None), params)
        return [_NONE.format(places=partitions.listing(places))] if places else []
    return []


def _places_of(kind: type, tree: Any) -> list[str]:
    """The key paths of the nodes of a kind."""

    def is_it(node: Any) -> bool:
        return isinstance(node, kind)

    names = partitions.leaf_names(tree, is_it)
    nodes = jax.tree.leaves(tree, is_leaf=is_it)
    return [name for name, x in zip(names, nodes, strict=True) if is_it(x)]


def states_of(kind: type, state: optax.OptState) -> list[Any]:
    """The states of a kind, wherever in `state` they stand, as a chain makes them.

    The optimizer of nnx keeps each array of its state in a variable; the arrays are
    taken out of these.
    """

    def is_it(node: Any) -> bool:
        return isinstance(node, kind)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_it) if is_it(x)]
    return [jax.tree.map(_unwrapped, x, is_leaf=_is_variable) for x in found]


def _is_variable(node: Any) -> bool:
    """Whether this is a variable of nnx, by what is public of its interface."""
    return hasattr(node, "get_value") and hasattr(node, "get_metadata")


def _unwrapped(leaf: Any) -> Any:
    return leaf.get_value() if _is_variable(leaf) else leaf
