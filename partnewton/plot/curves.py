"""Curves over training: learning rates, decreases and losses."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from partnewton.plot._axes import (
    MAX_COLOURS,
    add_grid,
    add_legend,
    axes_or_new,
    label_lines,
    line_styles,
    set_log_scale,
)
from partnewton.plot.groups import layer_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_rates", "losses", "predicted_vs_actual"]


def learning_rates(
    history: tuple[np.typing.ArrayLike, Mapping[str, np.typing.ArrayLike]],
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the learning rate of each subset over time, on a logarithmic axis.

    Thin lines are the rates, bold lines their running medians. If some rates are zero
    or negative, the axis is linear around zero. Up to ten lines have their names at
    their ends. If there are more, there is a legend, and the lines of one of the
    :func:`layer_groups` have the same colour.

    Args:
      history: ``(steps, {name: values})``, all of the same length.
      ax: the axes to draw on; by default those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: the number of values differs from the number of steps.
      ImportError: matplotlib is not installed.

    Example:
      >>> ax = learning_rates(([0, 10, 20], {"kernel": [0.1, 0.4, 0.2]}))
      >>> ax.get_yscale()
      'log'
    """
    steps, rates = history
    steps = np.asarray(steps)
    ax = axes_or_new(ax, (7.0, 4.5))
    finite, medians = np.zeros(0), np.zeros(0)
    window = max(1, len(steps) // 8)
    labels, styles = _labels_and_styles(list(rates))
    for (name, values), label, style in zip(rates.items(), labels, styles, strict=True):
        values = np.asarray(values, np.float64)
        if values.shape != steps.shape:
            raise ValueError(
                f"history: {name!r} has {values.size} values for {steps.size} steps."
            )
        values = np.where(np.isfinite(values), values, np.nan)
        thin = style | {"linestyle": "solid"}
        ax.plot(steps, values, linewidth=0.6, alpha=0.25, **thin)
        smooth = _running_median(values, window)
        ax.plot(steps, smooth, linewidth=1.9, label=label, **style)
        finite = np.append(finite, values[~np.isnan(values)])
        medians = np.append(medians, smooth[~np.isnan(smooth)])
    set_log_scale(ax, finite)
    if ax.get_yscale() == "symlog" and finite.min() >= 0:
        ax.set_ylim(bottom=-0.3 * ax.yaxis.get_transform().linthresh)
    elif ax.get_yscale() == "log":  # a few small rates must not take up the axis
        ax.set_ylim(bottom=max(ax.get_ylim()[0], medians.min() / 10))
    ax.set_title("Learning rate of each subset")
    ax.set_xlabel("step")
    add_grid(ax)
    if len(rates) <= MAX_COLOURS:
        label_lines(ax)
    else:
        add_legend(ax, len(rates))
    return ax


def predicted_vs_actual(
    history: tuple[np.typing.ArrayLike, np.typing.ArrayLike, np.typing.ArrayLike],
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the actual decrease of the loss at each step against the predicted one.

    On the diagonal the prediction is exact, below it the decrease is less than
    predicted, and below the line at zero the loss increases. Early steps are dark, late
    steps bright.

    Args:
      history: ``(steps, predicted, actual)``, three sequences of the same length; a
        decrease is positive if the loss falls. Non-finite points are omitted.
      ax: the axes to draw on; by default those of a new figure.

    Returns:
      The axes. Their figure also contains those of the colour bar.

    Raises:
      ValueError: the lengths differ.
      ImportError: matplotlib is not installed.

    Example:
      >>> ax = predicted_vs_actual(([0, 1, 2], [0.4, 0.2, 0.1], [0.35, 0.1, -0.02]))
      >>> ax.get_ylabel()
      'actual decrease'
    """
    steps, x, y = (np.asarray(column, np.float64) for column in history)
    if not steps.shape == x.shape == y.shape or steps.ndim != 1:
        raise ValueError(
            f"history: {steps.size} steps, {x.size} predicted and {y.size} actual "
            "decreases; these numbers must be equal."
        )
    ax = axes_or_new(ax, (5.5, 4.5))
    is_finite = np.isfinite(x) & np.isfinite(y)
    steps, x, y = steps[is_finite], x[is_finite], y[is_finite]
    points = ax.scatter(x, y, c=steps, cmap="viridis", s=14, linewidths=0, alpha=0.8)
    # The same scale on both axes, so that the diagonal is straight.
    set_log_scale(ax, np.append(x, y), axes="xy")
    ends = [x.min(), x.max()] if x.size else []
    ax.plot(ends, ends, color="0.4", linewidth=1, label="actual = predicted")
    ax.set_title("Predicted and actual decrease of the loss")
    ax.set_xlabel("predicted decrease")
    ax.set_ylabel("actual decrease")
    add_grid(ax)
    ax.legend(fontsize="small", frameon=False, loc="upper left")
    bar = ax.figure.colorbar(points, ax=ax, label="step", pad=0.03)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    return ax


def losses(
    curves: Mapping[str, tuple[np.typing.ArrayLike, np.typing.ArrayLike]],
    ax: "Axes | None" = None,
    *,
    ylabel: str = "train loss",
    log: bool = True,
) -> "Axes":
    """Draw one loss curve per optimizer.

    Args:
      curves: ``{name: (x, y)}``; x is a number of steps, a time, ...
      ax: the axes to draw on; by default those of a new figure.
      ylabel: the label of the y axis.
      log: whether the y axis is logarithmic.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> ax = losses({"adam": ([0, 1, 2], [2.3, 1.1, 0.4])})
      >>> ax.get_ylabel()
      'train loss'
    """
    ax = axes_or_new(ax, (6.0, 4.0))
    styles = line_styles(len(curves))
    for (name, (x, y)), style in zip(curves.items(), styles, strict=True):
        y = np.asarray(y, np.float64)
        y = np.where(np.isfinite(y), y, np.nan)
        ax.plot(np.asarray(x), y, linewidth=1.9, label=name, **style)
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    add_grid(ax)
    if len(curves) > 1:
        add_legend(ax, len(curves))
    return ax


def _labels_and_styles(
    names: Sequence[str],
) -> tuple[list[str | None], list[dict[str, Any]]]:
    """The legend entry, if any, and the style of each line.

    If there are many lines, those of a layer group share one entry and one colour.
    """
    groups = layer_groups(names)
    if len(names) <= MAX_COLOURS or not groups:
        return list(names), line_styles(len(names))
    labels = [
        name if first else None
        for name, count in groups
        for first in [True] + [False] * (count - 1)
    ]
    styles = zip(groups, line_styles(len(groups)), strict=True)
    return labels, [style for (_, count), style in styles for _ in range(count)]


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of the values at most `window` / 2 positions away, ignoring NaN."""
    half = window // 2
    neighbours = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    present = [part[~np.isnan(part)] for part in neighbours]
    return np.array([np.median(part) if part.size else np.nan for part in present])
