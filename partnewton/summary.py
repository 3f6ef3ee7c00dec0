"""Exact derivatives of a loss along a direction, per subset of the parameters.

Let u_s be the direction u on subset s and zero elsewhere. All quantities of this module
are derivatives at 0 of the function of S variables

    phi(eta) = L(params - sum_s eta_s * u_s)

up to the sign: D^d L[u_s1, ..., u_sd] is (-1)^d times a derivative of phi of order d
(P. Wolinski, arXiv 2312.03885). They are computed by :mod:`partnewton.engines`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from partnewton import engines, partitions
from partnewton._error_hints import with_error_hints

__all__ = ["Summary", "derivative_tensors", "summarize"]

PyTree = Any


class Summary(NamedTuple):
    """Derivatives of a loss along a direction, per subset and per pair of subsets.

    Attributes:
      value: the loss L, shape ().
      gradient: <dL/dparams, u_s>, shape (S,).
      hessian: <u_s, H u_t>, shape (S, S), symmetric.
      third: D^3 L[u_s, u_s, u_s], shape (S,), or None if it was not requested.
    """

    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    third: jax.Array | None


def summarize(
    value_fn: Callable[..., Any],
    params: PyTree,
    direction: PyTree,
    *,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    third_order: bool = True,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> Any:
    """Exact derivatives of a loss along a direction, to second or third order.

    With u_s the direction on subset s and zero elsewhere, and H the Hessian of the loss
    L at `params`, the summary consists of L and

        gradient_s = <dL/dparams, u_s>,  hessian_st = <u_s, H u_t>,
        third_s    = D^3 L[u_s, u_s, u_s].

    A summary is linear in the loss: the summary of a mean over micro-batches is the
    mean of their summaries.

    Args:
      value_fn: the loss, a function from `params` to a real scalar, differentiable
        twice (three times with `third_order`). Its data are constants.
      params: a pytree of real floating point arrays; leaves of other types must be
        labelled `partitions.FROZEN`.
      direction: a pytree with the paths and shapes of `params`. It has the sign of a
        gradient: a step is ``params - sum_s eta_s * u_s``. It is cast to the dtypes of
        `params`.
      param_labels: the partition, specified as in :func:`optax.partition`; see
        :mod:`partnewton.partitions`. By default there is one subset per leaf.
      third_order: whether to compute `third`.
      engine: "adjoint", the fast engine, which is also what "auto" selects;
        "jvp_of_grad", the reference implementation by Hessian-vector products; or one
        of them with a bound on its memory, such as ``engines.Adjoint(batch_size=32)``.
      has_aux: whether `value_fn` returns ``(loss, aux)``.

    Returns:
      A :class:`Summary` of float32 arrays, or float64 if a parameter has that dtype.
      With `has_aux`, ``(summary, aux)``.

    Raises:
      ValueError, TypeError: an argument is invalid; the message contains its name and
        the leaf. Raised at trace time.

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) * p["b"]
      >>> s = summarize(loss, params, jax.grad(loss)(params))
      >>> print(s.gradient)
      [180.  25.]
      >>> print(s.hessian)
      [[1080.  300.]
       [ 300.    0.]]

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    arguments = _EngineArguments(value_fn, params, direction, param_labels, has_aux)
    (value, aux), gradient, hessian, third = engines.get(engine).summarize(
        arguments.loss,
        arguments.leaves,
        arguments.direction,
        arguments.partition,
        third_order=third_order,
    )
    summary = Summary(value.astype(gradient.dtype), gradient, hessian, third)
    return (summary, aux) if has_aux else summary


