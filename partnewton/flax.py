"""Flax: the loss as a function of the parameters, and a `TrainState` that passes it on.

This module imports flax, which is not a dependency of the package; ``import
partnewton`` does not import it.

NNX: `nnx.Optimizer.update` passes keyword arguments to the optimizer, and
:func:`value_fn` makes `value_fn` from a model. linen: the loss is a function of the
parameters already, and :class:`TrainState` passes it to the optimizer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

try:
    import optax
    from flax import nnx
    from flax.training import train_state
except ImportError as error:
    raise ImportError("partnewton.flax needs flax: pip install flax") from error

__all__ = ["TrainState", "value_fn"]


def value_fn(
    model: Any,
    loss_fn: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Callable[[Any], Any]:
    """The loss of an NNX model as a pure function of its parameters.

    An NNX model contains more variables than its parameters: the running statistics of
    BatchNorm, the random state of Dropout. They are copied here, and again for each
    call, and so are other NNX objects among the arguments, such as the `nnx.Rngs` that
    a loss receives. So all calls of the result use the statistics and the Dropout masks
    that the model would use next, and no call changes the model.

    Call this *before* the gradient is computed: ``nnx.value_and_grad(loss_fn)(model,
    ...)`` advances the random state, and the summary and the gradient would then have
    different Dropout masks.

    Args:
      model: the model, or any graph node of NNX.
      loss_fn: the loss, ``loss_fn(model, *args, **kwargs)``.
      *args: arguments of `loss_fn` after the model, such as a batch or an `nnx.Rngs`.
      **kwargs: arguments of `loss_fn` by keyword.

    Returns:
      A function from the parameters, ``nnx.state(model, wrt)`` with the filter `wrt` of
      `nnx.Optimizer`, to what `loss_fn` returns. If that is a pair ``(loss, aux)``, use
      ``has_aux=True`` in the optimizer.

    Raises:
      TypeError: `loss_fn` is not a function.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> def loss_fn(model, x, y):
      ...     return jnp.mean((model(x) - y) ** 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x, y):
      ...     loss_of_params = value_fn(model, loss_fn, x, y)
      ...     grads = nnx.grad(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads, value_fn=loss_of_params)
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = partnewton.partition_newton()
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step(model, optimizer, jnp.ones((4, 2)), jnp.zeros((4, 1)))
    """
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function loss_fn(model, ...), got "
            f"{type(loss_fn).__name__}."
        )
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    places = [i for i, leaf in enumerate(leaves) if _is_node(leaf)]
    # One clone of all of them: variables that they share stay shared.
    saved = nnx.clone((model, [leaves[i] for i in places]))

    def loss_of_params(params: Any) -> Any:
        copy, nodes = nnx.clone(saved)
        nnx.update(copy, params)
        copied = list(leaves)
        for i, node in zip(places, nodes, strict=True):
            copied[i] = node
        args, kwargs = jax.tree.unflatten(treedef, copied)
        return loss_fn(copy, *args, **kwargs)

    return loss_of_params


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


class TrainState(train_state.TrainState):
    """flax's `TrainState`, whose `apply_gradients` passes arguments to the optimizer.

    flax's own class calls ``tx.update(grads, opt_state, params)`` without further
    arguments, so that an optimizer that needs the loss cannot be used with it. Here,
    the keyword arguments of `apply_gradients` that are fields of the state replace
    them, as in flax, and all others are passed to the optimizer: `value_fn`, and the
    arguments of `value_fn`. An optimizer that takes no additional arguments, such as
    `optax.adam`, ignores them.

    Subclasses add fields, such as running statistics::

        class State(partnewton.flax.TrainState):
            batch_stats: Any

        state = state.apply_gradients(
            grads=grads, batch_stats=batch_stats, value_fn=loss_fn, x=x, y=y
        )

    Example:
      >>> import jax, jax.numpy as jnp, partnewton
      >>> loss = lambda params, x: jnp.mean((params["w"] * x - 1.0) ** 2)
      >>> params, x = {"w": jnp.array(3.0)}, jnp.array([1.0, 2.0])
      >>> tx = partnewton.partition_newton()
      >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> grads = jax.grad(loss)(state.params, x)
      >>> state = state.apply_gradients(grads=grads, value_fn=loss, x=x)
      >>> print(state.step, bool(loss(state.params, x) < loss(params, x)))
      1 True
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: the gradients, with the tree structure of `params`.
          **kwargs: fields of the state, which are replaced, and arguments of the
            optimizer, such as `value_fn` and the arguments of `value_fn`.

        Returns:
          The new state.
        """
        fields = {k: x for k, x in kwargs.items() if k in self.__dataclass_fields__}
        extra_args = {k: x for k, x in kwargs.items() if k not in fields}
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, **extra_args)
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        # The steps of flax, and its treatment of parameters that are overwritten.
        new = super(TrainState, bound).apply_gradients(grads=grads, **fields)
        return new if "tx" in fields else new.replace(tx=self.tx)
