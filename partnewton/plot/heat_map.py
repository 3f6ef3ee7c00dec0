"""The partition Hessian as a heat map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from partnewton.plot._axes import axes_or_new
from partnewton.plot.groups import layer_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["correlation", "hessian"]

_BLANK = "0.88"  # the grey of entries without a correlation
_MAX_ANNOTATED = 10  # with more subsets, cells are too small for numbers
_LEAST_CELL = 0.34  # inches of the axes for a row, below which numbers would overlap
_COLOUR_LABELS = (  # of -1, -0.5, 0, 0.5 and 1
    "−1  steps\nhelp each\nother",
    "−0.5",
    "0",
    "0.5",
    "1  steps\ncompete",
)


def correlation(hessian: np.typing.ArrayLike) -> np.ndarray:
    """A partition Hessian scaled to a diagonal of ones.

        C_st = hessian_st / sqrt(|hessian_ss hessian_tt|)

    It is invariant under rescaling of subsets. Its diagonal is 1, or -1 where the
    curvature is negative. Off the diagonal its entries are between -1 and 1 if the
    Hessian is positive semidefinite, and may be larger if it is not.

    Args:
      hessian: shape (S, S).

    Returns:
      A float64 array of shape (S, S); NaN in the rows and columns of subsets whose
      diagonal entry is zero, and where `hessian` is not finite.

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
    # Two divisions, because the product of two scales can underflow.
    return H / scale[:, None] / scale


def hessian(summary: Any, names: Sequence[str], ax: "Axes | None" = None) -> "Axes":
    """Draw the :func:`correlation` of a partition Hessian as a heat map.

    A red entry is positive: the steps of the two subsets compete, since a step in one
    of them reduces the decrease that a step in the other one achieves. A blue entry is
    negative: the steps help each other. An entry beyond 1 or -1 shows that the loss has
    negative curvature along some combination of these two steps. The rows and columns
    of subsets without curvature are grey. Black lines separate the
    :func:`layer_groups`.

    Args:
      summary: a :class:`~partnewton.Summary`, or any object with a `hessian` (S, S).
      names: the S names, see :func:`partnewton.subset_names`.
      ax: the axes to draw on; by default those of a new figure, whose size depends on
        S.

    Returns:
      The axes.

    Raises:
      ValueError: the number of names is not S.
      ImportError: matplotlib is not installed.

    Example:
      >>> from types import SimpleNamespace
      >>> summary = SimpleNamespace(hessian=[[4.0, 3.0], [3.0, 9.0]])
      >>> ax = hessian(summary, ["kernel", "bias"])
      >>> ax.figure.savefig("hessian.png")  # doctest: +SKIP
    """
    S = len(np.asarray(summary.hessian))
    side = min(max(4.5, 2.5 + 0.2 * S), 16.0)
    ax = axes_or_new(ax, (side + 1.0, side), layout="compressed")
    values, image, _ = draw_hessian(summary.hessian, names, ax)
    place, figure = ax.get_position(), ax.figure
    side = min(
        place.width * figure.get_figwidth(), place.height * figure.get_figheight()
    )
    if S <= _MAX_ANNOTATED and side >= S * _LEAST_CELL:
        _annotate(ax, values)
    ax.set_title("Partition Hessian, scaled to a unit diagonal")
    ax.set_xlabel(_remarks(values), fontsize="small", color="0.35")
    add_colour_bar(image, ax, _extend(values))
    return ax


def draw_hessian(
    hessian: np.typing.ArrayLike, names: Sequence[str], ax: "Axes"
) -> tuple[np.ndarray, Any, "Axes"]:
    """The heat map alone: the values that are drawn, the image and the axes."""
    values = correlation(hessian)
    if len(names) != len(values):
        raise ValueError(f"names: {len(names)} names for {len(values)} subsets.")

    import matplotlib

    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["RdBu_r"].with_extremes(bad=_BLANK),
        vmin=-1,
        vmax=1,
        interpolation="nearest",
    )
    _set_ticks(ax, names)
    _separate_groups(ax, layer_groups(names))
    return values, image, ax


def add_colour_bar(image: Any, axes: Any, extend: str = "neither") -> None:
    """The colour bar of one heat map, or of several, with the meaning of its ends."""
    one = axes[0] if isinstance(axes, list) else axes
    bar = one.figure.colorbar(image, ax=axes, extend=extend, fraction=0.046, pad=0.03)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=_COLOUR_LABELS, fontsize="small")
    lowest, *_, highest = bar.ax.get_yticklabels()
    lowest.set_va("bottom")  # beside the bar, where no title is
    highest.set_va("top")
    bar.outline.set_visible(False)


def _set_ticks(ax: "Axes", names: Sequence[str]) -> None:
    """As many names as are readable, in the largest font that fits."""
    S = len(names)
    height = ax.get_position().height * ax.figure.get_figheight()
    row_height = 72 * height / S  # in points
    every = max(1, int(np.ceil(5.5 / row_height)))
    fontsize = min(9.0, max(4.5, 0.75 * row_height * every))
    ticks = range(0, S, every)
    labels = [names[i] for i in ticks]
    ax.set_xticks(ticks, labels, rotation=90, fontsize=fontsize)
    ax.set_yticks(ticks, labels, fontsize=fontsize)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _separate_groups(ax: "Axes", groups: Sequence[tuple[str, int]]) -> None:
    for end in np.cumsum([count for _, count in groups])[:-1]:
        for draw_line in (ax.axhline, ax.axvline):
            draw_line(end - 0.5, color="black", linewidth=0.8)


def _annotate(ax: "Axes", values: np.ndarray) -> None:
    for (s, t), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 else "black"
            label = ax.text(t, s, f"{value:z.2f}", color=color, fontsize=7)
            label.set(ha="center", va="center")


def _remarks(values: np.ndarray) -> str:
    """What the colours do not show."""
    remarks = []
    is_beyond = _is_beyond(values)
    if is_beyond.any():
        largest = np.max(np.abs(values[is_beyond]))
        remarks.append(
            f"{is_beyond.sum()} of {values.size} entries lie beyond ±1, up to "
            f"{largest:.3g}, drawn as ±1:\nthe loss has negative curvature in the "
            "plane of these two subsets"
        )
    if np.isnan(values).any():
        remarks.append("grey: no curvature, so the correlation is undefined")
    return "\n".join(remarks)


def _extend(values: np.ndarray) -> str:
    """The ends at which the colour bar has an arrow."""
    beyond = values[_is_beyond(values)]
    below, above = np.any(beyond < 0), np.any(beyond > 0)
    if below and above:
        return "both"
    return "min" if below else "max" if above else "neither"


def _is_beyond(values: np.ndarray) -> np.ndarray:
    return np.abs(values) > 1 + 1e-6  # by more than rounding