def derivative_tensors(
    value_fn: Callable[..., Any],
    params: PyTree,
    direction: PyTree,
    *,
    order: int = 3,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> Any:
    """All mixed derivatives of a loss along a direction, up to a given order.

    The tensor of order d has the entries D^d L[u_s1, ..., u_sd]. It is symmetric, and
    each distinct entry is computed once.

    Args:
      value_fn: the loss, differentiable `order` times; this and the other arguments are
        those of :func:`summarize`.
      params: the parameters.
      direction: the direction u.
      order: the highest order, at least 1.
      param_labels: the partition.
      engine: "adjoint", "jvp_of_grad", or "auto" for "adjoint". For the third order,
        "adjoint" makes S passes over the loss, and "jvp_of_grad" S (S + 1) / 2.
        Tensors of order 4 and higher are always computed by "jvp_of_grad".
      has_aux: whether `value_fn` returns ``(loss, aux)``.

    Returns:
      A tuple of `order` arrays of shapes (S,), (S, S), (S, S, S), ...; with `has_aux`,
      ``(tuple, aux)``.

    Raises:
      ValueError, TypeError: an argument is invalid.

    Example:
      >>> params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
      >>> ones = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
      >>> d1, d2, d3 = derivative_tensors(lambda p: p["a"] ** 2 * p["b"], params, ones)
      >>> print(d1, d3[0, 0, 1])
      [12.  4.] 2.0

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}.")
    arguments = _EngineArguments(value_fn, params, direction, param_labels, has_aux)
    (_, aux), tensors = engines.get(engine).derivative_tensors(
        arguments.loss,
        arguments.leaves,
        arguments.direction,
        arguments.partition,
        order=order,
    )
    return (tensors, aux) if has_aux else tensors


class _EngineArguments:
    """The checked arguments of the two functions above, in the form engines expect.

    Attributes:
      loss: a function from the list of active leaves to ``(value, aux)``.
      leaves: the active leaves, which have at least one entry that is not frozen.
      direction: the direction at these leaves, with their shapes and dtypes.
      partition: the partition of these leaves.
    """

    def __init__(
        self,
        value_fn: Callable[..., Any],
        params: PyTree,
        direction: PyTree,
        param_labels: partitions.ParamLabels,
        has_aux: bool,
    ):
        if not callable(value_fn):
            raise TypeError(
                "value_fn must be a function from params to a scalar loss, got "
                f"{type(value_fn).__name__}."
            )
        partition = param_labels
        if not isinstance(partition, partitions.Partition):
            partition = partitions.partition_of(params, param_labels)
        directions = partitions.checked_direction(
            direction, params, partition=partition
        )
        everything, treedef = jax.tree.flatten(params)
        leaves = partition.take_active(everything)
        directions = partition.take_active(directions)
        _check_equal_on_all_devices("params", leaves)
        _check_equal_on_all_devices("direction", directions)

        def loss(leaves: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
            filled = partition.put_active(everything, leaves)
            value_of = with_error_hints(value_fn, params)
            result = value_of(jax.tree.unflatten(treedef, filled))
            return _checked_loss(result, has_aux)

        self.loss = loss
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        self.direction = []
        columns = partition.active, self.leaves, map(jnp.asarray, directions)
        for i, leaf, u in zip(*columns, strict=True):
            if jnp.iscomplexobj(u):
                raise TypeError(
                    f"direction: the leaf {partitions.leaf_names(params)[i]!r} has "
                    f"dtype {u.dtype}, but a direction is real."
                )
            self.direction.append(u.astype(leaf.dtype))
        self.partition = partition.of_active()


def _checked_loss(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """``(loss, aux)``, if the loss is a real floating point scalar."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "value_fn must return a pair (loss, aux) because has_aux=True, got "
            f"{type(result).__name__}."
        )
    value, aux = result if has_aux else (result, None)
    _check_equal_on_all_devices("value_fn", value)
    if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
        raise TypeError(
            f"value_fn must return a scalar loss, got a {type(value).__name__}; pass "
            "has_aux=True if it returns (loss, aux)."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value_fn must return a scalar loss, got shape {jnp.shape(value)}; "
            "return a mean or a sum."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            "value_fn must return a real floating point loss, got dtype "
            f"{jnp.result_type(value)}."
        )
    return jnp.asarray(value), aux


def _check_equal_on_all_devices(name: str, tree: PyTree) -> None:
    """Check, inside `shard_map`, that a tree is the same on all devices.

    If jax does not track which values differ between devices (``check_vma=False`` or
    `pmap`), the derivative of a mean over devices is wrong without any error.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis in mesh.manual_axes:
        if mesh.shape[axis] == 1:
            continue
        if axis not in _varying(jax.lax.axis_index(axis)):
            raise ValueError(
                "value_fn: inside pmap, or shard_map with check_vma=False, derivatives "
                "of a mean over devices are wrong; use shard_map with check_vma=True, "
                "or jit with sharded arguments."
            )
        for leaf in jax.tree.leaves(tree):
            if axis in _varying(leaf):
                raise ValueError(
                    f"{name}: inside shard_map, {_DIFFERS[name].format(axis=axis)}"
                )


_DIFFERS = {
    "value_fn": "the loss differs between the devices of the mesh axis {axis!r}; "
    "return jax.lax.pmean(loss, {axis!r}).",
    "direction": "it differs between the devices of the mesh axis {axis!r}; use the "
    "gradient of jax.lax.pmean(loss, {axis!r}).",
    "params": "the parameters differ between the devices of the mesh axis {axis!r}; to "
    "shard parameters, use jit with sharded arguments.",
}


def _varying(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array may differ."""
    return jax.typeof(x).manual_axis_type.varying
