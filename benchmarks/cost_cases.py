"""What :mod:`benchmarks.cost` compares: optimizers, transformations, and networks."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import partnewton as pn
from benchmarks import models, problems
from partnewton import averaging, directions, rules
from partnewton._refresh import default_refreshes

__all__ = [
    "NETWORKS",
    "OPTIMIZERS",
    "TRANSFORMATIONS",
    "MeasuredOptimizer",
    "optimizer",
]

RATE = 1e-3


class MeasuredOptimizer(NamedTuple):
    """How an optimizer is made, and after how many steps its cost repeats.

    Attributes:
      make: the optimizer as a user calls it.
      refreshes: from a number of steps, and of subsets or tensors, to the steps that
        refresh; the larger number of these two counts.
    """

    make: Callable[[], optax.GradientTransformation]
    refreshes: Callable[[int, int], list[int]] = lambda steps, size: []


def _average() -> averaging.Average:
    return averaging.relative(averaging.exponential(0.9, absolute_third=True))


# The transformations of `partition_newton()` in their order, as in `presets`.
TRANSFORMATIONS: dict[str, MeasuredOptimizer] = {
    "direction": MeasuredOptimizer(
        lambda: directions.skip_nonfinite(
            directions.equilibrated(directions.orthogonal_momentum()),
            param_labels=pn.partitions.auto,
        )
    ),
    "rates": MeasuredOptimizer(
        lambda: pn.scale_by_partition_newton(
            rules.with_noise_floor(rules.robust(shrinkage=0.5)),
            param_labels=pn.partitions.auto,
            normalize="rms",
            update_interval=None,
            average=_average(),
            backtracking=30,
        ),
        default_refreshes,
    ),
    "lookback": MeasuredOptimizer(pn.scale_by_lookback),
}

OPTIMIZERS: dict[str, MeasuredOptimizer] = {
    "sgd": MeasuredOptimizer(lambda: optax.sgd(RATE)),
    "adamw": MeasuredOptimizer(lambda: optax.adamw(RATE)),
    "muon": MeasuredOptimizer(lambda: contrib.muon(RATE)),
    "lbfgs": MeasuredOptimizer(optax.lbfgs),
    "partition_newton": MeasuredOptimizer(pn.partition_newton, default_refreshes),
    **TRANSFORMATIONS,
}
"""Measured by default; a learning rate of `RATE` follows the transformations."""


def optimizer(name: str) -> MeasuredOptimizer:
    """The optimizer called `name`; names joined by "+" are those of a chain."""
    names = name.split("+")
    if len(names) == 1 and name not in TRANSFORMATIONS:
        return OPTIMIZERS[name]
    parts = [TRANSFORMATIONS[part] for part in names]

    def make() -> optax.GradientTransformation:
        return optax.chain(
            *(x.make() for x in parts),
            optax.scale_by_learning_rate(RATE),
        )

    def refreshes(steps: int, size: int) -> list[int]:
        return sorted({n for x in parts for n in x.refreshes(steps, size)})

    return MeasuredOptimizer(make, refreshes)


def _problem(name: str, *, scale: int = 1) -> models.MeasuredLoss:
    """A problem of the training benchmark, on its first batch; too small to scale."""
    del scale
    problem = problems.make(name)
    return models.MeasuredLoss(
        name,
        lambda params, batch: problem.loss(params, *batch),
        problem.init(jax.random.key(0)),
        tuple(jnp.asarray(x[: problem.batch]) for x in problem.train),
    )


_MODELS = (
    "digits_cnn",
    "lstm",
    "transformer",
    "transformer_2_scan",
    "transformer_6",
    "transformer_6_scan",
    "resnet18",
    "mlp_deep",
    "transformer_12",
    "transformer_12_scan",
    "transformer_24",
    "transformer_24_scan",
)
NETWORKS: dict[str, Callable[..., models.MeasuredLoss]] = {
    **{name: functools.partial(_problem, name) for name in ("spirals", "diabetes")},
    **{name: functools.partial(models.make, name) for name in _MODELS},
}
"""From small to large: two perceptrons of the training benchmark, then networks."""
