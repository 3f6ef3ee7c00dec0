"""The cubic model and its minimiser, an S x S problem for the learning rates.

With M(y) = H + y D^2, a step eta minimises the model

    m(eta) = - g . eta + 1/2 eta' H eta + damping/6 ||D eta||^3

if and only if M(y) eta = g, y = damping/2 ||D eta|| and M(y) is positive semidefinite.
So the problem has one unknown, the shift y. It is solved by the method of Moré and
Sorensen for trust regions, with the radius ||D eta|| = 2 y / damping, as in the cubic
regularisation of Cartis, Gould and Toint:

* The condition "M(y) is positive definite and ||D M(y)^-1 g|| <= 2 y / damping" holds
  for all y above some y*, the solution, also in the hard case. A bracket of y* is kept.
* If M(y) has a Cholesky factor, the next y is a secular step. If it has none, or if the
  step leaves the bracket, the bracket is bisected.
* In the hard case M(y*) is singular, and M^-1 g is too short. A multiple of a null
  vector z of M is added: eta = M^-1 g + tau z.
* For each y with M(y) positive definite, weak duality bounds the model from below,

      m(eta) >= - 1/2 g' M(y)^-1 g - y x^2 / 6    for all eta,  x = 2 y / damping,

  so that the relative gap of any step is known. The gap alone decides when to stop and
  whether to add a multiple of z. (The bound is the minimum of - g . eta + 1/2 eta' M
  eta plus that of damping/6 r^3 - y/2 r^2, r = ||D eta||.)

There are no absolute tolerances. The problem is first scaled by powers of two, and M(y)
is scaled to a diagonal of order 1 before it is factored. So subsets rescaled by powers
of two give the same bits, and subsets with a zero in D need no special treatment.

References:
  J. J. Moré and D. C. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat.
    Comput. 4 (1983).
  C. Cartis, N. I. M. Gould and Ph. L. Toint, "Adaptive cubic regularisation methods for
    unconstrained optimization. Part I", Math. Program. 127 (2011).
  P. Wolinski, arXiv 2312.03885: the model.
"""

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partnewton._strictness import at_least_float32
from partnewton.cubic._derivative import solution_tangent
from partnewton.cubic._factors import factor, scaled_to_ones
from partnewton.cubic._powers import ldexp, round_to
from partnewton.cubic._reductions import reduce_together
from partnewton.cubic._search import Best, best_steps, converged
from partnewton.cubic._steps import ROUNDING_UNITS, appraise
from partnewton.cubic._units import NormalizedModel, to_own_units

__all__ = ["CubicSolution", "CubicStatus", "solve_cubic"]


class CubicStatus(enum.IntEnum):
    """The kind of solution that :func:`solve_cubic` found.

    Attributes:
      INTERIOR: the minimiser, ``M^-1 g`` with M positive definite.
      HARD_CASE: the minimiser, where M is singular to working precision; a null vector
        of M was added to ``M^-1 g``. If its sign is arbitrary, there are two
        minimisers, one of which is returned (always the same).
      KERNEL_FROZEN: the Hessian is not positive definite on the subsets with ``scale ==
        0``, so that the model has no (unique) minimum. Their learning rates are zero;
        the other ones minimise the model restricted to the other subsets.
      INVALID: all learning rates are zero, because an argument is not finite, `scale`
        or `damping` is negative, or no step is certain to decrease the model in
        floating-point arithmetic.
    """

    INTERIOR = 0
    HARD_CASE = 1
    KERNEL_FROZEN = 2
    INVALID = 3


class CubicSolution(NamedTuple):
    """The minimiser of the cubic model.

    Attributes:
      learning_rates: eta, shape (S,).
      radius: ``||scale * eta||``, shape ().
      model_decrease: the decrease of the model from 0 to eta, ``-m(eta) >= 0``, shape
        (). If this or the radius overflows, it is the largest finite number.
      status: a :class:`CubicStatus`, int32, shape ().
    """

    learning_rates: jax.Array
    radius: jax.Array
    model_decrease: jax.Array
    status: jax.Array


