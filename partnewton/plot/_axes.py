"""Axes, scales and colours that several figures share."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLOURS = 10  # with more lines, single colours cannot be told apart


def axes_or_new(
    ax: "Axes | None", size: tuple[float, float], layout: str = "constrained"
) -> "Axes":
    """The given axes, or those of a new figure that is not registered with pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib: pip install "partnewton[plot]"'
        ) from error
    if ax is None:
        return Figure(figsize=size, layout=layout).subplots()
    return ax


def add_grid(ax: "Axes") -> None:
    """A light grid, and no frame at the top and on the right."""
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def set_log_scale(ax: "Axes", values: np.ndarray, axes: str = "y") -> None:
    """Logarithmic axes; "symlog" if some values are zero or negative."""
    sizes = np.abs(values[values != 0])
    if sizes.size == 0:
        return
    scale: dict[str, Any] = {"value": "log"}
    if np.any(values <= 0):
        # A few values as small as 1e-20 must not take up most of the axis.
        smallest = max(np.quantile(sizes, 0.05), 1e-6 * sizes.max())
        threshold = 10.0 ** np.floor(np.log10(smallest))
        scale = {"value": "symlog", "linthresh": threshold}
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0.5)
    for axis in axes:
        {"x": ax.set_xscale, "y": ax.set_yscale}[axis](**scale)
        getattr(ax, f"{axis}axis").get_major_locator().set_params(numticks=9)


def line_styles(count: int) -> list[dict[str, Any]]:
    """Distinct colours for few lines, shades from first to last for many."""
    import matplotlib

    if count <= MAX_COLOURS:
        return [{"color": f"C{i}"} for i in range(count)]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))
    return [{"color": tuple(shade)} for shade in shades.tolist()]


def add_legend(ax: "Axes", lines: int) -> None:
    """A legend inside the axes for few lines, else beside them in up to two columns."""
    handles, labels = ax.get_legend_handles_labels()
    if lines <= _MAX_INSIDE:
        ax.legend(fontsize="small", frameon=False)
        return
    height = ax.get_position().height * ax.figure.get_figheight()
    rows = 72 * height / 9  # of 9 points
    every = max(1, int(np.ceil(len(labels) / (2 * rows - 2))))
    ax.legend(
        handles[::every],
        labels[::every],
        title=f"one line in {every}" if every > 1 else None,
        fontsize="small" if lines <= MAX_COLOURS else "x-small",
        title_fontsize="x-small",
        ncols=1 + (len(labels) > rows),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        labelspacing=0.2,
    )


_MAX_INSIDE = 5  # a longer legend would hide the lines
