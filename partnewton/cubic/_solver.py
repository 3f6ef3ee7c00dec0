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
from partnewton.cubic._reductions import reduce_together

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
    sizes = jnp.abs(H), jnp.abs(g), jnp.where(d >= 0, d, jnp.inf)
    largest = reduce_together(maxima=sizes)
    valid = functools.reduce(jnp.logical_and, map(jnp.isfinite, (*largest, damping)))
    valid &= damping >= 0
    g, H, d, damping = (jnp.where(valid, a, 0) for a in (g, H, d, damping))
    H = 0.5 * H + 0.5 * H.T
    d = jnp.where(damping > 0, d, 0)

    inert = (g == 0) & (d == 0) & jnp.all(H == 0, axis=0)  # these rates stay 0
    kernel = (d == 0) & ~inert
    kernel_pd = _is_positive_definite(H, kernel)
    live = (d > 0) | (kernel & kernel_pd)

    problem, unit = _to_own_units(g, H, d, damping, live)
    best = _search(problem)
    # Rounding, of the step or of curvatures close to 0, must not raise the model.
    steps = _round(_ldexp(best.steps, -unit[None, :]), dtype)
    appraise = jax.vmap(functools.partial(_appraise, g, H, d, damping))
    appraised = appraise(steps)
    hard = ~_converged(best.plain_gap) & (best.completed_gap < best.plain_gap)
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


# Units.


class _Problem(NamedTuple):
    """The model in units of its own: with x = beta y, M(y) = H + y D^2,

    m(eta) = - g . eta + 1/2 eta' H eta + 1 / (3 beta) ||D eta||^3.
    """

    g: jax.Array  # (S,), at most about 1
    H: jax.Array  # (S, S)
    d: jax.Array  # (S,), 0 or in [1/2, 1)
    beta: jax.Array  # ()
    live: jax.Array  # (S,), the subsets to solve for


