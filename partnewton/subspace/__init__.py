"""Newton's method in a small subspace per subset of the parameters."""

from partnewton.subspace.preset import subspace_newton
from partnewton.subspace.transform import (
    ScaleBySubspaceNewtonState,
    scale_by_subspace_newton,
)

__all__ = [
    "ScaleBySubspaceNewtonState",
    "scale_by_subspace_newton",
    "subspace_newton",
]