def solve_cubic(
    gradient: jax.typing.ArrayLike,
    hessian: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    damping: jax.typing.ArrayLike,
) -> CubicSolution:
    """Minimise the cubic model of the loss over the learning rates.

    With g, H the gradient and the Hessian and D = diag(scale), the model is

        m(eta) = - g . eta + 1/2 eta' H eta + damping/6 ||D eta||^3,

    and its global minimiser, also for an indefinite H, is

        eta = (H + damping/2 r D^2)^-1 g,    r = ||D eta||,

    with the largest r that solves this equation. For this r the matrix is positive
    semidefinite. Learning rates may be negative.

    Args:
      gradient: g, shape (S,).
      hessian: H, shape (S, S); its symmetric part is used.
      scale: the diagonal of D, nonnegative, shape (S,). In the paper's model it is the
        cube root of the absolute third derivative. For subsets with scale 0, only H
        bounds the step.
      damping: the coefficient of the cubic term, nonnegative, shape (). With 0 the
        cubic term vanishes, as with ``scale = 0``, and the result is Newton's step.

    Returns:
      A :class:`CubicSolution`. Its dtype is the promoted dtype of the three arrays, and
      at least float32. The computation uses float64, except on TPU, where it uses the
      dtype of the result.

    Raises:
      ValueError: if the shapes do not match, or `damping` is a negative number. If a
        negative `damping` is traced or an array, the status is INVALID.

    Example:
      >>> gradient, scale = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])
      >>> hessian = jnp.array([[-1.0, 0.0], [0.0, 4.0]])  # a saddle
      >>> solution = solve_cubic(gradient, hessian, scale, damping=4.0)
      >>> print(solution.learning_rates, solution.model_decrease)
      [1.  0.5] 1.3333334
      >>> CubicStatus(int(solution.status)).name
      'INTERIOR'

    References:
      P. Wolinski, arXiv 2312.03885; J. J. Moré and D. C. Sorensen (1983); C. Cartis,
      N. I. M. Gould and Ph. L. Toint (2011).
    """
    if isinstance(damping, int | float) and damping < 0:
        raise ValueError(f"damping must not be negative, got {damping}.")
    arrays = [jnp.asarray(a) for a in (gradient, hessian, scale, damping)]
    _check_shapes(*arrays)
    dtype = at_least_float32(jnp.result_type(*arrays[:3]))
    return _solve(*(a.astype(dtype) for a in arrays))


def _check_shapes(g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array) -> None:
    if g.ndim != 1 or g.size == 0:
        raise ValueError(f"gradient must have a shape (S,), S > 0, got {g.shape}.")
    S = g.size
    for name, array, shape in [
        ("hessian", H, (S, S)),
        ("scale", d, (S,)),
        ("damping", damping, ()),
    ]:
        if array.shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape}, to match the gradient of shape "
                f"{g.shape}, got {array.shape}."
            )


