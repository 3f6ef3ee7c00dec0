"""Transformations that produce update directions.

Any transformation of optax can produce a direction. `orthogonal_momentum` is the one of
Muon. The two other functions of this module wrap a direction: `skip_nonfinite`, so that
updates that are not finite and frozen parameters do not enter its state, and
`equilibrated`, for matrices whose rows or columns have different scales.
"""

from partnewton.directions.equilibration import EquilibratedState, equilibrated
from partnewton.directions.finite import KeepsFinite as KeepsFinite
from partnewton.directions.finite import skip_nonfinite
from partnewton.directions.orthogonal import orthogonal_momentum

__all__ = [
    "EquilibratedState",
    "equilibrated",
    "orthogonal_momentum",
    "skip_nonfinite",
]
