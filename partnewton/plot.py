"""Pictures of what the method sees: heat maps of a partition Hessian, and curves.

Every function draws on the axes it is given, or on new ones in a figure of their own,
and returns them: plain matplotlib, so pictures compose. The state of pyplot is neither
needed nor touched; ``ax.figure`` shows itself in a notebook and has ``savefig``.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "correlation",
    "hessian",
    "layer_groups",
    "learning_rates",
    "losses",
    "predicted_vs_actual",
]

BLANK = "0.88"  # the grey of entries that have no correlation
MOST_NUMBERS = 10  # with more subsets than that, cells are too small for a number
MOST_LINES = 10  # with more than that, colours no longer tell lines apart
MOST_INSIDE = 5  # entries of a legend that find room between the lines


def correlation(hessian: np.typing.ArrayLike) -> np.ndarray:
    """A partition Hessian with its scales divided out.

        C_st = hessian_st / sqrt(|hessian_ss hessian_tt|)

    It does not change when subsets are rescaled. Its diagonal is 1, or -1 where the
    curvature is negative. Off the diagonal it lies in [-1, 1] where the Hessian is
    positive semidefinite, and may lie beyond where it is not.

    Args:
      hessian: shape (S, S).

    Returns:
      A float64 array of shape (S, S), NaN in the rows and columns of subsets without
      curvature of their own, and where `hessian` is not finite.

    Raises:
      ValueError: `hessian` is not a square matrix.

    Example:
      >>> print(correlation([[4.0, 3.0], [3.0, 9.0]]))
      [[1.  0.5]
       [0.5 1. ]]
    """
    H = np.asarray(hessian, np.float64)
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"hessian must have shape (S, S), got {H.shape}.")
    H = np.where(np.isfinite(H), H, np.nan)
    scale = np.sqrt(np.abs(np.diagonal(H)))
    scale = np.where(scale > 0, scale, np.nan)
    # One division after the other: a product of two scales could underflow.
    return H / scale[:, None] / scale


def layer_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Which neighbours in a list of subsets belong together, by what their names share.

    A group is a run of names with the same first parts, "blocks/0" for example. Of all
    the numbers of parts, that one is taken which makes the number of groups most like
    the square root of that of names, so that a picture has few groups of a few each.

    Args:
      names: subset names, parts joined by "/".

    Returns:
      ``[(what the names of a group share, how many they are), ...]``, or an empty list
      if that would be one group, or a group for each name.

    Example:
      >>> layer_groups(["conv/kernel", "conv/bias", "dense/kernel", "dense/bias"])
      [('conv', 2), ('dense', 2)]
      >>> layer_groups(["kernel", "bias"])
      []
    """
    parts = [name.split("/") for name in names]
    found: list[list[tuple[str, int]]] = []
    for depth in range(1, max(map(len, parts), default=0)):
        # The last part of a name is its own, "kernel": never that of a group.
        shared = ["/".join(x[: max(1, min(depth, len(x) - 1))]) for x in parts]
        runs = [(key, len(list(run))) for key, run in itertools.groupby(shared)]
        if 1 < len(runs) < len(names):
            found.append(runs)
    return min(found, key=lambda x: abs(np.log(len(x) ** 2 / len(names))), default=[])


def hessian(summary: Any, names: Sequence[str], ax: "Axes | None" = None) -> "Axes":
    """Draws a partition Hessian as a heat map of its :func:`correlation`.

    Red pairs of subsets compete: a step in one takes away from what a step in the other
    gains. Blue pairs help each other. Subsets without curvature are left blank. Lines
    stand between the :func:`layer_groups`.

    Args:
      summary: a :class:`~partnewton.Summary`, or anything with a `hessian` (S, S).
      names: the S names, see :func:`partnewton.subset_names`.
      ax: where to draw; by default on new axes, in a figure that grows with S.

    Returns:
      The axes.

    Raises:
      ValueError: there are not S names.
      ImportError: matplotlib is not installed.

    Example:
      >>> from types import SimpleNamespace
      >>> summary = SimpleNamespace(hessian=[[4.0, 3.0], [3.0, 9.0]])
      >>> ax = hessian(summary, ["kernel", "bias"])
      >>> ax.figure.savefig("hessian.png")  # doctest: +SKIP
    """
    values = correlation(summary.hessian)
    S = len(values)
    if len(names) != S:
        raise ValueError(f"names: {len(names)} names for {S} subsets.")
    side = min(max(4.5, 2.5 + 0.2 * S), 16.0)
    ax = _axes(ax, (side + 1.0, side), layout="compressed")

    import matplotlib

    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["RdBu_r"].with_extremes(bad=BLANK),
        vmin=-1,
        vmax=1,
        interpolation="nearest",
    )
    _name_ticks(ax, names)
    _mark_groups(ax, layer_groups(names))
    if S <= MOST_NUMBERS:
        _write_numbers(ax, values)
    ax.set_title("Partition Hessian, as a correlation")
    ax.set_xlabel(_remarks(values), fontsize="small", color="0.35")
    bar = ax.figure.colorbar(
        image, ax=ax, extend=_extend(values), fraction=0.046, pad=0.03
    )
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.outline.set_visible(False)
    return ax


