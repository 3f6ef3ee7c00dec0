"""Second-order learning rates: one for each part of the parameters, solved for."""

from partnewton import partitions, rules
from partnewton.cubic import CubicSolution, CubicStatus, solve_cubic
from partnewton.metrics import metrics
from partnewton.partitions import subset_names
from partnewton.summary import Summary, derivative_tensors, summarize
from partnewton.transform import (
    ScaleByPartitionNewtonState,
    learning_rates,
    partition_newton,
    scale_by_partition_newton,
)

__version__ = "0.1.0"

__all__ = [
    "CubicSolution",
    "CubicStatus",
    "ScaleByPartitionNewtonState",
    "Summary",
    "derivative_tensors",
    "learning_rates",
    "metrics",
    "partition_newton",
    "partitions",
    "rules",
    "scale_by_partition_newton",
    "solve_cubic",
    "subset_names",
    "summarize",
]
