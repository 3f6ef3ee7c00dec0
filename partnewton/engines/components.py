"""The components of several directions: one for each direction and each subset."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.partitions import Partition

__all__ = ["Components"]


class Components:
    """The restrictions of K directions to S subsets, with zeros elsewhere.

    Component k S + s is direction k on subset s.

    Attributes:
      directions: an array (K, *shape) for each leaf.
      partition: the partition of the leaves.
    """

    def __init__(self, directions: Sequence[jax.Array], partition: Partition):
        self.directions = list(directions)
        self.partition = partition

    @property
    def num_directions(self) -> int:
        """K; one if there are no leaves."""
        return len(self.directions[0]) if self.directions else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(K, S)."""
        return self.num_directions, self.partition.size

    @property
    def size(self) -> int:
        """The number of components, K S."""
        return self.num_directions * self.partition.size

    @property
    def dtype(self) -> np.dtype:
        """The dtype of sums over a subset."""
        return self.partition.dtype

    def __getitem__(self, m: jax.typing.ArrayLike) -> list[jax.Array]:
        """The leaves of one component, whose number may be traced."""
        k, s = m // self.partition.size, m % self.partition.size
        if self.num_directions == 1:
            k = 0
        return self.partition.restrict([u[k] for u in self.directions], s)

    def inner(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The inner product of some leaves with each component, (K S,)."""
        products = [
            self.partition.inner(leaves, [u[k] for u in self.directions])
            for k in range(self.num_directions)
        ]
        return jnp.concatenate(products)
