"""The order in which subsets are merged, and what it costs that they share a rate.

The quadratic model of the loss after a step is

    m(eta) = -gradient . eta + 1/2 eta' hessian eta.

If subsets share a rate, eta = M z, where M assigns subsets to clusters, and the minimum
over z is higher than that over eta. This difference is what merging costs, and it is
computed from the summary alone. For two clusters a and b of which each has a rate, with
the minimiser z and W = (M' hessian M)^-1, it is

    (z_a - z_b)^2 / (2 (W_aa + W_bb - 2 W_ab)).

So merging is cheap if the two optimal rates are nearly equal, or if the model hardly
changes along their difference: the two subsets interact so strongly that only their
sum counts. Clusters are merged in the order of these costs, as in Ward's method, whose
criterion this is for the sum of squares.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["consistency_of", "merges_of", "positive_definite", "with_others"]

# Two clusters, and the fraction of the decrease that is lost after their merge, see
# :class:`partnewton.interactions.Merge`.
Merged = tuple[int, int, float]


def positive_definite(hessian: np.ndarray, min_eigenvalue: float) -> np.ndarray:
    """The Hessian with absolute eigenvalues, in units of its diagonal."""
    unit = np.sqrt(np.abs(np.diagonal(hessian)))
    values, vectors = np.linalg.eigh(hessian / unit[:, None] / unit)
    absolute = (vectors * np.maximum(np.abs(values), min_eigenvalue)) @ vectors.T
    return unit[:, None] * absolute * unit


def _solved(
    gradients: np.ndarray, hessians: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The minimisers (n, S), the decreases (n,) and the inverse Hessians (n, S, S)."""
    unit = np.sqrt(np.einsum("nss->ns", hessians))
    scaled = hessians / unit[:, :, None] / unit[:, None, :]
    inverse = np.linalg.inv(scaled) / unit[:, :, None] / unit[:, None, :]
    rates = np.einsum("nst,nt->ns", inverse, gradients)
    return rates, np.einsum("ns,ns->n", rates, gradients) / 2, inverse


def merges_of(gradients: np.ndarray, hessians: np.ndarray) -> list[Merged]:
    """All merges, each time of the two clusters for which it costs least."""
    size = gradients.shape[1]
    clusters = list(range(size))
    rates, decrease, inverse = _solved(gradients, hessians)
    if size and np.any(decrease <= 0):
        raise ValueError("summaries: a gradient is zero, so no decrease is predicted.")
    total, merges, lost = decrease, [], 0.0
    for i in range(size - 1):
        diagonal = np.einsum("nss->ns", inverse)
        spread = diagonal[:, :, None] + diagonal[:, None, :] - 2 * inverse
        spread = np.maximum(spread, np.finfo(np.float64).tiny)
        costs = (rates[:, :, None] - rates[:, None, :]) ** 2 / (2 * spread)
        relative = np.mean(costs / total[:, None, None], axis=0)
        relative[np.tril_indices(len(clusters))] = np.inf
        a, b = np.unravel_index(np.argmin(relative), relative.shape)
        gradients, hessians = _joined(gradients, a, b), _joined(hessians, a, b)
        hessians = np.swapaxes(_joined(np.swapaxes(hessians, 1, 2), a, b), 1, 2)
        rates, decrease, inverse = _solved(gradients, hessians)
        lost = max(lost, float(np.mean(1 - decrease / total)))  # but for rounding
        merges.append((clusters[a], clusters[b], min(lost, 1.0)))
        clusters[a] = size + i
        del clusters[b]
    return merges


def with_others(
    merges: Sequence[Merged], curved: np.ndarray, size: int
) -> list[Merged]:
    """The merges of the subsets with curvature, numbered among all, and the others."""
    number = [*curved.tolist(), *range(size, 2 * size)]
    found = [(number[a], number[b], lost) for a, b, lost in merges]
    rest = [s for s in range(size) if s not in set(curved.tolist())]
    for s in rest if len(curved) else rest[1:]:
        top = size + len(found) - 1 if found else (curved.tolist() or rest)[0]
        found.append((top, s, 1.0))
    return found


def _joined(array: np.ndarray, a: int, b: int) -> np.ndarray:
    """The array with the entries b of axis 1 added to those at a, and then removed."""
    array = array.copy()
    array[:, a] += array[:, b]
    return np.delete(array, b, axis=1)


def consistency_of(gradients: np.ndarray, hessians: np.ndarray) -> np.ndarray | None:
    """|mean| / standard deviation of each rate, relative to the common rate."""
    is_descent = gradients.sum(1) > 0
    if np.sum(is_descent) < 3:
        return None
    gradients, hessians = gradients[is_descent], hessians[is_descent]
    common = gradients.sum(1) / hessians.sum((1, 2))
    rates = _solved(gradients, hessians)[0] / common[:, None]
    spread = np.std(rates, axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, np.abs(np.mean(rates, axis=0)) / spread, np.inf)
