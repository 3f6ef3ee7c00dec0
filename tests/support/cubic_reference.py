"""The cubic subproblem in 60 digits, and random problems to hold the solver to.

The reference shares nothing with the solver but the optimality conditions. It
eliminates the kernel of D by a Schur complement, scales D to the identity, reduces the
Hessian to a tridiagonal T by Householder's reflections, all in 60 digits, and bisects
for the shift y at which ||(T + y I)^-1 g|| = 2 y / damping. The minimum itself then is

    - 1/2 g' (T + y I)^-1 g - y (2 y / damping)^2 / 6 - 1/2 g_k' H_kk^-1 g_k

with g_k, H_kk of the kernel: the dual value, right in the hard case too.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mpmath
import numpy as np
from mpmath import mpf

DIGITS = 60


class Problem(NamedTuple):
    gradient: np.ndarray  # (S,)
    hessian: np.ndarray  # (S, S)
    scale: np.ndarray  # (S,)
    damping: float
    family: str = ""

    def astype(self, dtype: type) -> "Problem":
        """The nearest problem whose numbers are all of `dtype`."""
        g, H, d = (a.astype(dtype) for a in self[:3])
        return Problem(g, H, d, float(dtype(self.damping)), self.family)

    @property
    def arguments(self) -> tuple:
        return self[:4]


class Reference(NamedTuple):
    minimum: mpf  # of the model, with the kernel frozen where it must be
    kernel_positive_definite: bool


def model(problem: Problem, eta: np.ndarray) -> mpf:
    """m(eta), in 60 digits."""
    with mpmath.workdps(DIGITS):
        g, d, e = (_vector(a) for a in (problem.gradient, problem.scale, eta))
        H = _symmetric(problem.hessian)
        r = mpmath.sqrt(mpmath.fsum((a * b) ** 2 for a, b in zip(d, e, strict=True)))
        quadratic = mpmath.fdot(e, [mpmath.fdot(row, e) for row in H])
        return -mpmath.fdot(g, e) + quadratic / 2 + mpf(problem.damping) / 6 * r**3


def minimise(problem: Problem) -> Reference:
    """The minimum of the model, in 60 digits."""
    with mpmath.workdps(DIGITS):
        g, d = _vector(problem.gradient), _vector(problem.scale)
        H = _symmetric(problem.hessian)
        damping = mpf(problem.damping)
        S = range(len(g))
        inert = [g[s] == 0 and d[s] == 0 and not any(H[s]) for s in S]
        damped = [s for s in S if d[s] > 0 and damping > 0]
        kernel = [s for s in S if s not in damped and not inert[s]]

        L = _cholesky([[H[s][t] for t in kernel] for s in kernel])
        if L is None:
            kernel, L, positive_definite = [], [], False
        else:
            positive_definite = True
        half_g = _forward(L, [g[s] for s in kernel])
        half_H = {s: _forward(L, [H[s][k] for k in kernel]) for s in damped}
        minimum = -mpmath.fdot(half_g, half_g) / 2
        if damped:
            reduced_g = [(g[s] - mpmath.fdot(half_H[s], half_g)) / d[s] for s in damped]
            reduced_H = [
                [
                    (H[s][t] - mpmath.fdot(half_H[s], half_H[t])) / (d[s] * d[t])
                    for t in damped
                ]
                for s in damped
            ]
            minimum += _minimum_isotropic(reduced_g, reduced_H, damping)
        return Reference(minimum, positive_definite)


def _minimum_isotropic(g: list, H: list, damping: mpf) -> mpf:
    """min over u of - g . u + 1/2 u' H u + damping/6 ||u||^3."""
    diagonal, off_diagonal, g = _tridiagonalise(H, g)

    def dual(y: mpf) -> tuple[mpf, mpf] | None:
        """||(T + y)^-1 g|| and g' (T + y)^-1 g, if T + y is positive definite."""
        u = _solve_tridiagonal([a + y for a in diagonal], off_diagonal, g)
        return u and (mpmath.sqrt(mpmath.fdot(u, u)), mpmath.fdot(u, g))

    def reached(y: mpf) -> bool:
        found = dual(y)
        return found is not None and found[0] <= 2 * y / damping

    size = max(abs(a) for a in [*diagonal, *off_diagonal, mpf(0)])
    high = 4 * size + mpmath.sqrt(damping * mpmath.sqrt(mpmath.fdot(g, g)))
    if high == 0:
        return mpf(0)
    low = high * mpf(10) ** -120
    if reached(low):  # no cubic term to speak of
        return -dual(low)[1] / 2
    while high > low * (1 + mpf(10) ** (8 - DIGITS)):
        middle = mpmath.sqrt(low * high) if high > 2 * low else (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    x = 2 * high / damping
    return -dual(high)[1] / 2 - high * x**2 / 6


def _tridiagonalise(H: list, g: list) -> tuple[list, list, list]:
    """The diagonals of Q' H Q, and Q' g."""
    n = len(H)
    H, g = [list(row) for row in H], list(g)
    for k in range(n - 2):
        column = [H[i][k] for i in range(k + 1, n)]
        norm = mpmath.sqrt(mpmath.fdot(column, column))
        if norm == 0:
            continue
        alpha = -norm if column[0] > 0 else norm
        v = [column[0] - alpha, *column[1:]]
        scale = 2 / mpmath.fdot(v, v)
        p = [scale * mpmath.fdot(H[i][k + 1 :], v) for i in range(k + 1, n)]
        K = scale * mpmath.fdot(p, v) / 2
        w = [a - K * b for a, b in zip(p, v, strict=True)]
        for i in range(k + 1, n):
            row, vi, wi = H[i], v[i - k - 1], w[i - k - 1]
            for j in range(k + 1, i + 1):
                row[j] -= vi * w[j - k - 1] + wi * v[j - k - 1]
                H[j][i] = row[j]
        H[k + 1][k] = alpha
        t = scale * mpmath.fdot(g[k + 1 :], v)
        g[k + 1 :] = [a - t * b for a, b in zip(g[k + 1 :], v, strict=True)]
    return [H[i][i] for i in range(n)], [H[i + 1][i] for i in range(n - 1)], g


def _solve_tridiagonal(diagonal: list, off_diagonal: list, g: list) -> list | None:
    """T^-1 g by T = L diag(pivots) L', or None if T is not positive definite."""
    pivots, factors, u = [], [], []
    for i, a in enumerate(diagonal):
        if i:
            factors.append(off_diagonal[i - 1] / pivots[-1])
            a -= factors[-1] * off_diagonal[i - 1]
        if a <= 0:
            return None
        pivots.append(a)
        u.append(g[i] - factors[-1] * u[-1] if i else g[i])
    u = [a / b for a, b in zip(u, pivots, strict=True)]
    for i in reversed(range(len(factors))):
        u[i] -= factors[i] * u[i + 1]
    return u


def _cholesky(A: list) -> list | None:
    L = []
    for i, row in enumerate(A):
        new = []
        for j in range(i):
            new.append((row[j] - mpmath.fdot(new, L[j][:j])) / L[j][j])
        pivot = row[i] - mpmath.fdot(new, new)
        if pivot <= 0:
            return None
        L.append([*new, mpmath.sqrt(pivot)])
    return L


def _forward(L: list, b: list) -> list:
    u = []
    for row, a in zip(L, b, strict=True):
        u.append((a - mpmath.fdot(row[: len(u)], u)) / row[len(u)])
    return u


def _vector(a: np.ndarray) -> list:
    return [mpf(float(x)) for x in a]


def _symmetric(H: np.ndarray) -> list:
    rows = [_vector(row) for row in H]
    S = range(len(rows))
    return [[(rows[s][t] + rows[t][s]) / 2 for t in S] for s in S]


# Random problems.

Random = np.random.Generator


def _with_spectrum(rng: Random, eigenvalues: np.ndarray) -> np.ndarray:
    Q, _ = np.linalg.qr(rng.normal(size=(eigenvalues.size, eigenvalues.size)))
    H = (Q * eigenvalues) @ Q.T
    return (H + H.T) / 2


def positive_definite(rng: Random, S: int) -> Problem:
    H = _with_spectrum(rng, 10 ** rng.uniform(-2, 2, S))
    return Problem(rng.normal(size=S), H, np.abs(rng.normal(size=S)), 1.0)


def indefinite(rng: Random, S: int) -> Problem:
    H = _with_spectrum(rng, rng.normal(size=S))
    return Problem(rng.normal(size=S), H, np.abs(rng.normal(size=S)), 10.0)


def nearly_singular(rng: Random, S: int) -> Problem:
    """Eigenvalues down to 1e-9 of the largest, of either sign, and a small damping."""
    eigenvalues = 10 ** rng.uniform(-9, 0, S) * rng.choice([1, 1, 1, -1], S)
    damping = 10 ** rng.uniform(-6, 0)
    H = _with_spectrum(rng, eigenvalues)
    return Problem(rng.normal(size=S), H, rng.uniform(0.5, 2, S), damping)


def low_rank(rng: Random, S: int) -> Problem:
    """A Gauss-Newton Hessian of fewer examples than subsets."""
    J = rng.normal(size=(S, max(1, S // 3)))
    d = rng.uniform(0.5, 2, S)
    return Problem(rng.normal(size=S), J @ J.T, d, 10 ** rng.uniform(-3, 3))


def spread_scale(rng: Random, S: int) -> Problem:
    """D over 8 decades."""
    d = 10 ** rng.uniform(-8, 0, S)
    H = _with_spectrum(rng, rng.normal(size=S))
    return Problem(rng.normal(size=S), H, d, 10 ** rng.uniform(-2, 2))


def wild_units(rng: Random, S: int) -> Problem:
    """Each subset in units of its own, from 1e-12 to 1e12."""
    g, H, d, damping, _ = indefinite(rng, S)
    c = 10 ** rng.uniform(-12, 12, S)
    return Problem(c * g, c[:, None] * H * c, c * d, damping)


def extreme_damping(rng: Random, S: int) -> Problem:
    g, H, d, _, _ = indefinite(rng, S)
    return Problem(g, H, d, float(rng.choice([1e-12, 1e12])))


def zeros(rng: Random, S: int) -> Problem:
    """Exact zeros in D, where H is positive definite, and in g; an inert subset."""
    g, H, d, damping, _ = indefinite(rng, S)
    kernel = rng.random(S) < 0.4
    kernel[0] = S > 1
    J = rng.normal(size=(S, 2 * S))
    H[np.ix_(kernel, kernel)] = (J @ J.T)[np.ix_(kernel, kernel)]
    d[kernel] = 0
    g[rng.random(S) < 0.4] = 0
    if S > 2:
        g[-1] = d[-1] = 0
        H[-1] = H[:, -1] = 0
    return Problem(g, H, d, damping)


def kernel_without_minimum(rng: Random, S: int) -> Problem:
    """D is zero where H is not positive definite."""
    g, H, d, damping, _ = indefinite(rng, S)
    d[0] = 0
    H[0, 0] = -1
    return Problem(g, H, d, damping)


def no_scale(rng: Random, S: int) -> Problem:
    """D = 0: Newton's step."""
    g, H, _, damping, _ = positive_definite(rng, S)
    return Problem(g, H, np.zeros(S), damping)


def no_gradient(rng: Random, S: int) -> Problem:
    """At a saddle point: the minimisers are a pair, eta and -eta."""
    _, H, d, damping, _ = indefinite(rng, S)
    H[0, 0] = -1
    return Problem(np.zeros(S), H, d, damping)


def _hard(rng: Random, S: int, along_null_vector: float) -> Problem:
    """g has no component, or a very small one, along the lowest eigenvector.

    Everything is exact in binary: one or two coordinates carry the lowest eigenvalue.
    """
    g, H, d, _, _ = indefinite(rng, S)
    H = np.round(H * 2**10) / 2**10
    lowest = slice(0, 1 + (S > 4))
    H[lowest] = H[:, lowest] = 0
    d = 2.0 ** rng.integers(-2, 3, S)
    bottom = 2 * S + 1 + np.arange(S)[lowest] * rng.integers(0, 2)
    H[lowest, lowest] = np.diag(-bottom * d[lowest] ** 2 * 16)
    g[lowest] = along_null_vector * rng.normal(size=g[lowest].size)
    return Problem(g, H, d, float(2.0 ** rng.integers(-4, 4)))


def hard(rng: Random, S: int) -> Problem:
    return _hard(rng, S, 0.0)


def hard_rotated(rng: Random, S: int) -> Problem:
    """The hard case up to rounding, in no special coordinates."""
    eigenvalues = np.sort(rng.normal(size=S))
    eigenvalues[0] = -abs(eigenvalues[0]) - 1
    Q, _ = np.linalg.qr(rng.normal(size=(S, S)))
    H = (Q * eigenvalues) @ Q.T
    g = Q[:, 1:] @ rng.normal(size=S - 1)
    return Problem(g, (H + H.T) / 2, np.ones(S), 10 ** rng.uniform(-2, 0))


def near_hard(rng: Random, S: int) -> Problem:
    return _hard(rng, S, 10 ** rng.uniform(-16, -4))


FAMILIES: tuple[Callable[[Random, int], Problem], ...] = (
    positive_definite,
    indefinite,
    nearly_singular,
    low_rank,
    spread_scale,
    wild_units,
    extreme_damping,
    zeros,
    kernel_without_minimum,
    no_scale,
    no_gradient,
    hard,
    hard_rotated,
    near_hard,
)


def problems(S: int, count: int, seed: int = 0) -> Iterator[Problem]:
    """`count` random problems of every family."""
    for family in FAMILIES:
        for i in range(count):
            rng = np.random.default_rng([seed, S, i, FAMILIES.index(family)])
            yield family(rng, S)._replace(family=family.__name__)
