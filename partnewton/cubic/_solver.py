"""The cubic model and its minimiser: the S x S problem behind the learning rates.

With M(y) = H + y D^2, a step eta minimises the model

    m(eta) = - g . eta + 1/2 eta' H eta + damping/6 ||D eta||^3

if and only if M(y) eta = g, y = damping/2 ||D eta|| and M(y) is positive semidefinite.
So one number is sought, the shift y; what follows is the method of Moré and Sorensen
for trust regions, with ||D eta|| = 2 y / damping in the place of the fixed radius, as
in the cubic regularisation of Cartis, Gould and Toint:

* "M(y) is positive definite and ||D M(y)^-1 g|| <= 2 y / damping" holds from some y on;
  the infimum y* of these y is the solution, in the hard case too. Bracket it.
* Where M(y) has a Cholesky factor, a secular step leads to the next y; where it has
  none, or the step leaves the bracket, the bracket is bisected.
* In the hard case y* is the pole, where M is singular, and M^-1 g is too short: a null
  vector z of M completes it to eta = M^-1 g + tau z.
* For each y with M(y) positive definite, weak duality bounds the model from below,

      m(eta) >= - 1/2 g' M(y)^-1 g - y x^2 / 6    for all eta,  x = 2 y / damping,

  so that the relative gap of any step is known. It alone says when to stop and whether
  to complete with z. (The bound is the minimum of - g . eta + 1/2 eta' M eta plus that
  of damping/6 r^3 - y/2 r^2, r = ||D eta||.)

Nothing is compared with an absolute number. Powers of two first take the problem to
units of its own, and M(y) is scaled to a diagonal of order 1 before it is factored:
rescaled subsets give the same bits, and a zero in D is only one more row without y.

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
from partnewton.cubic._search import Best, converged, search
from partnewton.cubic._steps import ROUNDING_UNITS, appraise
from partnewton.cubic._units import Problem, to_own_units

__all__ = ["CubicSolution", "CubicStatus", "solve_cubic"]


class CubicStatus(enum.IntEnum):
    """What :func:`solve_cubic` found.

    Attributes:
      INTERIOR: the minimiser, ``M^-1 g`` with M positive definite.
      HARD_CASE: the minimiser, where M is singular to working precision; a null vector
        of M was added to ``M^-1 g``. Its sign may be arbitrary: then there are two
        minimisers, and always the same one of them is returned.
      KERNEL_FROZEN: the Hessian is not positive definite on the subsets with ``scale ==
        0``, so that the model has no (unique) minimum. Their learning rates are zero,
        the others minimise the model of the others.
      INVALID: all learning rates are zero, since an argument is not finite or negative
        where it must not be, or no step that lowers the model is known for certain in
        the floating-point numbers at hand.
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
      model_decrease: by how much the model falls from 0 to eta, ``-m(eta) >= 0``,
        shape (). Where this or the radius is out of range, it is the largest number.
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

    and its global minimiser is, H indefinite or not,

        eta = (H + damping/2 r D^2)^-1 g,    r = ||D eta||,

    with the largest r that solves this, where the matrix is positive semidefinite.
    Learning rates may be negative.

    Args:
      gradient: g, shape (S,).
      hessian: H, shape (S, S); its symmetric part is used.
      scale: the diagonal of D, not negative, shape (S,). For the paper's model it is
        the cube root of the absolute third derivative. Where it is 0, H alone bounds
        the step.
      damping: the factor of the cubic term, not negative, shape (). At 0 the cubic term
        vanishes, as if all of ``scale`` were 0: Newton's step.

    Returns:
      A :class:`CubicSolution`. Its dtype is that of the three arrays promoted together,
      float32 at least, also for half precision or integers. The arithmetic is float64
      in any case but one: on TPU it is done in the dtype of the result.

    Raises:
      ValueError: shapes that do not fit each other, or a negative number as `damping`.
        A negative `damping` that is traced or an array gives the status INVALID.

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
                f"{name} must have the shape {shape}, to fit the gradient of shape "
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
    inert = (g == 0) & (d == 0) & jnp.all(H + H.T == 0, axis=0)
    live = (d > 0) | (~inert & (status != CubicStatus.KERNEL_FROZEN))
    live &= status != CubicStatus.INVALID
    arrays = solution_tangent((g, H, d, damping), tangents, eta, radius, live)
    status_tangent = np.zeros(status.shape, jax.dtypes.float0)
    return solution, CubicSolution(*arrays, status_tangent)


_solve = jax.jit(_solution)


def _minimise_in_own_dtype(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> CubicSolution:
    """What runs where there is no float64 to speak of."""
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
    """`solve_cubic` in the arithmetic of the arguments, its result in `dtype`."""
    model, valid, kernel, A = _prepared(g, H, d, damping)
    L = factor(A)
    kernel_pd, problem, unit = _in_own_units(model, kernel, L)
    best = search(problem)
    solution = functools.partial(_solution_of, dtype=dtype)
    return solution(model, valid, kernel_pd, unit, best)


class _Model(NamedTuple):
    """Arguments of :func:`solve_cubic` that are valid, the Hessian symmetric."""

    g: jax.Array
    H: jax.Array
    d: jax.Array
    damping: jax.Array


def _prepared(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array
) -> tuple[_Model, jax.Array, jax.Array, jax.Array]:
    """The model, whether it is valid, its kernel, and the scaled matrix of that."""
    sizes = jnp.abs(H), jnp.abs(g), jnp.where(d >= 0, d, jnp.inf)
    largest = reduce_together(maxima=sizes)
    valid = functools.reduce(jnp.logical_and, map(jnp.isfinite, (*largest, damping)))
    valid &= damping >= 0
    g, H, d, damping = (jnp.where(valid, a, 0) for a in (g, H, d, damping))
    H = 0.5 * H + 0.5 * H.T
    d = jnp.where(damping > 0, d, 0)
    inert = (g == 0) & (d == 0) & jnp.all(H == 0, axis=0)  # these rates stay 0
    kernel = (d == 0) & ~inert
    A, _ = scaled_to_ones(H, kernel)
    return _Model(g, H, d, damping), valid, kernel, A


def _in_own_units(
    model: _Model, kernel: jax.Array, L: jax.Array
) -> tuple[jax.Array, Problem, jax.Array]:
    """Whether the kernel is positive definite, the problem and its unit."""
    # Beyond what rounding does to its factor L.
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
    # Rounding, of the step or of curvatures close to 0, must not raise the model.
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
