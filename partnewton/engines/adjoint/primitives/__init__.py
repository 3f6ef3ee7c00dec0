"""The rules of the engine, one file for each kind of operation."""

from partnewton.engines.adjoint.primitives.bilinear import BILINEAR, is_product
from partnewton.engines.adjoint.primitives.elementwise import (
    ELEMENTWISE,
    is_real_function,
)
from partnewton.engines.adjoint.primitives.generic import GENERIC
from partnewton.engines.adjoint.primitives.linear import LINEAR, PIECEWISE_LINEAR
from partnewton.engines.adjoint.primitives.scan import SCAN

__all__ = [
    "BILINEAR",
    "ELEMENTWISE",
    "GENERIC",
    "LINEAR",
    "PIECEWISE_LINEAR",
    "SCAN",
    "is_product",
    "is_real_function",
]
