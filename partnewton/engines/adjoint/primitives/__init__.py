"""The rules of the engine, one file for each kind of operation."""

from partnewton.engines.adjoint.primitives.bilinear import bilinear
from partnewton.engines.adjoint.primitives.elementwise import (
    ELEMENTWISE,
    is_real_function,
)
from partnewton.engines.adjoint.primitives.generic import GENERIC
from partnewton.engines.adjoint.primitives.linear import LINEAR, PIECEWISE_LINEAR
from partnewton.engines.adjoint.primitives.scan import SCAN

__all__ = [
    "ELEMENTWISE",
    "GENERIC",
    "LINEAR",
    "PIECEWISE_LINEAR",
    "SCAN",
    "bilinear",
    "is_real_function",
]