@jax.custom_jvp
def _solution(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> CubicSolution:
    if g.dtype == jnp.float64:
        return _minimise(g, H, d, damping, g.dtype)
    return lax.platform_dependent(
        g, H, d, damping, tpu=_minimise_in_own_dtype, default=_minimise_in_float64
    )


@_solution.defjvp
def _solution_jvp(
    primals: tuple, tangents: tuple
) -> tuple[CubicSolution, CubicSolution]:
    """By the implicit function theorem, from the stationarity of the model at eta."""
    g, H, d, damping = primals
    solution = _solution(*primals)
    eta, radius, _, status = solution
    d = jnp.where(damping > 0, d, 0)
    inactive = (g == 0) & (d == 0) & jnp.all(H + H.T == 0, axis=0)
    live = (d > 0) | (~inactive & (status != CubicStatus.KERNEL_FROZEN))
    live &= status != CubicStatus.INVALID
    arrays = solution_tangent((g, H, d, damping), tangents, eta, radius, live)
    status_tangent = np.zeros(status.shape, jax.dtypes.float0)
    return solution, CubicSolution(*arrays, status_tangent)


_solve = jax.jit(_solution)


def _minimise_in_own_dtype(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> CubicSolution:
    """The solution on TPU, which has no float64 arithmetic in hardware."""
    return _minimise(g, H, d, damping, g.dtype)


def _minimise_in_float64(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> CubicSolution:
    # Inside this block matrix products are multiply-and-sum: a transformation of the
    # traced code, such as vmap, runs outside of it, where dot_general would fail.
    with jax.enable_x64(True):
        wide = (a.astype(jnp.float64) for a in (g, H, d, damping))
        return _minimise(*wide, g.dtype)


def _minimise(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array, dtype: jnp.dtype
) -> CubicSolution:
    """`solve_cubic` in the precision of the arguments, with a result in `dtype`."""
    model, valid, kernel, A = _prepared(g, H, d, damping)
    L = factor(A)
    kernel_pd, scaled_model, unit = _in_own_units(model, kernel, L)
    best = best_steps(scaled_model)
    solution = functools.partial(_solution_of, dtype=dtype)
    return solution(model, valid, kernel_pd, unit, best)


class _Model(NamedTuple):
    """Valid arguments of :func:`solve_cubic`, with a symmetric Hessian."""

    g: jax.Array
    H: jax.Array
    d: jax.Array
    damping: jax.Array


def _prepared(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> tuple[_Model, jax.Array, jax.Array, jax.Array]:
    """The model, its validity, the kernel of D, and the scaled Hessian on it."""
    sizes = jnp.abs(H), jnp.abs(g), jnp.where(d >= 0, d, jnp.inf)
    largest = reduce_together(maxima=sizes)
    valid = functools.reduce(jnp.logical_and, map(jnp.isfinite, (*largest, damping)))
    valid &= damping >= 0
    g, H, d, damping = (jnp.where(valid, a, 0) for a in (g, H, d, damping))
    H = 0.5 * H + 0.5 * H.T
    d = jnp.where(damping > 0, d, 0)
    inactive = (g == 0) & (d == 0) & jnp.all(H == 0, axis=0)  # these rates stay 0
    kernel = (d == 0) & ~inactive
    A, _ = scaled_to_ones(H, kernel)
    return _Model(g, H, d, damping), valid, kernel, A


def _in_own_units(
    model: _Model, kernel: jax.Array, L: jax.Array
) -> tuple[jax.Array, NormalizedModel, jax.Array]:
    """Whether the kernel is positive definite, the scaled model and its unit."""
    # Positive definite beyond the rounding errors of its factor L.
    rounding = ROUNDING_UNITS * len(L) * jnp.finfo(L.dtype).eps
    kernel_pd = jnp.all(jnp.diagonal(L) ** 2 > rounding)
    live = (model.d > 0) | (kernel & kernel_pd)
    return kernel_pd, *to_own_units(*model, live)


def _solution_of(
    model: _Model,
    valid: jax.Array,
    kernel_pd: jax.Array,
    unit: jax.Array,
    best: Best,
    *,
    dtype: jnp.dtype,
) -> CubicSolution:
    # Rounding of the step, or of curvatures close to 0, must not increase the model.
    steps = round_to(ldexp(best.steps, -unit[None, :]), dtype)
    appraised = jax.vmap(functools.partial(appraise, *model))(steps)
    hard = ~converged(best.plain_gap) & (best.completed_gap < best.plain_gap)
    hard &= appraised.descends[1]
    step = jax.tree.map(lambda a: jnp.where(hard, a[1], a[0]), appraised)
    found = valid & jnp.isfinite(best.plain_gap) & step.descends

    status = jnp.where(hard, CubicStatus.HARD_CASE, CubicStatus.INTERIOR)
    status = jnp.where(kernel_pd, status, CubicStatus.KERNEL_FROZEN)
    status = jnp.where(found, status, CubicStatus.INVALID)
    return CubicSolution(
        jnp.where(found, step.eta, 0).astype(dtype),
        _saturate(jnp.where(found, step.radius, 0), dtype),
        _saturate(jnp.where(found, step.decrease, 0), dtype),
        status.astype(jnp.int32),
    )


def _saturate(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.minimum(x, float(jnp.finfo(dtype).max)).astype(dtype)
