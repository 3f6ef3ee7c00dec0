"""Axes, scales and colours that several figures share."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLOURS = 10  # with more lines, single colours cannot be told apart


def axes_or_new(
    ax: "Axes | None", size: tuple[float, float], layout: str = "constrained"
) -> "Axes":
    """The given axes, or those of a new figure that is not registered with pyplot."""
    figure = new_figure(size, layout)
    return figure.subplots() if ax is None else ax


def new_figure(size: tuple[float, float], layout: str = "constrained") -> "Figure":
    """A figure that is not registered with pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib: pip install "partnewton[plot]"'
        ) from error
    return Figure(figsize=size, layout=layout)


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
    """Distinct colours and dashes for few lines, shades from first to last for many.

    Of lines that coincide, each shows through the gaps of those drawn after it.
    """
    import matplotlib

    if count <= MAX_COLOURS:
        return [
            {"color": f"C{i}", "linestyle": _DASHES[i % len(_DASHES)]}
            for i in range(count)
        ]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))
    return [{"color": tuple(shade)} for shade in shades.tolist()]


_DASHES = ("solid", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def label_lines(ax: "Axes", fontsize: float = 8.0) -> None:
    """Write the label of each line at its right end, beside the axes, in its colour.

    Labels that would overlap are moved apart, and a thin line leads to each one. Call
    this after the limits of the axes have been set.
    """
    lines = [x for x in ax.get_lines() if not x.get_label().startswith("_")]
    ends = []
    for line in lines:
        x, y = (np.asarray(v, np.float64) for v in line.get_data(orig=False))
        present = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if present.size:
            end = ax.transData.transform((x[present[-1]], y[present[-1]]))
            ends.append((line, *ax.transAxes.inverted().transform(end)))
    ends.sort(key=lambda end: end[2])
    points = 72 * ax.get_position().height * ax.figure.get_figheight()
    heights = _moved_apart([y for *_, y in ends], 1.35 * fontsize / (0.85 * points))
    for (line, x, y), height in zip(ends, heights, strict=True):
        ax.annotate(
            line.get_label(),
            xy=(x, y),
            xytext=(1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.get_color(),
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def _moved_apart(positions: list[float], gap: float) -> list[float]:
    """Positions in the same increasing order, at least `gap` apart, and near 0 to 1."""
    moved: list[float] = []
    for position in positions:
        moved.append(max(position, moved[-1] + gap) if moved else position)
    excess = max(moved[-1] - 1, 0) if moved else 0
    for i in reversed(range(len(moved))):  # down again, as far as necessary
        limit = 1.0 if i == len(moved) - 1 else moved[i + 1] - gap
        moved[i] = min(moved[i], limit) if excess else moved[i]
    return moved


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
