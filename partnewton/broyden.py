"""A dense quasi-Newton direction, self-scaled, for up to a few thousand parameters.

With s the last step, y the change of the gradient along it, H the approximate inverse
Hessian and B its inverse, the update is that of Broyden's class,

    H' = (H - (H y)(H y)' / (y'H y) + phi v v') / tau + s s' / (s'y),
    v = sqrt(y'H y) (s / (s'y) - H y / (y'H y)),

where phi = tau = 1 is BFGS. The self-scaled method (Al-Baali, SIAM J. Optim. 8, 1998;
in this form J. Urban, P. Stefanou and J. Pons, J. Comput. Phys. 523, 2025) computes
both from the ratios b = s'B s / s'y and h = y'H y / s'y, so that eigenvalues of H that
are too small grow faster than by BFGS. On the ill-conditioned losses of
physics-informed networks it is faster by orders of magnitude.

Not H is stored but a factor Z of H = Z Z', whose condition number is the square root
of that of H. In float32, H itself would lose all digits of large curvatures if those
differ by more than 1e7. With w = Z'y and u = Z^-1 s, the update is

    Z' = (Z - H y w'/(y'H y) + kappa v z') / sqrt(tau) + s w' / sqrt(s'y y'H y),
    z = sqrt(y'H y) (u / (s'y) - w / (y'H y)),  kappa = phi / (1 + sqrt(1 + phi z'z)).

u is known only for a step along the last direction H g = Z (Z'g), where it is
proportional to Z'g. After any other step phi is 0 and tau is 1. That is the update of
Davidon, Fletcher and Powell, which does not need u.

Writing Z takes longer than reading it. So Z = a F + C'R, with few rows in C and R that
are added to F at every fourth pair.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from partnewton._checks import check_number
from partnewton._strictness import at_least_float32
from partnewton._tree import select
from partnewton.directions import KeepsFinite
from partnewton.partitions.partition import gathered, sharded_like

__all__ = ["ScaleByBroydenState", "scale_by_broyden"]


class ScaleByBroydenState(NamedTuple):
    """State of :func:`scale_by_broyden`. P is the number of parameters.

    Attributes:
      count: the number of pairs (s, y) in the matrix since it was last the identity,
        shape (), int32; -1 before the first update.
      matrix: F in Z = a F + C'R, the factor of H = Z Z', shape (P, P).
      scale: a, shape ().
      columns: C, shape (8, P); zeros where there is no pair.
      rows: R, shape (8, P).
      params: at the last update, shape (P,).
      gradient: at the last update, shape (P,).
      weights: Z' times this gradient, shape (P,).
      direction: H times this gradient, shape (P,).
      other_steps: the number of steps in a row that were not along the last direction,
        shape (), int32.
    """

    count: jax.Array
    matrix: jax.Array
    scale: jax.Array
    columns: jax.Array
    rows: jax.Array
    params: jax.Array
    gradient: jax.Array
    weights: jax.Array
    direction: jax.Array
    other_steps: jax.Array


# In a row: then the directions were not usable, and H starts anew.
_MOST_OTHER_STEPS = 5
_PENDING = 4  # pairs, after which they are added to the matrix


def scale_by_broyden(max_size: int = 5000) -> optax.GradientTransformation:
    """Multiply gradients by a dense, self-scaled approximation of the inverse Hessian.

    The outgoing updates H g have the sign of a gradient, and the natural length: near a
    minimum ``params - H g`` approaches Newton's step. Until the first step is known H
    is the identity, divided by the norm of the gradient if that is above 1. It is meant
    for losses without noise, followed by a line search, or as a direction of
    :func:`partnewton.scale_by_subspace_newton`. All steps count, whatever their length
    and direction: the change of the parameters between two updates is s. After five
    steps in a row that were not along the last update, H starts anew. An update reads a
    matrix of P x P entries twice; every fourth one also writes it. Updates that are not
    finite do not change the state.

    Args:
      max_size: the largest P for which the matrix is stored.

    Returns:
      A :class:`optax.GradientTransformation`, whose update function needs `params`.

    Raises:
      ValueError: from `init`, if there are more than `max_size` parameters; from
        `update`, if `params` is missing.

    Example:
      >>> tx = optax.chain(scale_by_broyden(), optax.scale(-1.0))
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
      >>> x = jnp.array([0.1, 0.001])
      >>> state = tx.init(x)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(bool(loss(x) < 1e-9))
      True

    References:
      J. Urban, P. Stefanou and J. Pons, J. Comput. Phys. 523, 113656, 2025.
    """
    check_number("max_size", max_size, minimum=1)

    def init_fn(params: optax.Params) -> ScaleByBroydenState:
        leaves = jax.tree.leaves(params)
        size = optax.tree.size(params)
        if size > max_size:
            raise ValueError(
                f"scale_by_broyden: there are {size} parameters, more than max_size = "
                f"{max_size}; a matrix of {size}^2 entries would be stored. Use "
                "optax.scale_by_lbfgs, or increase max_size."
            )
        dtype = at_least_float32(*(jnp.result_type(x) for x in leaves))

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape, dtype)

        return ScaleByBroydenState(
            jnp.full((), -1, jnp.int32),
            zeros(size, size),
            jnp.ones((), dtype),
            *(zeros(2 * _PENDING, size) for _ in range(2)),
            *(zeros(size) for _ in range(4)),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByBroydenState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByBroydenState]:
        del extra_args
        if params is None:
            raise ValueError("params: scale_by_broyden needs the parameters.")
        g = _flat(updates, state.gradient.dtype)
        direction, new = _updated(state, _flat(params, g.dtype), g)
        return _unflattened(direction, updates), new

    return KeepsFinite(init_fn, update_fn)


def _flat(tree: Any, dtype: jnp.dtype) -> jax.Array:
    """The entries of all leaves, which are gathered on a mesh with explicit axes."""
    leaves = map(gathered, _arrays(tree))
    return jnp.concatenate(
        [jnp.zeros(0, dtype), *(jnp.ravel(x).astype(dtype) for x in leaves)]
    )


def _unflattened(entries: jax.Array, like: Any) -> Any:
    """The inverse of `_flat`, with the dtypes and shardings of a tree."""
    leaves, start = [], 0
    for x in _arrays(like):
        leaf = entries[start : start + x.size].reshape(x.shape).astype(x.dtype)
        leaves.append(sharded_like(x, leaf))
        start += x.size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _arrays(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree)]


def _updated(
    state: ScaleByBroydenState, x: jax.Array, g: jax.Array
) -> tuple[jax.Array, ScaleByBroydenState]:
    """The direction and the state at the parameters x with the gradient g."""
    s, y = x - state.params, g - state.gradient
    sy, yy = s @ y, y @ y
    eps = jnp.finfo(g.dtype).eps
    is_finite = jnp.isfinite(g @ g) & jnp.isfinite(x @ x)
    is_pair = (state.count >= 0) & (yy > 0) & is_finite  # squares can underflow
    is_pair &= sy > eps * jnp.sqrt(s @ s) * jnp.sqrt(yy)
    # H of the first pair is the multiple of the identity with y'H y = s'y.
    start = jnp.where(is_pair, sy / jnp.where(is_pair, yy, 1), 1)
    is_first = (state.count < 0) & is_finite
    start = jnp.where(is_first, 1 / jnp.maximum(jnp.sqrt(g @ g), 1), start)
    is_identity = state.count <= 0
    root = jnp.sqrt(start)

    C, R = state.columns, state.rows
    w = state.scale * (g @ state.matrix) + (C @ g) @ R
    w = jnp.where(is_identity, root * g, w)
    H_g = state.scale * (state.matrix @ w) + (R @ w) @ C
    H_g = jnp.where(is_identity, start * g, H_g)
    w_old = jnp.where(is_identity, root * state.gradient, state.weights)
    H_g_old = jnp.where(is_identity, start * state.gradient, state.direction)
    t, is_along = _length_along(s, H_g_old)
    Zy, Hy = w - w_old, H_g - H_g_old
    yHy = Zy @ Zy
    is_pair &= yHy > 0
    # Where there is no pair, any finite numbers that are not zero.
    s, u, Zy, Hy, sy, yHy = (
        jnp.where(is_pair, a, 1) for a in (s, t * w_old, Zy, Hy, sy, yHy)
    )
    phi, tau = _self_scaling(u @ u / sy, yHy / sy, len(s))
    phi, tau = jnp.where(is_identity, 1, phi), jnp.where(is_identity, 1, tau)
    phi, tau = jnp.where(is_along, phi, 0), jnp.where(is_along, tau, 1)
    z, v = (jnp.sqrt(yHy) * (a / sy - b / yHy) for a, b in ((u, Zy), (s, Hy)))
    kappa = phi / (1 + jnp.sqrt(jnp.maximum(1 + phi * (z @ z), 0)))
    # Z' = scale Z + sum of column row', and the products of Z with the rows.
    scale = jnp.where(is_pair, 1 / jnp.sqrt(tau), 1)
    first = s / jnp.sqrt(sy) / jnp.sqrt(yHy) - scale * Hy / yHy
    columns = jnp.where(is_pair, jnp.stack([first, scale * kappa * v]), 0)
    rows, products = jnp.stack([Zy, z]), jnp.stack([Hy, v])
    slopes = columns @ g
    weights = scale * w + slopes @ rows  # Z'' g
    direction = scale * (scale * H_g + slopes @ products) + (rows @ weights) @ columns

    is_descent = (g @ direction > 0) & jnp.all(jnp.isfinite(direction))
    direction = jnp.where(is_descent, direction, g * start)
    count = jnp.where(is_pair, optax.safe_increment(state.count), state.count)
    others = jnp.where(is_along | ~is_pair, 0, state.other_steps + 1)
    is_kept = is_descent & (others < _MOST_OTHER_STEPS)
    count = jnp.where(is_kept, jnp.maximum(count, 0), 0)
    others = jnp.where(is_kept, others, 0)
    factor = _with_pair(state, is_pair, root, scale, columns, rows)
    new = ScaleByBroydenState(count, *factor, x, g, weights, direction, others)
    # If g is not finite, F is the old one. A `where` of it would take time.
    kept = select(is_finite, new._replace(matrix=()), state._replace(matrix=()))
    return direction, kept._replace(matrix=new.matrix)


def _with_pair(
    state: ScaleByBroydenState,
    is_pair: jax.Array,
    root: jax.Array,
    scale: jax.Array,
    columns: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """F, a, C, R of scale Z + columns' rows, where Z may be root times the identity."""
    is_identity = state.count <= 0
    pairs = jnp.maximum(state.count, 0)
    slot = 2 * ((pairs - 1) % _PENDING)  # stays free without a pair: columns are 0
    a = scale * jnp.where(is_identity, 1, state.scale)
    C, R = (
        jax.lax.dynamic_update_slice_in_dim(
            jnp.where(is_identity, 0, old), new, slot, axis=0
        )
        for old, new in ((scale * state.columns, columns), (state.rows, rows))
    )

    def added() -> tuple:
        entries = jnp.arange(R.shape[1])
        identity = root * (entries[:, None] == entries)
        F = a * jnp.where(is_identity, identity, state.matrix)
        # Not a matrix product, so that there is one pass over the matrix.
        for column, row in zip(C, R, strict=True):
            F += column[:, None] * row
        return F, jnp.ones_like(a), jnp.zeros_like(C), jnp.zeros_like(R)

    is_full = is_pair & (pairs % _PENDING == 0)  # or the first, of the identity
    return jax.lax.cond(is_full, added, lambda: (state.matrix, a, C, R))


