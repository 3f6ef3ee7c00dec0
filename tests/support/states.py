"""States of the library, found in those of a whole optimizer."""

from typing import Any

import jax

import partnewton as pn

NewtonState = pn.ScaleByPartitionNewtonState | pn.ScaleBySubspaceNewtonState


def newton_state(state: Any) -> NewtonState:
    """The state of our transformation, at any depth of a chain."""

    def is_one(x: Any) -> bool:
        return isinstance(x, NewtonState)

    return next(x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x))
