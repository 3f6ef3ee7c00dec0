"""Which subsets can share a learning rate, from summaries of the loss.

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

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from partnewton import partitions
from partnewton._checks import check_number
from partnewton.summary import Summary

__all__ = ["Merge", "SuggestedPartition", "suggest_partition"]

PyTree = Any


class Merge(NamedTuple):
    """One merge of the tree of a :class:`SuggestedPartition`.

    Attributes:
      first: a cluster: an index less than S is a subset, and S + i is the result of
        merge i.
      second: the other cluster.
      lost: the fraction of the predicted decrease that is lost after this merge and all
        merges before it; it does not decrease from one merge to the next.
    """

    first: int
    second: int
    lost: float


@dataclasses.dataclass(frozen=True)
class SuggestedPartition:
    """A coarser partition, which is a value for `param_labels`, and how it was found.

    Called with parameters it returns their labels, so that it can be passed on as it
    is: ``pn.partition_newton(param_labels=suggested)``.

    Attributes:
      names: the names of the S subsets of the summaries.
      clusters: the subsets of the coarser partition, as tuples of indices of `names`.
      lost: the fraction of the predicted decrease that is lost if the subsets of each
        cluster share a learning rate; the mean over the summaries.
      merges: all S - 1 merges, from S subsets to one, in order.
      consistency: for each subset |mean| / standard deviation of its optimal learning
        rate over the summaries, in units of the common rate; below 1, the rate
        is mostly noise, or the steps differ. None for less than three summaries.
      param_labels: the partition of the summaries.
    """

    names: tuple[str, ...]
    clusters: tuple[tuple[int, ...], ...]
    lost: float
    merges: tuple[Merge, ...]
    consistency: np.ndarray | None
    param_labels: partitions.ParamLabels

    @property
    def labels(self) -> dict[str, str]:
        """``{name of a subset: name of its cluster}``."""
        return {
            self.names[s]: name
            for name, cluster in zip(self.cluster_names, self.clusters, strict=True)
            for s in cluster
        }

    @property
    def cluster_names(self) -> tuple[str, ...]:
        """The name of the first subset, and how many others are with it."""
        return tuple(
            self.names[cluster[0]] + (f" +{len(cluster) - 1}" if cluster[1:] else "")
            for cluster in self.clusters
        )

    @property
    def noisy(self) -> tuple[str, ...]:
        """The names of the subsets whose `consistency` is less than 1."""
        if self.consistency is None:
            return ()
        pairs = zip(self.names, self.consistency, strict=True)
        return tuple(name for name, x in pairs if x < 1)

    def cut(
        self, *, max_lost: float | None = None, count: int | None = None
    ) -> "SuggestedPartition":
        """Another partition of the same tree.

        Args:
          max_lost: the largest fraction of the predicted decrease that may be lost.
          count: the number of clusters. Exactly one of both is given.

        Returns:
          The suggestion with other `clusters` and another `lost`.

        Raises:
          ValueError: neither or both are given, or they are out of range.
        """
        size = len(self.names)
        if (max_lost is None) == (count is None):
            raise ValueError("cut: give either max_lost or count.")
        if count is not None:
            if not 1 <= count <= size:
                raise ValueError(f"count must be from 1 to {size}, got {count}.")
            made = size - count
        else:
            check_number("max_lost", max_lost)
            made = sum(merge.lost <= max_lost for merge in self.merges)
        members: dict[int, tuple[int, ...]] = {s: (s,) for s in range(size)}
        for i, (first, second, _) in enumerate(self.merges[:made]):
            joined = members.pop(first) + members.pop(second)
            members[size + i] = tuple(sorted(joined))
        return dataclasses.replace(
            self,
            clusters=tuple(sorted(members.values())),
            lost=self.merges[made - 1].lost if made else 0.0,
        )

    def __call__(self, params: PyTree) -> PyTree:
        """The labels of parameters: names of clusters, or numbers inside of leaves."""
        import jax

        partition = partitions.partition_of(params, self.param_labels)
        if partition.names != self.names:
            raise ValueError(
                f"params: a partition into {partition.size} subsets, "
                f"{partitions.listing(partition.names)}, but the suggestion is for "
                f"{len(self.names)} subsets, {partitions.listing(self.names)}."
            )
        cluster_of = np.zeros(len(self.names) + 1, int)
        for c, cluster in enumerate(self.clusters):
            cluster_of[list(cluster)] = c
        cluster_of[partitions.FROZEN] = partitions.FROZEN
        numbered = [cluster_of[label] for label in partition.labels]
        inside = any(np.ndim(label) for label in numbered)
        labels = [
            label if inside or label == partitions.FROZEN else self.cluster_names[label]
            for label in numbered
        ]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def __str__(self) -> str:
        lines = [
            f"{len(self.names)} subsets in {len(self.clusters)} clusters, which keep "
            f"{100 * (1 - self.lost):.3g} % of the predicted decrease"
        ]
        for name, cluster in zip(self.cluster_names, self.clusters, strict=True):
            members = partitions.listing([self.names[s] for s in cluster])
            lines.append(f"  {name}: {members}" if cluster[1:] else f"  {name}")
        if self.noisy:
            lines.append(
                f"rates that vary more than their mean: {', '.join(self.noisy)}"
            )
        return "\n".join(lines)


def suggest_partition(
    summaries: Summary | Sequence[Summary],
    params: PyTree,
    *,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    max_lost: float = 0.05,
    count: int | None = None,
    direction_scale: np.typing.ArrayLike | None = None,
    min_eigenvalue: float = 1e-3,
) -> SuggestedPartition:
    """Merge subsets that can share a learning rate without a loss.

    The cost of a merge is the increase of the minimum of the quadratic model,

        min over eta   - gradient . eta + 1/2 eta' hessian eta,

    if the merged subsets have the same learning rate, divided by the predicted decrease
    before all merges, and averaged over the summaries. At each step, the two clusters
    whose merge costs least are merged. This is a greedy method: each cost is exact, but
    another sequence of merges may give a better partition of the same size.

    The Hessian is scaled to a diagonal of ones or minus ones, and its eigenvalues are
    replaced by their absolute values, at least `min_eigenvalue`: without this, an
    indefinite model has no minimum, and rates along a direction with hardly any
    curvature would be all that counts. Subsets without curvature have no optimal rate.
    They are merged last, as if that cost all of the predicted decrease.

    Rates are those along the direction of the summaries. If the optimizer normalises
    its direction, as :func:`partnewton.partition_newton` does, its summary is that of
    the normalised direction, but the subsets of a cluster are normalised together, and
    move in proportion to the direction as it was. `direction_scale` corrects for that.

    Args:
      summaries: a :class:`~partnewton.Summary` or a sequence of them: of several
        batches, or of several steps. One with a leading axis is such a sequence.
      params: the parameters, or their shapes.
      param_labels: the partition of the summaries.
      max_lost: the largest fraction of the predicted decrease that may be lost.
      count: the number of clusters, instead of `max_lost`.
      direction_scale: the RMS of the direction before it was normalised, (S,); by
        default the summaries are those of a direction that was not normalised.
      min_eigenvalue: the lower bound for the absolute eigenvalues of the Hessian with a
        unit diagonal, positive.

    Returns:
      A :class:`SuggestedPartition`, which is a value for `param_labels`.

    Raises:
      ValueError: the shapes of the summaries are not those of the partition, a summary
        is not finite, or predicts no decrease.

    Example:
      >>> gradient = np.array([1.0, 1.0, 2.0])
      >>> hessian = np.diag([1.0, 1.01, 0.1])
      >>> summary = Summary(np.array(1.0), gradient, hessian, None)
      >>> params = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
      >>> suggested = suggest_partition(summary, params)
      >>> suggested.labels
      {'a': 'a +1', 'b': 'a +1', 'c': 'c'}
      >>> print(suggested)
      3 subsets in 2 clusters, which keep 100 % of the predicted decrease
        a +1: 'a', 'b'
        c

    References:
      J. H. Ward, "Hierarchical Grouping to Optimize an Objective Function", Journal of
      the American Statistical Association 58 (1963), for the method of merging.
    """
    names = partitions.subset_names(params, param_labels)
    gradients, hessians = _stacked(summaries, len(names))
    if direction_scale is not None:
        scale = np.asarray(direction_scale, np.float64)
        if scale.shape != (len(names),):
            raise ValueError(
                f"direction_scale must have shape ({len(names)},), got {scale.shape}."
            )
        gradients, hessians = gradients * scale, hessians * scale[:, None] * scale
    check_number("min_eigenvalue", min_eigenvalue, strict=True)
    # Those without curvature in a summary are left out, and merged last.
    curved = np.flatnonzero(np.all(np.einsum("nss->ns", hessians) != 0, axis=0))
    gradients, hessians = gradients[:, curved], hessians[:, curved][:, :, curved]
    hessians = np.stack([_positive_definite(x, min_eigenvalue) for x in hessians])
    merges = _with_others(_merges(gradients, hessians), curved, len(names))
    consistency = _consistency(gradients, hessians)
    if consistency is not None:
        everywhere = np.zeros(len(names))
        everywhere[curved] = consistency
        consistency = everywhere
    finest = SuggestedPartition(
        names,
        tuple((s,) for s in range(len(names))),
        0.0,
        merges,
        consistency,
        param_labels,
    )
    if count is not None:
        return finest.cut(count=count)
    return finest.cut(max_lost=max_lost)


def _stacked(
    summaries: Summary | Sequence[Summary], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients (n, S) and the Hessians (n, S, S), in float64."""
    if not isinstance(summaries, Summary) and len(summaries) == 0:
        raise ValueError("summaries is empty.")
    many = [summaries] if isinstance(summaries, Summary) else list(summaries)
    shapes = [(np.shape(s.gradient), np.shape(s.hessian)) for s in many]
    if any(g[-1:] != (size,) or h != (*g, size) for g, h in shapes):
        raise ValueError(
            f"summaries: the partition of params has {size} subsets, but the shapes of "
            f"gradient and hessian are {np.shape(many[0].gradient)} and "
            f"{np.shape(many[0].hessian)}."
        )
    gradients, hessians = (
        np.concatenate(
            [np.reshape(np.asarray(x, np.float64), (-1, *shape)) for x in xs]
        )
        for xs, shape in (
            ([s.gradient for s in many], (size,)),
            ([s.hessian for s in many], (size, size)),
        )
    )
    if not (np.all(np.isfinite(gradients)) and np.all(np.isfinite(hessians))):
        raise ValueError("summaries: a gradient or a Hessian is not finite.")
    return gradients, hessians


