"""The merge tree of a suggested partition."""

from typing import TYPE_CHECKING, Any

import numpy as np

from partnewton.plot._axes import add_grid, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dendrogram"]

_LEAST = 1e-4  # smaller losses are drawn at the left edge of the axis
_APART = "0.6"  # the grey of merges that were not made


def dendrogram(suggested: Any, ax: "Axes | None" = None) -> "Axes":
    """Draw the merge tree of a suggested partition.

    Each subset is a horizontal line that starts at its name. Two lines that meet share
    a learning rate from there on; the position is the fraction of the predicted
    decrease that is lost if this merge, and all merges further to the left, are made.
    Merges that were made are coloured, one colour per cluster, and the dashed line
    separates them from the others.

    Args:
      suggested: from :func:`partnewton.suggest_partition`.
      ax: the axes to draw on; by default those of a new figure, whose size depends on
        the number of subsets.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import partnewton as pn
      >>> hessian = np.diag([1.0, 1.1, 9.0])
      >>> summary = pn.Summary(np.array(1.0), np.ones(3), hessian, None)
      >>> params = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
      >>> ax = dendrogram(pn.suggest_partition(summary, params))
      >>> ax.get_title()
      '3 subsets in 2 clusters'
    """
    size = len(suggested.names)
    ax = axes_or_new(ax, (7.0, min(max(2.5, 1.2 + 0.25 * size), 20.0)))
    made = size - len(suggested.clusters)
    order, heights = _leaf_order(suggested), {}
    for row, s in enumerate(order):
        heights[s] = (float(row), _LEAST)
    colours = _colours(suggested)
    for i, merge in enumerate(suggested.merges):
        (y1, x1), (y2, x2) = heights[merge.first], heights[merge.second]
        x = max(merge.lost, _LEAST)
        colour = colours[size + i] if i < made else _APART
        ax.plot([x1, x, x, x2], [y1, y1, y2, y2], color=colour, linewidth=1.6)
        heights[size + i] = ((y1 + y2) / 2, x)
    for row, s in enumerate(order):  # of clusters with one subset
        if colours[s] is not None:
            ax.plot(_LEAST, row, "o", color=colours[s], markersize=4, clip_on=False)
    ax.set_xscale("log")
    ax.set_xlim(_LEAST, 1.3)
    between = [m.lost for m in suggested.merges[max(made - 1, 0) : made + 1]]
    if between and made < size - 1:
        cut = np.sqrt(np.prod(np.clip([suggested.lost, between[-1]], _LEAST, 1.0)))
        ax.axvline(cut, color="0.3", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(size), [suggested.names[s] for s in order])
    ax.tick_params(axis="y", length=0, labelsize=min(9.0, max(4.5, 160 / size)))
    ax.set_ylim(size - 0.5, -0.5)
    ax.set_xlabel("fraction of the predicted decrease that is lost")
    ax.set_title(f"{size} subsets in {len(suggested.clusters)} clusters")
    add_grid(ax)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    return ax


def _leaf_order(suggested: Any) -> list[int]:
    """The subsets in an order in which no lines of the tree cross."""
    size = len(suggested.names)
    members: dict[int, list[int]] = {s: [s] for s in range(size)}
    for i, (first, second, _) in enumerate(suggested.merges):
        one, two = sorted((members.pop(first), members.pop(second)), key=min)
        members[size + i] = one + two
    (order,) = members.values()
    return order


def _colours(suggested: Any) -> dict[int, str]:
    """The colour of each subset, and of each merge inside of a cluster."""
    size = len(suggested.names)
    colours = {s: f"C{c % 10}" for c, xs in enumerate(suggested.clusters) for s in xs}
    for i, merge in enumerate(suggested.merges):
        colours[size + i] = colours[merge.first]
    return colours
