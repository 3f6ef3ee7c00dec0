"""What is computed: how the loss reacts when each subset moves along its direction.

Everything here is about the function of S numbers

    phi(eta) = L(params - sum_s eta_s * u_s),

where u_s is the direction u on subset s and zero elsewhere: D^d L[u_s1, ..., u_sd] is,
up to the sign (-1)^d, a derivative of phi at 0 (P. Wolinski, arXiv 2312.03885). How
the numbers are computed is the business of :mod:`partnewton.engines`.
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
    """The loss along a direction, seen by each subset and each pair of subsets.

    Attributes:
      value: L, shape ().
      gradient: <dL/dparams, u_s>, shape (S,).
      hessian: <u_s, H u_t>, shape (S, S), symmetric.
      third: D^3 L[u_s, u_s, u_s], shape (S,), or None if it was not asked for.
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
    engine: str = "auto",
    batch_size: int | None = None,
    has_aux: bool = False,
) -> Any:
    """The exact summary of a loss along a direction, to second or third order.

    With u_s the direction on subset s and zero elsewhere, and H the Hessian of the
    loss L at `params`,

        gradient_s = <dL/dparams, u_s>,  hessian_st = <u_s, H u_t>,
        third_s    = D^3 L[u_s, u_s, u_s].

    A summary is linear in the loss: summaries of micro-batches average.

    Args:
      value_fn: the loss, a function from `params` to a real scalar, differentiable
        twice (three times with `third_order`). Data are closed over.
      params: a pytree of real floating point arrays; leaves of other types must be
        labelled `partitions.FROZEN`.
      direction: a pytree with the paths and shapes of `params`, gradient-like: a step
        is ``params - sum_s eta_s * u_s``. It is cast to the dtypes of `params`.
      param_labels: the partition, as :func:`optax.partition` takes it; see
        :mod:`partnewton.partitions`. By default each leaf is a subset.
      third_order: whether to compute `third`.
      engine: "adjoint", the fast one, which "auto" stands for; or "jvp_of_grad", the
        reference, by one Hessian-vector product after the other.
      batch_size: how many subsets are processed at once: more is faster and takes more
        memory. By default the fast engine takes all, or, where the tangents that some
        operation writes would take more than 1 GiB, as many as that holds. With fewer
        than all of them, it goes through the loss once for each pair of blocks of half
        that size. The reference takes one by one.
      has_aux: whether `value_fn` returns ``(loss, aux)``.

    Returns:
      A :class:`Summary`, with arrays of the dtype in which the sums are accumulated:
      float32, or float64 if a parameter has it. With `has_aux`, ``(summary, aux)``.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names the argument
        and the leaf. Raised at trace time.

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
    _check_batch_size(batch_size)
    problem = _Problem(value_fn, params, direction, param_labels, has_aux)
    (value, aux), gradient, hessian, third = engines.get(engine).summarize(
        problem.loss,
        problem.leaves,
        problem.direction,
        problem.partition,
        third_order=third_order,
        batch_size=batch_size,
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
    engine: str = "auto",
    batch_size: int | None = None,
    has_aux: bool = False,
) -> Any:
    """All derivatives of a loss along the parts of a direction, up to some order.

    The tensor of order d has the entries D^d L[u_s1, ..., u_sd]; it is symmetric, and
    each multiset of subsets is computed once.

    Args:
      value_fn: the loss; see :func:`summarize`, as for all other arguments.
      params: the parameters.
      direction: the direction u.
      order: the highest order, at least 1; the loss must be differentiable so often.
      param_labels: the partition.
      engine: "adjoint", "jvp_of_grad" or "auto", which is the first of them: S passes
        for the third order where the other makes S (S + 1) / 2. From the fourth order
        on the reference does the work in any case.
      batch_size: how many subsets, and how many passes, are processed at once.
      has_aux: whether `value_fn` returns ``(loss, aux)``.

    Returns:
      A tuple of `order` arrays of shapes (S,), (S, S), (S, S, S), ... With `has_aux`,
      that tuple and aux.

    Raises:
      ValueError, TypeError: an argument does not fit.

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
    _check_batch_size(batch_size)
    problem = _Problem(value_fn, params, direction, param_labels, has_aux)
    (_, aux), tensors = engines.get(engine).derivative_tensors(
        problem.loss,
        problem.leaves,
        problem.direction,
        problem.partition,
        order=order,
        batch_size=batch_size,
    )
    return (tensors, aux) if has_aux else tensors


class _Problem:
    """The arguments of the two functions above, checked, for the engines.

    Attributes:
      loss: a function from the list of active leaves to ``(value, aux)``.
      leaves: the active leaves: those with an entry that is not frozen.
      direction: the direction at these leaves, of their shapes and dtypes.
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
        active = partition.active
        _check_equal_on_all_devices("params", [everything[i] for i in active])
        _check_equal_on_all_devices("direction", [directions[i] for i in active])

        def loss(leaves: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
            filled = list(everything)
            for i, leaf in zip(active, leaves, strict=True):
                filled[i] = leaf
            result = with_error_hints(value_fn, params)(
                jax.tree.unflatten(treedef, filled)
            )
            return _checked_loss(result, has_aux)

        self.loss = loss
        self.leaves = [jnp.asarray(everything[i]) for i in active]
        self.direction = []
        for i, leaf in zip(active, self.leaves, strict=True):
            u = jnp.asarray(directions[i])
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
            "value_fn must return a pair (loss, aux), since has_aux=True, got "
            f"{type(result).__name__}."
        )
    value, aux = result if has_aux else (result, None)
    _check_equal_on_all_devices("value_fn", value)
    if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
        raise TypeError(
            f"value_fn must return a scalar loss, got a {type(value).__name__}; say "
            "has_aux=True if it returns (loss, aux)."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value_fn must return a scalar loss, got shape {jnp.shape(value)}; "
            "take a mean or a sum."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            "value_fn must return a real floating point loss, got dtype "
            f"{jnp.result_type(value)}."
        )
    return jnp.asarray(value), aux


def _check_equal_on_all_devices(name: str, tree: PyTree) -> None:
    """Inside `shard_map`, whether each device sees the same whole.

    There each device runs a program of its own. If jax does not keep track of what
    differs between them (``check_vma=False``, `pmap`), the derivative of a mean over
    devices is that of one device alone, and nothing but wrong numbers tells so.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis in mesh.manual_axes:
        if mesh.shape[axis] == 1:
            continue
        if axis not in _varying(jax.lax.axis_index(axis)):
            raise ValueError(
                "value_fn: inside pmap, or shard_map with check_vma=False, derivatives "
                "of a mean over devices are silently wrong; use shard_map with "
                "check_vma=True, or jit with sharded arguments."
            )
        for leaf in jax.tree.leaves(tree):
            if axis in _varying(leaf):
                raise ValueError(
                    f"{name}: inside shard_map, {_DIFFERS[name].format(axis=axis)}"
                )


_DIFFERS = {
    "value_fn": "the loss differs between the devices of the mesh axis {axis!r}; "
    "return jax.lax.pmean(loss, {axis!r}).",
    "direction": "it differs between the devices of the mesh axis {axis!r}; take the "
    "gradient of jax.lax.pmean(loss, {axis!r}).",
    "params": "each device of the mesh axis {axis!r} has parameters of its own; to "
    "shard parameters, use jit with sharded arguments.",
}


def _varying(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array may differ."""
    return jax.typeof(x).manual_axis_type.varying


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
