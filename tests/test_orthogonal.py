"""Orthogonalised momentum, against singular value decompositions and Chebyshev."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from partnewton.directions.orthogonal import (
    COEFFICIENTS,
    orthogonal_momentum,
    orthogonalize,
)

SHAPES = [(5, 5), (4, 9), (9, 4), (30, 3), (7, 1), (1, 7), (1, 1), (3, 3, 2, 8)]


def composed(x):
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    return x


def as_matrix(x):
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def polar(matrix):
    """U, s and V^T."""
    return np.linalg.svd(matrix, full_matrices=False)


@pytest.mark.parametrize("iteration", range(3))
def test_each_polynomial_is_the_best_approximation_of_one(iteration):
    # Chebyshev: the error of the best combination of x, x^3 and x^5 takes its largest
    # value at four points with alternating signs, and no other combination's does.
    low, high = 0.009, 1.0
    for a, b, c in COEFFICIENTS[: iteration + 1]:
        x = np.geomspace(low, high, 200_001)
        error = a * x + b * x**3 + c * x**5 - 1
        low, high = 1 + error.min(), 1 + error.max()
    largest = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > 0.995 * largest])
    assert np.sum(signs[1:] != signs[:-1]) == 3
    if iteration == 2:
        assert largest == pytest.approx(0.3, abs=5e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_keeps_singular_vectors_and_maps_singular_values(shape):
    x = np.random.default_rng(0).normal(size=shape)
    u, s, vt = polar(as_matrix(x))
    expected = (u * composed(s / np.sum(s**4) ** 0.25)) @ vt
    with jax.enable_x64(True):
        result = orthogonalize(jnp.asarray(x))
    assert result.shape == shape
    assert result.dtype == np.float64
    np.testing.assert_allclose(as_matrix(result), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (40, 200), (200, 40)], ids=str)
def test_in_float32_values_from_a_hundredth_on_become_almost_one(shape):
    rng = np.random.default_rng(1)
    u, _, vt = polar(rng.normal(size=shape))
    s = np.geomspace(1, 1e-5, len(vt))
    result = np.asarray(orthogonalize(jnp.asarray((u * s) @ vt, jnp.float32)))
    found = np.linalg.norm(u.T @ result, axis=1)
    large = s / np.sum(s**4) ** 0.25 >= 0.009
    assert np.all((found[large] > 0.69) & (found[large] < 1.31))
    np.testing.assert_allclose(found, composed(s / np.sum(s**4) ** 0.25), atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_scale_of_a_matrix_does_not_matter(dtype, scale):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 10)), dtype)
    result = orthogonalize((scale * x).astype(dtype))
    assert result.dtype == dtype
    np.testing.assert_allclose(
        np.float64(result), np.float64(orthogonalize(x)), atol=2e-2
    )


def test_zeros_and_empty_matrices_are_kept():
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((3, 4))), np.zeros((3, 4)))
    assert orthogonalize(jnp.zeros((0, 4))).shape == (0, 4)


def test_other_leaves_are_updated_with_adam():
    grads = {"bias": jnp.arange(3.0), "stacked": jnp.ones((2, 2, 2))}
    expected, adam = grads, optax.scale_by_adam(nesterov=True)
    expected, _ = adam.update(grads, adam.init(grads))
    grads |= {"kernel": jnp.arange(12.0).reshape(3, 4)}
    tx = orthogonal_momentum()
    found, _ = tx.update(grads, tx.init(grads))
    kernel = orthogonalize(grads.pop("kernel"))
    np.testing.assert_allclose(found.pop("kernel"), kernel, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_momentum_is_nesterovs():
    rng = np.random.default_rng(3)
    grads = [jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(3)]
    tx = orthogonal_momentum(0.5)
    state = tx.init(grads[0])
    for grad in grads:
        found, state = tx.update(grad, state)
    trace = grads[2] + 0.5 * grads[1] + 0.25 * grads[0]
    np.testing.assert_allclose(
        found, orthogonalize(grads[2] + 0.5 * trace), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("decay", [-0.1, 1.0, np.nan])
def test_a_decay_out_of_bounds_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        orthogonal_momentum(decay)
