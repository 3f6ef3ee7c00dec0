"""Learning rates for subsets of the parameters, from exact second derivatives."""

from partnewton import averaging, directions, engines, partitions, rules
from partnewton.broyden import ScaleByBroydenState, scale_by_broyden
from partnewton.clipping import ClipByParameterRmsState, clip_by_parameter_rms
from partnewton.cubic import CubicSolution, CubicStatus, solve_cubic
from partnewton.inspection import Report, report
from partnewton.interactions import SuggestedPartition, suggest_partition
from partnewton.iterate_average import TrackAverageState, track_average
from partnewton.lookback import ScaleByLookbackState, scale_by_lookback
from partnewton.metrics import (
    averaged_params,
    learning_rates,
    metrics,
    newton_state,
)
from partnewton.partitions import subset_names
from partnewton.presets import paper_newton, partition_newton
from partnewton.subspace import (
    ScaleBySubspaceNewtonState,
    scale_by_subspace_newton,
    subspace_newton,
)
from partnewton.summary import Summary, derivative_tensors, summarize
from partnewton.transform import (
    ScaleByPartitionNewtonState,
    scale_by_partition_newton,
)

__version__ = "0.1.0"

__all__ = [
    "ClipByParameterRmsState",
    "CubicSolution",
    "CubicStatus",
    "Report",
    "ScaleByBroydenState",
    "ScaleByLookbackState",
    "ScaleByPartitionNewtonState",
    "ScaleBySubspaceNewtonState",
    "SuggestedPartition",
    "Summary",
    "TrackAverageState",
    "averaged_params",
    "averaging",
    "clip_by_parameter_rms",
    "derivative_tensors",
    "directions",
    "engines",
    "learning_rates",
    "metrics",
    "newton_state",
    "paper_newton",
    "partition_newton",
    "partitions",
    "report",
    "rules",
    "scale_by_broyden",
    "scale_by_lookback",
    "scale_by_partition_newton",
    "scale_by_subspace_newton",
    "solve_cubic",
    "subset_names",
    "subspace_newton",
    "suggest_partition",
    "summarize",
    "track_average",
]
