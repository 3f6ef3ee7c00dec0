"""Decoupled weight decay, scaled by the lengths of the steps."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton._checks import check_number
from partnewton._measured_direction import MeasuredDirection

__all__ = ["Mask", "WeightDecay"]

Mask = Any | Callable[[optax.Params], Any]


class WeightDecay:
    """The term ``weight_decay * l_s * theta_s`` of the update of each subset.

    l_s is the length of the step, the RMS change of the entries of subset s. The
    product weight_decay * l_s is at most 1, so that a parameter never changes its sign
    by decay.

    Attributes:
      is_zero: whether the decay is the number 0.
    """

    def __init__(self, weight_decay: jax.typing.ArrayLike, mask: Mask | None):
        check_number("weight_decay", weight_decay)
        if isinstance(weight_decay, int | float | np.number) and weight_decay > 1:
            warnings.warn(
                f"weight_decay={weight_decay} limits the RMS of the parameters of each "
                f"subset to 1 / weight_decay = {1 / weight_decay:.2g}. It is "
                "multiplied by the lengths of the steps, as AdamW's by its learning "
                "rate; usual values are 0.01 to 0.1.",
                UserWarning,
                stacklevel=3,
            )
        self.is_zero = isinstance(weight_decay, int | float) and weight_decay == 0
        self._weight_decay, self._mask = weight_decay, mask

    def added_to(
        self, scaled: list[jax.Array], direction: MeasuredDirection, eta: jax.Array
    ) -> list[jax.Array]:
        """The updates ``eta_s * u_s`` plus the decay, both with a gradient's sign."""
        if self.is_zero:
            return scaled
        params, partition = jax.tree.leaves(direction.params), direction.partition
        rates = jnp.minimum(self._weight_decay * direction.lengths(eta), 1)
        terms = partition.scaled(params, rates.astype(partition.dtype))
        is_decayed = self._decayed_leaves(direction.params)
        result = list(scaled)
        for i in partition.active:
            if is_decayed[i]:
                result[i] = result[i] + terms[i]
        return result

    def _decayed_leaves(self, params: optax.Params) -> list[bool]:
        """Whether each leaf of the parameters is decayed."""
        mask = self._mask
        if mask is None:
            return [True] * len(jax.tree.leaves(params))
        # A module may be callable and yet be a mask, as for optax.masked.
        if any(map(callable, jax.tree.leaves(mask))):
            mask = mask(params)
        try:
            leaves = jax.tree.leaves(jax.tree.broadcast(mask, params))
        except ValueError as error:
            raise ValueError(
                "mask must have the structure of the parameters, or of a prefix of "
                f"it: {error}"
            ) from error
        for leaf in leaves:
            if not isinstance(leaf, bool | np.bool_):
                raise TypeError(
                    "mask must contain True for leaves with weight decay and False for "
                    f"others, got {leaf!r}."
                )
        return leaves