def _positive_definite(hessian: np.ndarray, min_eigenvalue: float) -> np.ndarray:
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


def _merges(gradients: np.ndarray, hessians: np.ndarray) -> tuple[Merge, ...]:
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
        merges.append(Merge(clusters[a], clusters[b], min(lost, 1.0)))
        clusters[a] = size + i
        del clusters[b]
    return tuple(merges)


def _with_others(
    merges: Sequence[Merge], curved: np.ndarray, size: int
) -> tuple[Merge, ...]:
    """The merges of the subsets with curvature, numbered among all, and the others."""
    number = [*curved.tolist(), *range(size, 2 * size)]
    found = [Merge(number[a], number[b], lost) for a, b, lost in merges]
    rest = [s for s in range(size) if s not in set(curved.tolist())]
    for s in rest if len(curved) else rest[1:]:
        top = size + len(found) - 1 if found else (curved.tolist() or rest)[0]
        found.append(Merge(top, s, 1.0))
    return tuple(found)


def _joined(array: np.ndarray, a: int, b: int) -> np.ndarray:
    """The array with the entries b of axis 1 added to those at a, and then removed."""
    array = array.copy()
    array[:, a] += array[:, b]
    return np.delete(array, b, axis=1)


def _consistency(gradients: np.ndarray, hessians: np.ndarray) -> np.ndarray | None:
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
