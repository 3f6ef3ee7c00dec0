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


def quadratic_model(value: jax.Array, gradient: jax.Array, hessian: jax.Array) -> Model:
    """The model -gradient . eta + 1/2 eta' hessian eta of the loss.

    Subset s is measured in units of D_s, the square root of the norm of its diagonal
    block. A subset without curvature has D_s = |gradient_s| / sqrt(N), where N = sum_s
    |gradient_s|^2 / D_s^2 over the others is about twice the decrease that the model
    predicts for them, or the loss if no subset has curvature. So the step does not
    depend on the scale of a subset.

    Args:
      value: the loss, ().
      gradient: along an orthonormal basis of each subset, (K, S).
      hessian: (K, S, K, S).
    """
    K, S = gradient.shape
    largest = jnp.max(jnp.abs(hessian), initial=0)
    exponent = jnp.where(largest > 0, exponent_of(largest), 0)
    blocks = ldexp(jnp.einsum("ksls->kls", hessian), -exponent)
    curvature = ldexp(jnp.sqrt(jnp.sum(blocks**2, (0, 1))), exponent)
    slope = jnp.sqrt(jnp.sum(gradient**2, 0))
    is_curved = curvature > 0
    D = jnp.sqrt(jnp.where(is_curved, curvature, 1))
    N = jnp.sum(jnp.where(is_curved, (slope / D) ** 2, 0))
    N = jnp.where(N > 0, N, jnp.where(value != 0, jnp.abs(value), 1))
    D = jnp.where(is_curved, D, jnp.where(slope > 0, slope / jnp.sqrt(N), 1))
    D = jnp.tile(D, K)

    g, H = gradient.reshape(K * S), hessian.reshape(K * S, K * S)
    H = (H + H.T) / 2
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
