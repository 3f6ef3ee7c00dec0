"""Equivalent computations that are faster with XLA's backends, mostly that for CPUs.

The engine is correct without them: inside the context :func:`disabled`, none is used.
Each file explains what is slow otherwise, and why. They are for CPUs, and for arrays
that are not sharded; only inner products of long rows have others, for GPUs.
"""

from partnewton.engines.adjoint.lowerings.memory import (
    concatenate,
    in_blocks,
    in_slices,
    outlined,
)
from partnewton.engines.adjoint.lowerings.products import in_order
from partnewton.engines.adjoint.lowerings.reductions import sum_over
from partnewton.engines.adjoint.lowerings.rowwise import function_of_rows, transposable
from partnewton.engines.adjoint.lowerings.switch import disabled

__all__ = [
    "concatenate",
    "disabled",
    "function_of_rows",
    "in_blocks",
    "in_order",
    "in_slices",
    "outlined",
    "sum_over",
    "transposable",
]
