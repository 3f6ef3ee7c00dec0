"""What to read from a state: learning rates and metrics under names."""

import jax
import optax

from partnewton._extra_args import states_of
from partnewton.lookback import ScaleByLookbackState
from partnewton.transform import ScaleByPartitionNewtonState

__all__ = ["learning_rates", "metrics"]


def learning_rates(
    state: optax.OptState, params: optax.Params | None = None
) -> dict[str, jax.Array]:
    """The learning rate of each subset, wherever in a state it stands.

    Args:
      state: the state of an optimizer that contains one
        :func:`scale_by_partition_newton`, in a chain or a wrapper.
      params: not needed, since the state knows the names of its subsets; accepted
        because what reads a state is usually called with both.

    Returns:
      ``{subset name: eta}``, in the order of :func:`partnewton.subset_names`; arrays of
      shape (), also under a trace.

    Raises:
      ValueError: `state` contains no such state, or several.

    Example:
      >>> import jax.numpy as jnp, partnewton
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = partnewton.scale_by_partition_newton()
      >>> learning_rates(tx.init(params), params)
      {'w': Array(0., dtype=float32)}
    """
    del params
    found = states_of(ScaleByPartitionNewtonState, state)
    if len(found) != 1:
        raise ValueError(
            "state must contain exactly one ScaleByPartitionNewtonState, found "
            f"{len(found)}."
        )
    (ours,) = found
    numbered = [key.split(" ", maxsplit=1) for key in ours.subsets]
    names = sorted((int(s), name) for s, name in numbered)
    return {name: ours.learning_rates[..., s] for s, name in names}


def metrics(
    state: optax.OptState, params: optax.Params | None = None
) -> dict[str, jax.Array]:
    """The state of the method as a flat dict of scalars, for any logger.

    Every scalar of the :class:`~partnewton.ScaleByPartitionNewtonState` stands under
    its own name ("loss", "predicted_decrease", "status", "notfinite_count", ...), the
    learning rate of a subset under "learning_rate/name" and its curvature <u_s, H u_s>
    under "curvature/name". Where a :func:`~partnewton.scale_by_lookback` stands in the
    chain, as in :func:`~partnewton.partition_newton`, its factor on all of the rates is
    "factor".

    Nothing here waits for the device. Called inside a jitted step, it adds some small
    outputs to it; fetch them when you write them, every hundredth step for example:
    ``jax.device_get(logged)`` gives numpy scalars that TensorBoard, Weights and Biases
    and ``print`` take.

    Args:
      state: the state of an optimizer that contains one
        :func:`~partnewton.scale_by_partition_newton`, in a chain or a wrapper.
      params: not needed; accepted as by :func:`~partnewton.learning_rates`.

    Returns:
      Arrays of shape (), also under a trace.

    Raises:
      ValueError: `state` contains no such state, or several.

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
    rates = learning_rates(state, params)
    (ours,) = states_of(
        ScaleByPartitionNewtonState, state
    )  # learning_rates has counted
    factors = [x.factor for x in states_of(ScaleByLookbackState, state)]
    scalars = {
        name: x
        for name, x in ours._asdict().items()
        if isinstance(x, jax.Array) and x.ndim == 0
    }
    curvature = ours.hessian.diagonal()
    return (
        scalars
        | ({"factor": factors[0]} if len(factors) == 1 else {})
        | {f"learning_rate/{name}": rate for name, rate in rates.items()}
        | {f"curvature/{name}": curvature[s] for s, name in enumerate(rates)}
    )
