"""Minimisation of the cubic model, a problem with S variables."""

from partnewton.cubic._solver import CubicSolution, CubicStatus, solve_cubic

__all__ = ["CubicSolution", "CubicStatus", "solve_cubic"]
