"""Minimisers of the cubic model: the S x S problems behind the learning rates."""

from partnewton.cubic._solver import (
    CubicSolution,
    CubicStatus,
    _minimise_in_own_dtype,  # noqa: F401 (what runs on TPU, for the tests)
    _solve,  # noqa: F401
    solve_cubic,
)

__all__ = ["CubicSolution", "CubicStatus", "solve_cubic"]
