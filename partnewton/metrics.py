"""Learning rates and other scalars, read from the state of an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton.iterate_average import TrackAverageState
from partnewton.lookback import ScaleByLookbackState
from partnewton.subspace import ScaleBySubspaceNewtonState
from partnewton.transform import ScaleByPartitionNewtonState

__all__ = ["averaged_params", "learning_rates", "metrics", "newton_state"]


def learning_rates(
    state: optax.OptState, params: optax.Params | None = None
) -> dict[str, jax.Array]:
    """The learning rate of each subset.

    Args:
      state: the state of an optimizer that contains one
        :func:`~partnewton.scale_by_partition_newton` or one
        :func:`~partnewton.scale_by_subspace_newton`, in a chain or in a wrapper.
      params: ignored, since the state contains the names of the subsets.

    Returns:
      ``{subset name: eta}``, in the order of :func:`partnewton.subset_names`; arrays of
      shape (), traced if `state` is.

    Raises:
      ValueError: `state` contains no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = partnewton.scale_by_partition_newton()
      >>> learning_rates(tx.init(params), params)
      {'w': Array(0., dtype=float32)}
    """
    del params
    found = _only_state(state)
    return {name: found.learning_rates[..., s] for name, s in _names(found).items()}


def metrics(
    state: optax.OptState, params: optax.Params | None = None
) -> dict[str, jax.Array]:
    """The state as a flat dict of scalars, for any logger.

    It contains every scalar of the :class:`~partnewton.ScaleByPartitionNewtonState`
    or :class:`~partnewton.ScaleBySubspaceNewtonState` under its own name ("loss",
    "predicted_decrease", "notfinite_count", ...), and for each subset the learning rate
    under "learning_rate/name" and, for the first of the two, the curvature <u_s, H u_s>
    under "curvature/name". If the chain contains one
    :func:`~partnewton.scale_by_lookback`, as :func:`~partnewton.partition_newton` does,
    its step-size multiplier is "factor".

    This function does not wait for the device. It can be called inside a jitted step,
    which then returns additional small arrays. Fetch them when they are logged, for
    example every hundred steps: ``jax.device_get(logged)`` returns NumPy scalars, which
    TensorBoard, Weights and Biases and ``print`` accept.

    Args:
      state: the state of an optimizer that contains one
        :func:`~partnewton.scale_by_partition_newton` or one
        :func:`~partnewton.scale_by_subspace_newton`, in a chain or in a wrapper.
      params: ignored, as by :func:`~partnewton.learning_rates`.

    Returns:
      Arrays of shape (), traced if `state` is. For the state of an ensemble, made by
      :func:`jax.vmap`, they have its leading axis.

    Raises:
      ValueError: `state` contains no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> tx = partnewton.scale_by_partition_newton()
      >>> params = {"w": jnp.array(3.0)}
      >>> loss = lambda params: params["w"] ** 2
      >>> state = tx.init(params)
      >>> _, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      >>> logged = jax.device_get(metrics(state, params))
      >>> print(logged["loss"], logged["learning_rate/w"], logged["curvature/w"])
      9.0 0.5 72.0
    """
    found = _only_state(state)
    factors = [x.factor for x in _states_of(ScaleByLookbackState, state)]
    leading = np.ndim(found.learning_rates) - 1  # axes of an ensemble
    numbers = {
        name: x
        for name, x in found._asdict().items()
        if isinstance(x, jax.Array | np.ndarray | np.generic) and np.ndim(x) == leading
    }
    factor = {"factor": factors[0]} if len(factors) == 1 else {}
    rates, names = found.learning_rates, _names(found)
    per_subset = {f"learning_rate/{name}": rates[..., s] for name, s in names.items()}
    if isinstance(found, ScaleByPartitionNewtonState):
        hessian = found.hessian
        per_subset |= {f"curvature/{x}": hessian[..., s, s] for x, s in names.items()}
    return numbers | factor | per_subset


def newton_state(state: optax.OptState) -> ScaleByPartitionNewtonState:
    """The state of :func:`~partnewton.scale_by_partition_newton` inside another one.

    Args:
      state: the state of an optimizer that contains one
        :func:`~partnewton.scale_by_partition_newton`, in a chain or in a wrapper.

    Returns:
      A :class:`~partnewton.ScaleByPartitionNewtonState`; its last summary is
      ``newton_state(state).summary``.

    Raises:
      ValueError: `state` contains no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> tx = partnewton.partition_newton()
      >>> print(newton_state(tx.init({"w": jnp.zeros(2)})).learning_rates)
      [0.]
    """
    return _only_state(state, (ScaleByPartitionNewtonState,))


def averaged_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The average of the parameters that :func:`~partnewton.track_average` keeps.

    Args:
      state: the state of an optimizer that contains one
        :func:`~partnewton.track_average`, in a chain or in a wrapper.
      params: the current parameters, for the dtypes and the leaves that have no
        average.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: `state` contains no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> tx = optax.chain(optax.sgd(0.1), partnewton.track_average())
      >>> params = {"w": jnp.ones(2)}
      >>> print(averaged_params(tx.init(params), params)["w"])
      [1. 1.]
    """
    found = _states_of(TrackAverageState, state)
    if len(found) != 1:
        raise ValueError(
            f"state must contain exactly one TrackAverageState, found {len(found)}; "
            "end the chain with partnewton.track_average()."
        )
    # By leaves: the trees of an nnx state and of its parameters can differ.
    averages = jax.tree.leaves(found[0].average, is_leaf=_is_none)
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_none)
    return treedef.unflatten(
        x if average is None else average.astype(jnp.result_type(x))
        for average, x in zip(averages, leaves, strict=True)
    )


_KINDS = ScaleByPartitionNewtonState, ScaleBySubspaceNewtonState


def _only_state(state: optax.OptState, kinds: tuple[type, ...] = _KINDS) -> Any:
    found = [x for kind in kinds for x in _states_of(kind, state)]
    if len(found) != 1:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"state must contain exactly one {names}, found {len(found)}.")
    return found[0]


def _is_none(node: Any) -> bool:
    return node is None


def _states_of(kind: type, state: optax.OptState) -> list[Any]:
    """All states of a NamedTuple type, wherever in `state` they are.

    The optimizer of nnx stores each array of its state in a variable; these are
    replaced by the arrays.
    """
    found = optax.tree.get_all_with_path(state, kind.__name__)
    return [jax.tree.map(_unwrap, x, is_leaf=_is_nnx_variable) for _, x in found]


def _is_nnx_variable(node: Any) -> bool:
    """Whether this is an nnx variable, without an import of flax."""
    return hasattr(node, "get_value") and hasattr(node, "get_metadata")


def _unwrap(leaf: Any) -> Any:
    return leaf.get_value() if _is_nnx_variable(leaf) else leaf


def _names(state: Any) -> dict[str, int]:
    """The names of the subsets in order, with their indices."""
    numbered = [key.split(" ", maxsplit=1) for key in state.subsets]
    return {name: s for s, name in sorted((int(s), name) for s, name in numbered)}
