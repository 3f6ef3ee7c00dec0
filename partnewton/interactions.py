"""Which subsets can share a learning rate, from summaries of the loss.

Subsets are merged as long as that costs little of the decrease that the quadratic model
predicts; the costs are computed in :mod:`partnewton._merging`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from partnewton import partitions
from partnewton._checks import check_number
from partnewton._merging import (
    consistency_of,
    merges_of,
    positive_definite,
    with_others,
)
from partnewton.summary import Summary
from partnewton.transform import ScaleByPartitionNewtonState

__all__ = ["Merge", "SuggestedPartition", "suggest_partition"]

PyTree = Any
Measured = Summary | ScaleByPartitionNewtonState


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
    summaries: Measured | Sequence[Measured],
    params: PyTree,
    *,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    max_lost: float = 0.05,
    count: int | None = None,
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

    Subsets that share a rate move in proportion to the direction. This is also true if
    the optimizer normalises its direction, as :func:`partnewton.partition_newton` does:
    a cluster is normalised as a whole. But the summary in its state belongs to the
    direction in which each subset was normalised by itself. So pass the *state*, which
    contains what the subsets were divided by, and not its summary.

    Args:
      summaries: a :class:`~partnewton.Summary` of a direction that is not normalised,
        or the state of the optimizer, :func:`partnewton.newton_state`; or a sequence of
        them: of several batches, or of several steps. One with a leading axis is such a
        sequence.
      params: the parameters, or their shapes.
      param_labels: the partition of the summaries.
      max_lost: the largest fraction of the predicted decrease that may be lost.
      count: the number of clusters, instead of `max_lost`.
      min_eigenvalue: the lower bound for the absolute eigenvalues of the Hessian with a
        unit diagonal, positive.

    Returns:
      A :class:`SuggestedPartition`, which is a value for `param_labels`.

    Raises:
      TypeError: something else than summaries or states was passed.
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
    check_number("min_eigenvalue", min_eigenvalue, strict=True)
    # Those without curvature in a summary are left out, and merged last.
    curved = np.flatnonzero(np.all(np.einsum("nss->ns", hessians) != 0, axis=0))
    gradients, hessians = gradients[:, curved], hessians[:, curved][:, :, curved]
    hessians = np.stack([positive_definite(x, min_eigenvalue) for x in hessians])
    found = with_others(merges_of(gradients, hessians), curved, len(names))
    merges = tuple(Merge(*x) for x in found)
    consistency = consistency_of(gradients, hessians)
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
    summaries: Measured | Sequence[Measured], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients (n, S) and the Hessians (n, S, S), in float64."""
    is_one = isinstance(summaries, Measured) or not isinstance(summaries, Sequence)
    many = [_of_direction(x) for x in ([summaries] if is_one else summaries)]
    if not many:
        raise ValueError("summaries is empty.")
    for gradient, hessian in many:
        if gradient.shape[-1:] != (size,) or hessian.shape != (*gradient.shape, size):
            raise ValueError(
                f"summaries: the partition of params has {size} subsets, but the "
                f"shapes of gradient and hessian are {gradient.shape} and "
                f"{hessian.shape}."
            )
    gradients = np.concatenate([g.reshape(-1, size) for g, _ in many])
    hessians = np.concatenate([h.reshape(-1, size, size) for _, h in many])
    if not (np.all(np.isfinite(gradients)) and np.all(np.isfinite(hessians))):
        raise ValueError("summaries: a gradient or a Hessian is not finite.")
    return gradients, hessians


def _of_direction(measured: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian along the direction before it was normalised."""
    if not isinstance(measured, Measured):
        hint = ""
        if isinstance(getattr(measured, "summary", None), Summary):
            hint = " Pass its attribute summary."
        raise TypeError(
            "summaries must be a Summary, the part newton_state(state) of the state of "
            f"an optimizer, or a sequence of these, got {type(measured).__name__}."
            f"{hint}"
        )
    gradient, hessian = (
        np.asarray(x, np.float64) for x in (measured.gradient, measured.hessian)
    )
    if isinstance(measured, Summary):
        return gradient, hessian
    scale = np.asarray(measured.direction_scale, np.float64)
    return gradient * scale, hessian * scale[..., :, None] * scale[..., None, :]
