"""States of the library, found in those of a whole optimizer."""

from typing import Any

import jax

import partnewton as pn


def newton_state(state: Any) -> pn.ScaleByPartitionNewtonState:
    """The state of `scale_by_partition_newton`, at any depth of a chain."""

    def is_one(x: Any) -> bool:
        return isinstance(x, pn.ScaleByPartitionNewtonState)

    return next(x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x))