def _length_along(s: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The t for which t * direction is next to s, and whether s is minus a multiple."""
    dd = direction @ direction
    t = (s @ direction) / jnp.where(dd > 0, dd, 1)
    rest = s - t * direction
    return t, (t < 0) & (rest @ rest <= 0.01 * (s @ s))


def _self_scaling(b: jax.Array, h: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """phi and tau from the ratios b = s'B s / s'y and h = y'H y / s'y; 1, 1 for b = 0.

    With a = b h - 1 >= 0:

        rho- = min(1, h (1 - sqrt(a / (1 + a)))),  theta- = (rho- - 1) / a,
        theta+ = 1 / rho-,  theta = max(theta-, min(theta+, (1 - b) / b)),
        sigma = 1 + theta a,  phi = (1 - theta) / sigma,
        tau = min(rho-, 1) sigma^(1 / (1 - P))      where theta <= 0,
              rho- min(sigma^(1 / (1 - P)), 1 / theta)  elsewhere.
    """
    is_known = b > 0
    b = jnp.where(is_known, b, 1)
    a = jnp.maximum(b * h - 1, jnp.finfo(b.dtype).eps)
    rho = jnp.minimum(1, h * (1 - jnp.sqrt(a / (1 + a))))
    theta = jnp.clip((1 - b) / b, (rho - 1) / a, 1 / rho)
    sigma = 1 + theta * a
    root = jnp.abs(sigma) ** (1 / (1 - max(size, 2)))
    shrunk = rho * jnp.minimum(root, 1 / jnp.where(theta > 0, theta, 1))
    tau = jnp.where(theta <= 0, jnp.minimum(rho * root, root), shrunk)
    phi = (1 - theta) / sigma
    return jnp.where(is_known, phi, 1), jnp.where(is_known, tau, 1)
