"""The quadratic model in a subspace, and its minimisers for several dampings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.cubic._powers import exponent_of, ldexp

__all__ = ["Model", "damped_step", "quadratic_model"]


class Model(NamedTuple):
    """The quadratic model, diagonalised in units in which curvatures are of order 1.

    Attributes:
      slopes: the gradient in the eigenbasis, (K S,).
      magnitudes: absolute values of the eigenvalues, the largest of which is 1, (K S,).
      vectors: eta = vectors @ z for coordinates z in the eigenbasis, (K S, K S).
      gradient: as in the summary, (K S,).
      hessian: as in the summary, (K S, K S).
    """

    slopes: jax.Array
    magnitudes: jax.Array
    vectors: jax.Array
    gradient: jax.Array
    hessian: jax.Array


def quadratic_model(
    value: jax.Array,
    gradient: jax.Array,
    hessian: jax.Array,
    is_noise: jax.Array | bool = False,
) -> Model:
    """The model -gradient . eta + 1/2 eta' hessian eta of the loss.

    Subset s is measured in units of D_s, the square root of the norm of its diagonal
    block, so that the step does not depend on the scale of a subset. A subset without
    curvature stays where it is, unless none has curvature; then D_s = |gradient_s| /
    sqrt(|value|). So does a subset whose gradient is a rounding error, as that of a
    parameter that the loss does not depend on: its curvature is one, too, and the
    ratio of the two may be any number.

    Args:
      value: the loss, ().
      gradient: along an orthonormal basis of each subset, (K, S).
      hessian: (K, S, K, S).
      is_noise: whether the gradient of a subset is a rounding error, (S,).
    """
    K, S = gradient.shape
    largest = jnp.max(jnp.abs(hessian), initial=0)
    exponent = jnp.where(largest > 0, exponent_of(largest), 0)
    blocks = ldexp(jnp.einsum("ksls->kls", hessian), -exponent)
    curvature = ldexp(jnp.sqrt(jnp.sum(blocks**2, (0, 1))), exponent)
    slope = jnp.sqrt(jnp.sum(gradient**2, 0))
    is_curved = (curvature > 0) & jnp.logical_not(is_noise)
    decrease = jnp.where(value != 0, jnp.abs(value), 1)
    uncurved = jnp.where(slope > 0, slope / jnp.sqrt(decrease), 1)
    D = jnp.where(is_curved, jnp.sqrt(jnp.where(is_curved, curvature, 1)), uncurved)
    moves = (is_curved | ~jnp.any(is_curved)) & jnp.logical_not(is_noise)
    D, moves = jnp.tile(jnp.where(moves, D, 1), K), jnp.tile(moves, K)

    g = jnp.where(moves, gradient.reshape(K * S), 0)
    H = hessian.reshape(K * S, K * S)
    H = jnp.where(moves[:, None] & moves, (H + H.T) / 2, 0)
    eigenvalues, vectors = jnp.linalg.eigh(H / D[:, None] / D[None, :])
    magnitudes = jnp.abs(eigenvalues)
    largest = jnp.max(magnitudes)
    largest = jnp.where(largest > 0, largest, 1)
    slopes = vectors.T @ (g / D) / largest
    return Model(slopes, magnitudes / largest, vectors / D[:, None], g, H)


def damped_step(model: Model, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """eta = (|hessian| + damping D^2 max)^-1 gradient, and the decrease of the model.

    |hessian| has the absolute values of the eigenvalues, in units of D, and max is the
    largest of them.
    """
    eta = model.vectors @ (model.slopes / (model.magnitudes + damping))
    return eta, model.gradient @ eta - eta @ (model.hessian @ eta) / 2
