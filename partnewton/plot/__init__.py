"""Figures: heat maps of a partition Hessian, learning rates, and loss curves.

Every function draws on the matplotlib axes it receives, or on the axes of a new figure,
and returns them. The state of pyplot is neither needed nor changed: ``ax.figure`` is
displayed by a notebook and has the method ``savefig``.
"""

from partnewton.plot.curves import learning_rates, losses, predicted_vs_actual
from partnewton.plot.groups import layer_groups
from partnewton.plot.heat_map import correlation, hessian

__all__ = [
    "correlation",
    "hessian",
    "layer_groups",
    "learning_rates",
    "losses",
    "predicted_vs_actual",
]
