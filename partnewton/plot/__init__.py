"""Figures: heat maps of a partition Hessian, learning rates, and loss curves.

A function with the argument `ax` draws on the matplotlib axes it receives, or on the
axes of a new figure, and returns them; `dashboard`, `interactions_over_time` and
`report` return a new figure with several axes. The state of pyplot is neither needed
nor changed: ``ax.figure`` is displayed by a notebook and has the method ``savefig``.
"""

from partnewton.plot.curves import learning_rates, losses, predicted_vs_actual
from partnewton.plot.groups import layer_groups
from partnewton.plot.heat_map import correlation, hessian
from partnewton.plot.overview import dashboard, interactions_over_time, report
from partnewton.plot.tree import dendrogram

__all__ = [
    "correlation",
    "dashboard",
    "dendrogram",
    "hessian",
    "interactions_over_time",
    "layer_groups",
    "learning_rates",
    "losses",
    "predicted_vs_actual",
    "report",
]
