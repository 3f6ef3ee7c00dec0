"""Ways of computing the same that XLA's CPU backend is fast at.

The engine is right without them: inside of :func:`disabled` everything is computed in
the plain way. What is slow, and why, is written in each file. Arrays that may be
sharded, and other devices, always take the plain way.
"""

from partnewton.engines.adjoint.lowerings.memory import (
    concatenate,
    in_blocks,
    outlined,
)
from partnewton.engines.adjoint.lowerings.products import in_order
from partnewton.engines.adjoint.lowerings.reductions import total
from partnewton.engines.adjoint.lowerings.rowwise import of_rows, transposable
from partnewton.engines.adjoint.lowerings.switch import disabled

__all__ = [
    "concatenate",
    "disabled",
    "in_blocks",
    "in_order",
    "of_rows",
    "outlined",
    "total",
    "transposable",
]
