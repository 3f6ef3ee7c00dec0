"""A physics-informed network: `subspace_newton`, L-BFGS and Adam for equal seconds.

A network takes the place of the solution of u'' = f on [0, 1], u(0) = u(1) = 0, with

    u(x) = sin(2 pi x) + 0.1 sin(10 pi x),

which has two scales. The loss is the mean square of u'' - f at fixed points, divided by
that of f; it is computed in float64. It has no noise. `subspace_newton` makes the
number of steps asked for, and the others are stopped when they have taken as long.
"""

from partnewton.demo.pinn.files import write
from partnewton.demo.pinn.problem import Problem, prepare
from partnewton.demo.pinn.run import Results, SolutionCurves, run
from partnewton.demo.pinn.tables import report

__all__ = ["Problem", "Results", "SolutionCurves", "prepare", "report", "run", "write"]
