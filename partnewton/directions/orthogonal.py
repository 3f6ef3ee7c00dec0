"""Orthogonalised momentum, the direction of Muon, in three iterations."""

import functools

import jax
import jax.numpy as jnp
import optax

from partnewton._checks import check_number
from partnewton._strictness import at_least_float32
from partnewton.partitions.partition import gathered, sharded_like

__all__ = ["COEFFICIENTS", "orthogonal_momentum", "orthogonalize"]

COEFFICIENTS = (
    (8.13365, -23.77928, 17.57244),
    (3.68801, -2.75902, 0.54077),
    (2.73911, -2.04046, 0.45966),
)
"""a, b and c of the polynomials p(x) = a x + b x^3 + c x^5, one per iteration.

The first one is the best approximation of 1 on [0.009, 1] in the maximum norm, and each
of the others that on the interval to which the ones before map it. The last interval is
[0.7, 1.3]. N. Amsel, D. Persson, C. Musco and R. M. Gower (arXiv 2505.16932) show that
no other composition of three such polynomials comes closer to 1.
"""


def orthogonal_momentum(
    decay: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices, and Adam for all other leaves.

    Let M be Nesterov's momentum of a matrix and M = U diag(s) V^T. The direction is
    approximately U V^T: each singular value of at least 0.009 times the fourth root of
    the sum of s^4 is replaced by a value between 0.7 and 1.3.

    This is the direction of :func:`optax.contrib.muon`, with the sign of a gradient. It
    is computed in three iterations instead of five, with polynomials that are the best
    ones for this number, and for matrices with at least twice as many columns as rows,
    or rows as columns, in products of the smaller size. It takes about half of the
    time. An array with four axes or more is the kernel of a convolution. It is reshaped
    to a matrix whose columns correspond to its last axis.

    Args:
      decay: the decay of the momentum of matrices, at least 0 and below 1.

    Returns:
      A :class:`optax.GradientTransformation`. Its state is one momentum for each
      matrix, and two averages for each other leaf. Matrices in a precision below
      float32 are orthogonalised in float32.

    Raises:
      ValueError, TypeError: `decay` is out of bounds, or not a number.

    Example:
      >>> tx = orthogonal_momentum()
      >>> grads = {"kernel": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(jnp.round(updates["kernel"], 1))
      [[1.2 0. ]
       [0.  0.7]]

    References:
      K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
      N. Amsel et al., arXiv 2505.16932: the polynomials.
    """

    check_number("decay", decay, below=1)

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda x: "matrix" if _is_matrix(x) else "other", params)

    orthogonal = optax.stateless_with_tree_map(lambda u, _: orthogonalize(u))
    momentum = optax.trace(decay, nesterov=True)
    return optax.partition(
        {
            "matrix": optax.chain(momentum, orthogonal),
            "other": optax.scale_by_adam(nesterov=True),
        },
        labels,
    )


def _is_matrix(x: jax.Array) -> bool:
    return jnp.ndim(x) == 2 or jnp.ndim(x) >= 4


def orthogonalize(x: jax.Array) -> jax.Array:
    """Replace the singular values of a matrix by values close to one.

    With X = U diag(s) V^T, the result is U diag(q(s / |s|_4)) V^T, where q is the
    composition of the polynomials of `COEFFICIENTS`, and |s|_4 is the fourth root of
    the sum of s^4, which is at least the largest s and costs nothing in addition.
    Singular values of at least 0.009 |s|_4 become 0.7 to 1.3.

    Args:
      x: an array with at least two axes; all but the last one are the rows.

    Returns:
      An array of the same shape and dtype. On explicit mesh axes, each device computes
      the whole result, which is then sharded as `x` is.
    """
    rows = gathered(x).reshape(-1, x.shape[-1])
    rows = rows.astype(at_least_float32(x.dtype))
    is_wide = rows.shape[0] <= rows.shape[1]
    result = _orthogonalize_wide(rows if is_wide else rows.T)
    result = result if is_wide else result.T
    return sharded_like(x, result.reshape(x.shape).astype(x.dtype))


def _orthogonalize_wide(x: jax.Array) -> jax.Array:
    """`orthogonalize` for a matrix with at least as many columns as rows."""
    x = x / _or_one(jnp.max(jnp.abs(x), initial=0))  # so that no square overflows
    gram = x @ x.T
    scale = 1 / _or_one(jnp.sqrt(jnp.linalg.norm(gram)))
    x, gram = scale * x, scale**2 * gram
    if x.shape[1] >= 2 * x.shape[0]:
        return _in_terms_of_gram(gram) @ x
    for a, b, c in COEFFICIENTS:
        x = a * x + (b * gram + c * (gram @ gram)) @ x
        gram = x @ x.T  # the last one is not used, and not computed if compiled
    return x


def _in_terms_of_gram(gram: jax.Array) -> jax.Array:
    """Q with q(X) = Q X, from G = X X^T, in products of the size of G.

    An iteration is X <- P X with P = a + b G + c G^2. P and G commute, hence
    G <- P^2 G, and X itself is not needed.
    """
    product = functools.partial(jnp.matmul, precision="high")  # G has squares of s
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    result = None
    for a, b, c in COEFFICIENTS:
        p = a * identity + b * gram + c * product(gram, gram)
        result = p if result is None else product(p, result)
        gram = product(p, product(p, gram))
    return result


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
