"""Exact derivatives of a loss along directions, per subset of the parameters.

Let u_s be the direction u on subset s and zero elsewhere. All quantities of this module
are derivatives at 0 of the function of S variables

    phi(eta) = L(params - sum_s eta_s * u_s)

up to the sign: D^d L[u_s1, ..., u_sd] is (-1)^d times a derivative of phi of order d
(P. Wolinski, arXiv 2312.03885). With K directions u^1, ..., u^K, phi is a function of
K S variables, phi(eta) = L(params - sum_ks eta_ks * u^k_s). The derivatives are
computed by :mod:`partnewton.engines`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from partnewton import engines, partitions
from partnewton._engine_arguments import EngineArguments

__all__ = ["Summary", "derivative_tensors", "summarize"]

PyTree = Any


class Summary(NamedTuple):
    """Derivatives of a loss along a direction, per subset and per pair of subsets.

    With K directions, each axis of length S is preceded by one of length K.

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
    num_directions: int | None = None,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    third_order: bool = True,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> Any:
    """Exact derivatives of a loss along directions, to second or third order.

    With u_s the direction on subset s and zero elsewhere, and H the Hessian of the loss
    L at `params`, the summary consists of L and

        gradient_s = <dL/dparams, u_s>,  hessian_st = <u_s, H u_t>,
        third_s    = D^3 L[u_s, u_s, u_s].

    With K directions u^k, the entries are those of all pairs (k, s): gradient (K, S),
    hessian (K, S, K, S) and third (K, S). They are computed together, with K tangents
    per leaf.

    A summary is linear in the loss: the summary of a mean over micro-batches is the
    mean of their summaries.

    Args:
      value_fn: the loss, a function from `params` to a real scalar, differentiable
        twice (three times with `third_order`). Its data are constants.
      params: a pytree of real floating point arrays; leaves of other types must be
        labelled `partitions.FROZEN`.
      direction: a pytree with the paths and shapes of `params`. It has the sign of a
        gradient: a step is ``params - sum_s eta_s * u_s``. It is cast to the dtypes of
        `params`. For K directions, a list or tuple of K such pytrees, or with
        `num_directions` one pytree whose leaves have a leading axis of length K.
      num_directions: K, by default the length of a list of directions; a single
        direction has no axis of length K.
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
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) * p["b"]
      >>> s = summarize(loss, params, jax.grad(loss)(params))
      >>> print(s.gradient)
      [180.  25.]
      >>> print(s.hessian)
      [[1080.  300.]
       [ 300.    0.]]

      The gradient and the parameters as two directions:

      >>> s = summarize(loss, params, [jax.grad(loss)(params), params])
      >>> print(s.gradient)
      [[180.  25.]
       [ 30.  15.]]
      >>> s.hessian.shape
      (2, 2, 2, 2)

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    arguments = EngineArguments(
        value_fn, params, direction, num_directions, param_labels, has_aux
    )
    (value, aux), *derivatives = engines.get(engine).summarize(
        arguments.loss,
        arguments.leaves,
        arguments.directions,
        arguments.partition,
        third_order=third_order,
    )
    derivatives = [arguments.shaped(x) for x in derivatives]
    summary = Summary(value.astype(derivatives[0].dtype), *derivatives)
    return (summary, aux) if has_aux else summary


def derivative_tensors(
    value_fn: Callable[..., Any],
    params: PyTree,
    direction: PyTree,
    *,
    order: int = 3,
    num_directions: int | None = None,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> Any:
    """All mixed derivatives of a loss along directions, up to a given order.

    The tensor of order d has the entries D^d L[u_s1, ..., u_sd]. It is symmetric, and
    each distinct entry is computed once.

    Args:
      value_fn: the loss, differentiable `order` times; this and the other arguments are
        those of :func:`summarize`.
      params: the parameters.
      direction: the direction u, or K directions.
      order: the highest order, at least 1.
      num_directions: K, as for :func:`summarize`.
      param_labels: the partition.
      engine: "adjoint", "jvp_of_grad", or "auto" for "adjoint". For the third order,
        "adjoint" makes S passes over the loss, and "jvp_of_grad" S (S + 1) / 2; with K
        directions, S is K S here.
        Tensors of order 4 and higher are always computed by "jvp_of_grad".
      has_aux: whether `value_fn` returns ``(loss, aux)``.

    Returns:
      A tuple of `order` arrays of shapes (S,), (S, S), (S, S, S), ..., or with K
      directions (K, S), (K, S, K, S), ...; with `has_aux`, ``(tuple, aux)``.

    Raises:
      ValueError, TypeError: an argument is invalid.

    Example:
      >>> import jax.numpy as jnp
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
    arguments = EngineArguments(
        value_fn, params, direction, num_directions, param_labels, has_aux
    )
    (_, aux), tensors = engines.get(engine).derivative_tensors(
        arguments.loss,
        arguments.leaves,
        arguments.directions,
        arguments.partition,
        order=order,
    )
    tensors = tuple(arguments.shaped(x) for x in tensors)
    return (tensors, aux) if has_aux else tensors
