"""The incoming updates of a transformation as a direction, measured in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import partitions
from partnewton.engines.compat import as_call

__all__ = ["MeasuredDirection"]


class MeasuredDirection:
    """The incoming updates, and their norms per subset, computed in one pass.

    Attributes:
      params: the parameters.
      partition: of the parameters.
      treedef: of the updates.
      is_measurable: whether all of the updates are finite, and not all of them zero.
      scale: the norm or RMS by which each subset is divided, (S,); ones if the
        direction is not normalised.
    """

    def __init__(
        self,
        updates: optax.Updates,
        params: optax.Params,
        param_labels: partitions.ParamLabels,
        normalize: str | None,
    ):
        self.partition = partitions.partition_of(params, param_labels)
        self._updates, self.params = updates, params
        self._leaves = partitions.checked_direction(
            updates, params, "updates", self.partition
        )
        self.treedef = jax.tree.structure(updates)
        self._params_leaves, self._params_treedef = jax.tree.flatten(params)
        active = [jnp.asarray(self._leaves[i]) for i in self.partition.active]
        # Not inlined: XLA would fuse the sums into each kernel that reads one of them.
        squares = as_call(self.partition.of_active().inner)(active, active)
        self._norms = jnp.sqrt(squares)
        self.is_measurable = jnp.isfinite(jnp.sum(squares)) & jnp.any(squares > 0)
        self._normalize = normalize
        self._unit = jnp.ones_like(squares)
        if normalize is not None:
            counts = self.partition.counts(self._leaves)
            unit_norm = np.sqrt(counts) if normalize == "rms" else 1.0
            is_zero = squares == 0
            unit = jnp.where(is_zero, 0, unit_norm / jnp.where(is_zero, 1, self._norms))
            self._unit = unit.astype(squares.dtype)
        moves = self._unit > 0
        self.scale = jnp.where(moves, 1 / jnp.where(moves, self._unit, 1), 0)

    def normalized(self) -> optax.Updates:
        """The direction along which the loss is measured."""
        if self._normalize is None:
            return self._updates
        unit = self.scaled(jnp.ones_like(self._unit))
        return jax.tree.unflatten(self.treedef, unit)

    def scaled(self, eta: jax.Array, where: jax.Array | None = None) -> list[jax.Array]:
        """eta_s * u_s, in the dtypes of the parameters; zero if not `where`."""
        leaves, factors = self._leaves, eta * self._unit
        if where is not None:
            factors = jnp.where(where, factors, 0)
            leaves = list(leaves)
            for i in self.partition.active:
                leaves[i] = jnp.where(where, leaves[i], 0)
        return self.partition.scaled(leaves, factors, self._params_leaves)

    def parameters_after(self, eta: jax.Array) -> optax.Params:
        """The parameters after the step ``sum_s eta_s * u_s``."""
        steps = jax.tree.unflatten(self._params_treedef, self.scaled(eta))
        return self.partition.moved(self.params, steps)

    def lengths(self, eta: jax.Array) -> jax.Array:
        """The RMS change of the entries of each subset in a step with `eta`, (S,).

        If the direction is normalised, a subset whose direction is zero counts as one
        whose direction is not.
        """
        if self._normalize == "rms":
            return jnp.abs(eta)
        norms = 1 if self._normalize == "norm" else self._norms
        counts = self.partition.counts(self._leaves)
        return jnp.abs(eta) * norms / np.sqrt(counts).astype(eta.dtype)

    def is_finite(self, eta: jax.Array) -> jax.Array:
        """Whether eta_s * u_s is finite, in the dtypes of the parameters, for all s."""
        largest = np.full(self.partition.size, np.inf)
        for i in self.partition.active:
            limit = float(jnp.finfo(self._params_leaves[i].dtype).max)
            subsets = np.unique(self.partition.labels[i])
            subsets = subsets[subsets != partitions.FROZEN]
            largest[subsets] = np.minimum(largest[subsets], limit)
        largest = np.minimum(largest, float(jnp.finfo(eta.dtype).max))
        return jnp.all(jnp.abs(eta * self._unit) * self._norms <= largest)