def learning_rates(
    history: tuple[np.typing.ArrayLike, Mapping[str, np.typing.ArrayLike]],
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws the learning rate of each subset over time, on a logarithmic axis.

    The bold lines are running medians, the thin ones the rates themselves. Where some
    rates are zero, as negative ones become when they are clipped, or negative, the axis
    is linear between its smallest powers of ten. Where there are many subsets, those of
    one of the :func:`layer_groups` share a colour.

    Args:
      history: ``(steps, {name: values})``, all of one length.
      ax: where to draw; by default on new axes.

    Returns:
      The axes.

    Raises:
      ValueError: the values of a name are not as many as the steps.
      ImportError: matplotlib is not installed.

    Example:
      >>> ax = learning_rates(([0, 10, 20], {"kernel": [0.1, 0.4, 0.2]}))
      >>> ax.get_yscale()
      'log'
    """
    steps, rates = history
    steps = np.asarray(steps)
    ax = _axes(ax, (7.0, 4.5))
    seen = np.zeros(0)
    window = max(1, len(steps) // 8)
    legend, styles = _legend_of(list(rates))
    for (name, values), label, style in zip(rates.items(), legend, styles, strict=True):
        values = np.asarray(values, np.float64)
        if values.shape != steps.shape:
            raise ValueError(
                f"history: {name!r} has {values.size} values for {steps.size} steps."
            )
        values = np.where(np.isfinite(values), values, np.nan)
        ax.plot(steps, values, linewidth=0.6, alpha=0.25, **style)
        smooth = _running_median(values, window)
        ax.plot(steps, smooth, linewidth=1.9, label=label, **style)
        seen = np.append(seen, values[~np.isnan(values)])
    _scale(ax, seen)
    if ax.get_yscale() == "symlog" and seen.min() >= 0:
        ax.set_ylim(bottom=-0.3 * ax.yaxis.get_transform().linthresh)
    ax.set_title("Learning rate of each subset")
    ax.set_xlabel("step")
    _tidy(ax)
    _legend(ax, len(rates))
    return ax


def predicted_vs_actual(
    history: tuple[np.typing.ArrayLike, np.typing.ArrayLike, np.typing.ArrayLike],
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws the decrease of the loss at each step over the one that was predicted.

    A point on the diagonal kept its promise, one below it did less, and one below the
    line at zero went uphill. Early steps are dark, late ones bright.

    Args:
      history: ``(steps, predicted, actual)``, three sequences of one length; a decrease
        is positive where the loss falls. Points that are not finite are left out.
      ax: where to draw; by default on new axes.

    Returns:
      The axes, with the axes of the colour bar in the figure.

    Raises:
      ValueError: the sequences differ in length.
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
            "decreases; they must be equally many."
        )
    ax = _axes(ax, (5.5, 4.5))
    shown = np.isfinite(x) & np.isfinite(y)
    steps, x, y = steps[shown], x[shown], y[shown]
    points = ax.scatter(x, y, c=steps, cmap="viridis", s=14, linewidths=0, alpha=0.8)
    _scale(ax, np.append(x, y), axes="xy")  # one scale: the diagonal is straight
    ends = [x.min(), x.max()] if x.size else []
    ax.plot(ends, ends, color="0.4", linewidth=1, label="as predicted")
    ax.set_title("Decrease of the loss, predicted and actual")
    ax.set_xlabel("predicted decrease")
    ax.set_ylabel("actual decrease")
    _tidy(ax)
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
    """Draws one curve for each optimizer.

    Args:
      curves: ``{name: (x, y)}``; x is a step, a time, a number of gradients, ...
      ax: where to draw; by default on new axes.
      ylabel: what y is.
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
    ax = _axes(ax, (6.0, 4.0))
    for (name, (x, y)), style in zip(curves.items(), _styles(len(curves)), strict=True):
        y = np.asarray(y, np.float64)
        y = np.where(np.isfinite(y), y, np.nan)
        ax.plot(np.asarray(x), y, linewidth=1.9, label=name, **style)
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    _tidy(ax)
    _legend(ax, len(curves))
    return ax


# --- Axes ------------------------------------------------------------------------


def _axes(
    ax: "Axes | None", size: tuple[float, float], layout: str = "constrained"
) -> "Axes":
    """The axes that were given, or new ones in a figure that pyplot does not know."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib: pip install "partnewton[plot]"'
        ) from error
    if ax is None:
        return Figure(figsize=size, layout=layout).subplots()
    return ax


def _tidy(ax: "Axes") -> None:
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: "Axes", lines: int) -> None:
    """A legend: inside, or beside many lines, in two columns at most."""
    handles, labels = ax.get_legend_handles_labels()
    if lines <= MOST_INSIDE:
        ax.legend(fontsize="small", frameon=False)
        return
    rows = 72 * ax.get_position().height * ax.figure.get_figheight() / 9  # of 9 points
    every = max(1, int(np.ceil(len(labels) / (2 * rows - 2))))
    ax.legend(
        handles[::every],
        labels[::every],
        title=f"one line in {every}" if every > 1 else None,
        fontsize="small" if lines <= MOST_LINES else "x-small",
        title_fontsize="x-small",
        ncols=1 + (len(labels) > rows),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        labelspacing=0.2,
    )


def _scale(ax: "Axes", values: np.ndarray, axes: str = "y") -> None:
    """Logarithmic axes, with room for zero and what is below it if that occurs."""
    sizes = np.abs(values[values != 0])
    if sizes.size == 0:
        return
    scale: dict[str, Any] = {"value": "log"}
    if np.any(values <= 0):
        # The few smallest, or one of 1e-20, shall not take the room of the others.
        smallest = max(np.quantile(sizes, 0.05), 1e-6 * sizes.max())
        threshold = 10.0 ** np.floor(np.log10(smallest))
        scale = {"value": "symlog", "linthresh": threshold}
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0.5)
    for axis in axes:
        {"x": ax.set_xscale, "y": ax.set_yscale}[axis](**scale)
        getattr(ax, f"{axis}axis").get_major_locator().set_params(numticks=9)


def _legend_of(names: Sequence[str]) -> tuple[list[str | None], list[dict[str, Any]]]:
    """What each line is called in the legend, if at all, and how it is drawn.

    Few lines have a colour and an entry each, many share those of their layer group.
    """
    groups = layer_groups(names)
    if len(names) <= MOST_LINES or not groups:
        return list(names), _styles(len(names))
    labels = [
        name if first else None
        for name, count in groups
        for first in [True] + [False] * (count - 1)
    ]
    shades = zip(groups, _styles(len(groups)), strict=True)
    return labels, [style for (_, count), style in shades for _ in range(count)]


def _styles(count: int) -> list[dict[str, Any]]:
    """Colours that are easily told apart, or shades from the first line to the last."""
    import matplotlib

    if count <= MOST_LINES:
        return [{"color": f"C{i}"} for i in range(count)]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))
    return [{"color": tuple(shade)} for shade in shades.tolist()]


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of the values at most `window` / 2 places away, NaN left out."""
    half = window // 2
    neighbours = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    present = [part[~np.isnan(part)] for part in neighbours]
    return np.array([np.median(part) if part.size else np.nan for part in present])


# --- The heat map ----------------------------------------------------------------


def _name_ticks(ax: "Axes", names: Sequence[str]) -> None:
    """As many names as can be read, in the largest type that fits."""
    S = len(names)
    height = ax.get_position().height * ax.figure.get_figheight()
    room = 72 * height / S  # points a row
    every = max(1, int(np.ceil(5.5 / room)))
    size = min(9.0, max(4.5, 0.75 * room * every))
    places = range(0, S, every)
    shown = [names[i] for i in places]
    ax.set_xticks(places, shown, rotation=90, fontsize=size)
    ax.set_yticks(places, shown, fontsize=size)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _mark_groups(ax: "Axes", groups: Sequence[tuple[str, int]]) -> None:
    """A line between each group and the next."""
    for end in np.cumsum([count for _, count in groups])[:-1]:
        for line_at in (ax.axhline, ax.axvline):
            line_at(end - 0.5, color="black", linewidth=0.8)


def _write_numbers(ax: "Axes", values: np.ndarray) -> None:
    for (s, t), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 else "black"
            label = ax.text(t, s, f"{value:.2f}", color=color, fontsize=7)
            label.set(ha="center", va="center")


def _remarks(values: np.ndarray) -> str:
    """What the colours cannot say."""
    remarks = []
    beyond = _beyond(values)
    if beyond.any():
        largest = np.max(np.abs(values[beyond]))
        remarks.append(
            f"{beyond.sum()} of {values.size} entries lie beyond ±1, up to "
            f"{largest:.3g}: drawn as ±1"
        )
    if np.isnan(values).any():
        remarks.append("grey: no curvature, hence no correlation")
    return "\n".join(remarks)


def _extend(values: np.ndarray) -> str:
    """At which ends the colour bar gets an arrow."""
    beyond = values[_beyond(values)]
    below, above = np.any(beyond < 0), np.any(beyond > 0)
    if below and above:
        return "both"
    return "min" if below else "max" if above else "neither"


def _beyond(values: np.ndarray) -> np.ndarray:
    return np.abs(values) > 1 + 1e-6  # not by rounding