def _to_own_units(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array, live: jax.Array
) -> tuple[_Problem, jax.Array]:
    """Choose units, powers of two, in which D and the shift sought are of order 1.

    Subset s gets a unit 2^a_s, the shift y a unit 2^b, the gradient a unit 2^c besides:
    H_st = 2^(a_s + a_t + b) * H_st of the problem, D_s = 2^a_s ..., g_s = 2^(a_s + c)
    ..., hence eta_s = 2^-(a_s + b - c) ...; a + b - c is returned with the problem. All
    of this is exact. Rescaled subsets or a rescaled objective move a, b and c and leave
    the problem as it is, bit by bit, or, for subsets with D_s = 0, up to powers of two
    that `_factor` takes out.
    """
    limit = jnp.finfo(H.dtype).maxexp // 3  # so that beta^2 is far from overflow
    g = jnp.where(live, g, 0)
    H = jnp.where(live[:, None] & live[None, :], H, 0)
    H_exponent, g_exponent = _exponent(H), _exponent(g)
    diagonal_exponent = jnp.diagonal(H_exponent)
    damped = d > 0
    kernel = live & ~damped
    a = jnp.where(damped, _exponent(d), jnp.where(kernel, diagonal_exponent >> 1, 0))
    (number_damped,) = reduce_together(sums=(damped.astype(jnp.int32),))
    any_damped = number_damped > 0
    damping = jnp.where(any_damped, damping, 1)
    damping_exponent = _exponent(damping)

    # y is about as large as the largest of: H_st / D_s D_t; what elimination of a
    # kernel subset k adds to that, (H_sk / D_s)^2 / H_kk; and the y of g and D alone,
    # y^2 = damping/2 g_s / D_s.
    row = H_exponent - a[:, None]
    of_kernel = jnp.where(
        kernel[None, :] & (H_exponent > _ZERO_EXPONENT),
        2 * row - diagonal_exponent[None, :],
        _ZERO_EXPONENT,
    )
    of_H = jnp.where(damped[None, :], row - a[None, :], of_kernel)
    has_slope = g != 0
    of_g = jnp.where(
        has_slope, (damping_exponent + g_exponent - a + 1) >> 1, _ZERO_EXPONENT
    )
    of_all = jnp.maximum(of_H, of_g[:, None])
    b, c, of_undamped = reduce_together(
        maxima=(
            jnp.where(damped[:, None], of_all, _ZERO_EXPONENT),
            jnp.where(has_slope, g_exponent - a, _ZERO_EXPONENT),
            jnp.where(kernel, diagonal_exponent, 0),
        )
    )
    # No such thing: y will be 0, and the units are those of H.
    b = jnp.where(b < _ZERO_EXPONENT // 2, of_undamped, b)

    # beta = 2 / damping in these units; c is the exponent of the largest g, or what
    # makes beta large enough, as far as the number range allows.
    beta_exponent = 2 * b - damping_exponent
    no_slope = c < _ZERO_EXPONENT // 2
    c = jnp.where(any_damped, jnp.maximum(c, beta_exponent - limit), c)
    c = jnp.where(no_slope, beta_exponent, c)
    mantissa = _ldexp(damping, -damping_exponent)
    beta = _ldexp(2 / mantissa, jnp.clip(beta_exponent - c, -limit, limit))

    problem = _Problem(
        g=_ldexp(g, -a - c),
        H=_ldexp(H, -a[:, None] - a[None, :] - b),
        d=_ldexp(d, -a),
        beta=beta,
        live=live,
    )
    return problem, a + b - c


class _Step(NamedTuple):
    """A step in the caller's units, and what it is worth."""

    eta: jax.Array  # (S,)
    radius: jax.Array  # ()
    decrease: jax.Array  # ()
    descends: jax.Array  # (), the model certainly does not rise


def _appraise(
    g: jax.Array, H: jax.Array, d: jax.Array, damping: jax.Array, eta: jax.Array
) -> _Step:
    """The model at eta, all terms in units of the largest of them, 2^unit."""
    moves = eta != 0
    g, d = jnp.where(moves, g, 0), jnp.where(moves, d, 0)
    H = jnp.where(moves[:, None] & moves[None, :], H, 0)
    of_eta = jnp.where(moves, _exponent(eta), 0)
    # ||D eta|| in units of 2^of_d, and so on.
    of_d, of_g, of_H = reduce_together(
        maxima=(
            _exponent(d) + of_eta,
            _exponent(g) + of_eta,
            _exponent(H) + of_eta[:, None] + of_eta[None, :],
        )
    )
    of_cubic = _exponent(damping) + 3 * of_d
    unit = jnp.maximum(jnp.maximum(of_g, of_H), of_cubic)

    mantissa = _ldexp(eta, -of_eta)
    image = _ldexp(d, of_eta - of_d) * mantissa
    slopes = mantissa * _ldexp(g, of_eta - unit)
    curvatures = _ldexp(H, of_eta[:, None] + of_eta[None, :] - unit)
    curvatures = mantissa[:, None] * curvatures * mantissa[None, :]
    of_row = reduce_together(sums=(curvatures, jnp.abs(curvatures)), axis=1)
    slope, slope_size, curvature, curvature_size, square = reduce_together(
        sums=(slopes, jnp.abs(slopes), *of_row, image * image)
    )
    radius = jnp.sqrt(square)
    cubic = _ldexp(damping / 6, 3 * of_d - unit) * radius**3
    decrease = slope - curvature / 2 - cubic
    size = slope_size + curvature_size / 2 + cubic
    return _Step(
        eta=eta,
        radius=_ldexp(radius, of_d),
        decrease=_ldexp(decrease, unit),
        descends=decrease >= _ROUNDING_UNITS * jnp.finfo(H.dtype).eps * size,
    )


# The search for the shift.


class _Best(NamedTuple):
    """The steps with the smallest relative gap so far, without and with z."""

    steps: jax.Array  # (2, S): M^-1 g and M^-1 g + tau z
    plain_gap: jax.Array  # ()
    completed_gap: jax.Array  # ()


class _Search(NamedTuple):
    y: jax.Array  # (), the next shift to try
    low: jax.Array  # (), no larger than the shift sought
    high: jax.Array  # (), no smaller
    v: jax.Array  # (S,), D z of the inverse iteration for the null vector, ||v|| = 1
    best: _Best
    settled: jax.Array  # (), the best was good enough before the last step
    iteration: jax.Array


def _search(problem: _Problem) -> _Best:
    dtype = problem.H.dtype
    S = problem.g.size
    eps = jnp.finfo(dtype).eps
    lowest, highest = _shift_range(dtype)
    damped = problem.d > 0

    def unfinished(state: _Search) -> jax.Array:
        wide = state.high - state.low > 2 * eps * state.high
        below = state.high > 2 * lowest
        few = state.iteration < _MAX_ITERATIONS
        return ~state.settled & wide & below & few

    def iterate(state: _Search) -> _Search:
        y = state.y
        at = _evaluate(problem, y, state.v)
        # M(y) is positive definite and ||D M(y)^-1 g|| <= x: the infimum is below y.
        above = at.positive_definite & (at.ratio <= 1)
        low = jnp.where(above, state.low, jnp.maximum(state.low, y))
        high = jnp.where(above, jnp.minimum(state.high, y), state.high)
        # z' M(y) z = R, ||D z|| = 1: M(y - R) is not positive definite.
        pole = y - at.curvature - _ROUNDING_UNITS * eps * y
        pole = jnp.where(at.positive_definite, pole, 0)
        low = jnp.minimum(jnp.maximum(low, pole), high)
        secular = _secular_step(y, at)
        inside = at.positive_definite & (low < secular) & (secular < high)
        bisected = _bisect(low, high, state.iteration)
        return _Search(
            y=jnp.where(inside, secular, bisected),
            low=low,
            high=high,
            v=at.v,
            best=_better(state.best, at.best),
            # The gap is of second order in the error of y. One step more, and eta too
            # is as accurate as the numbers allow.
            settled=_converged(_smaller_gap(state.best)),
            iteration=state.iteration + 1,
        )

    # Any start will do that is not orthogonal to the null vector: an irregular one.
    v = jnp.where(damped, 1 + 0.4 * jnp.cos(1.7 * jnp.arange(S, dtype=dtype) ** 2), 0)
    zeros = jnp.zeros((2, S), dtype)
    infinite = jnp.full((), jnp.inf, dtype)
    start = _Search(
        # Without a cubic term M does not depend on y, and the smallest y says so.
        y=jnp.where(jnp.any(damped), jnp.ones((), dtype), lowest),
        low=jnp.full((), lowest, dtype),
        high=jnp.full((), highest, dtype),
        v=v / jnp.where(jnp.any(damped), jnp.sqrt(jnp.sum(v * v)), 1),
        best=_Best(zeros, infinite, infinite),
        settled=jnp.zeros((), bool),
        iteration=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(unfinished, iterate, start).best


class _Evaluation(NamedTuple):
    positive_definite: jax.Array
    ratio: jax.Array  # ||D M^-1 g|| / x
    slope: jax.Array  # - d log ||D M^-1 g|| / d log y, not negative
    v: jax.Array  # (S,), D z, one inverse iteration on
    curvature: jax.Array  # R = z' M z
    best: _Best


def _evaluate(problem: _Problem, y: jax.Array, v: jax.Array) -> _Evaluation:
    """All that is to be known about M(y)."""
    g, H, d, beta, live = problem
    x = beta * y
    # With A = diag(s) M diag(s): M^-1 = diag(s) A^-1 diag(s).
    L, s, positive_definite = _factor(H + jnp.diag(y * d * d), live)
    ds = d * s
    half = _solve_triangular(L, jnp.stack([s * g, ds * v], axis=1))
    full = _solve_triangular(L, half, transpose=True)
    eta, z = full[:, 0], full[:, 1]  # divided by s

    # D M^-1 g and D z, divided by their largest entries: no square overflows.
    image, z_image = ds * eta, ds * z
    of_image, of_z = reduce_together(maxima=(jnp.abs(image), jnp.abs(z_image)))
    image = image / jnp.where(of_image > 0, of_image, 1)
    z_image = z_image / jnp.where(of_z > 0, of_z, 1)
    square, z_square, product, with_v, q = reduce_together(
        sums=(
            image * image,
            z_image * z_image,
            image * z_image,
            z_image * v,
            half[:, 0] ** 2,  # g' M^-1 g
        )
    )
    n = of_image * jnp.sqrt(square)
    ratio = n / x
    w = _solve_triangular(L, (ds * image)[:, None])[:, 0]
    # On its own, a sum would be split in several.
    along_w, _ = reduce_together(sums=(w * w, image * image))
    slope = y * (along_w / jnp.where(square > 0, square, 1))

    # One inverse iteration for the smallest eigenvalue of M z = R D^2 z, ||D z|| = 1.
    z_found = positive_definite & (of_z > 0)
    root = jnp.where(z_found, jnp.sqrt(z_square), 1)
    z_norm = jnp.where(z_found, of_z * root, 1)
    curvature = jnp.maximum(with_v / root / z_norm, 0)

    # The smaller root tau of ||D M^-1 g / x + tau D z|| = 1 (Moré and Sorensen).
    cosine = of_image * (product / root) / x
    rest = (1 - ratio) * (1 + ratio)
    radical = jnp.sqrt(cosine * cosine + rest)  # NaN where there is no tau
    tau = rest / (cosine + jnp.where(cosine < 0, -radical, radical))

    # m(step) minus the bound of weak duality, and divided by that bound.
    bound = q / 2 + x * x * y / 6
    bound = jnp.where(bound > 0, bound, 1)
    plain_gap = (x - n) ** 2 * ((x + 2 * n) / (6 * beta))
    completed_gap = (tau * x) ** 2 * curvature / 2
    return _Evaluation(
        positive_definite,
        ratio,
        slope,
        jnp.where(z_found, z_image / root, v),
        curvature,
        _Best(
            steps=s[None, :] * jnp.stack([eta, eta + (tau * x / z_norm) * z]),
            plain_gap=_gap_or_inf(plain_gap / bound, positive_definite),
            completed_gap=_gap_or_inf(completed_gap / bound, z_found),
        ),
    )


def _gap_or_inf(gap: jax.Array, known: jax.Array) -> jax.Array:
    return jnp.where(known & jnp.isfinite(gap), gap, jnp.inf)


def _better(a: _Best, b: _Best) -> _Best:
    improved = _smaller_gap(b) < _smaller_gap(a)
    return jax.tree.map(lambda u, v: jnp.where(improved, v, u), a, b)


def _smaller_gap(best: _Best) -> jax.Array:
    return jnp.minimum(best.plain_gap, best.completed_gap)


def _secular_step(y: jax.Array, at: _Evaluation) -> jax.Array:
    """Where ||D M^-1 g|| = x if 1 / ||D M^-1 g|| were linear in y.

    At the shift f y this says (1 + slope (f - 1)) f = ratio.
    """
    half = (1 - at.slope) / 2
    root = jnp.sqrt(half**2 + at.slope * at.ratio)
    # The positive root, either way without cancellation.
    f = jnp.where(half > 0, at.ratio / (half + root), (root - half) / at.slope)
    return y * f


def _bisect(low: jax.Array, high: jax.Array, iteration: jax.Array) -> jax.Array:
    """A point inside the bracket: geometrically, first in y, then in y - low."""
    dtype = low.dtype
    _, highest = _shift_range(dtype)
    geometric = jnp.sqrt(low) * jnp.sqrt(high)
    # The shift may be anywhere between low + eps * high and high on a scale of
    # logarithms; every other time the midpoint bounds the number of iterations.
    width = high - low
    close_to_low = low + jnp.sqrt(jnp.finfo(dtype).eps * high) * jnp.sqrt(width)
    middle = low + 0.5 * width
    near = jnp.where(iteration % 2 == 0, middle, jnp.minimum(close_to_low, middle))
    inner = jnp.where(high > 2 * low, geometric, near)
    # In units of the problem the shift is of order 1: grow from there.
    return jnp.where(high >= highest, jnp.minimum(16 * low, geometric), inner)


def _converged(gap: jax.Array) -> jax.Array:
    return gap <= 64 * jnp.finfo(gap.dtype).eps


def _shift_range(dtype: jnp.dtype) -> tuple[float, float]:
    """The shifts that are tried, well inside the range of normal numbers."""
    exponent = (4 * jnp.finfo(dtype).maxexp) // 5
    return 2.0**-exponent, 2.0**exponent


# Linear algebra, by powers of two.


def _is_positive_definite(H: jax.Array, rows: jax.Array) -> jax.Array:
    """Whether the block of `rows` is, beyond what rounding does to its factor."""
    L, _, _ = _factor(H, rows)
    rounding = _ROUNDING_UNITS * len(H) * jnp.finfo(H.dtype).eps
    return jnp.all(jnp.diagonal(L) ** 2 > rounding)


def _factor(M: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L L' = diag(s) M diag(s) on `live`, 1 elsewhere, its diagonal in [1/2, 2).

    Also returns s, powers of two, and whether M is positive definite; where it is not,
    L is not finite.
    """
    exponent = _exponent(jnp.where(live, jnp.diagonal(M), 0))
    exponent = jnp.where(exponent > _ZERO_EXPONENT, exponent, 0)
    s = _power_of_two(-(exponent >> 1), M.dtype)
    identity = jnp.eye(len(M), dtype=M.dtype)
    A = jnp.where(live[:, None] & live[None, :], M * s[:, None] * s[None, :], identity)
    L = lax.linalg.cholesky(A, symmetrize_input=False)
    # A pivot that is not finite leaves none behind it finite.
    return L, s, jnp.isfinite(L[-1, -1])


def _solve_triangular(
    L: jax.Array, b: jax.Array, *, transpose: bool = False
) -> jax.Array:
    return lax.linalg.triangular_solve(
        L, b, left_side=True, lower=True, transpose_a=transpose
    )


def _round(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _exponent(x: jax.Array) -> jax.Array:
    """The e of |x| = m 2^e with m in [1/2, 1); `_ZERO_EXPONENT` for 0."""
    # Read from the bits. jnp.frexp and jnp.ldexp compile to code that depends on
    # whether float64 is enabled around them, which it need not be any more by then.
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(jnp.abs(x), _integer(x.dtype))
    exponent = (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 2)
    return jnp.where(jnp.abs(x) >= info.tiny, exponent, _ZERO_EXPONENT)


def _ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2^exponent, exact wherever the result is a normal number."""
    half = exponent >> 1  # in two steps, as 2^exponent alone may be out of range
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponent - half, x.dtype)


def _power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    exponent = jnp.clip(exponent, info.minexp, info.maxexp - 1)
    bits = (exponent + (info.maxexp - 1)).astype(_integer(dtype)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def _integer(dtype: jnp.dtype) -> jnp.dtype:
    """The integers that are as wide as the floating-point numbers."""
    return jnp.dtype(jnp.int64 if dtype == jnp.float64 else jnp.int32)


_ZERO_EXPONENT = -(2**20)  # of the number 0; below any sum of a few true exponents
_ROUNDING_UNITS = 4  # what rounding may amount to, in units of its usual size
_MAX_ITERATIONS = 200  # 5 to 30 are usual; bisection alone needs about 120
