"""Figures of several axes: a report, and a training run at a glance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from partnewton.plot._axes import add_grid, new_figure
from partnewton.plot.curves import learning_rates, losses, predicted_vs_actual
from partnewton.plot.heat_map import add_colour_bar, draw_hessian, hessian

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["dashboard", "interactions_over_time", "report"]


def report(found: Any) -> "Figure":
    """Draw a report: the interactions, and the step of each subset.

    Args:
      found: from :func:`partnewton.report`.

    Returns:
      A figure.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, partnewton as pn
      >>> loss = lambda params: jnp.sum(params["a"] ** 2) * params["b"] ** 2
      >>> params = {"a": jnp.ones(3), "b": jnp.array(2.0)}
      >>> figure = report(pn.report(loss, params, measure_cost=False))
      >>> len(figure.axes)  # with the colour bar
      3
    """
    size = len(found.names)
    height = min(max(4.0, 2.0 + 0.22 * size), 16.0)
    figure = new_figure((2.1 * height + 1.5, height))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    hessian(found.summary, found.names, left)
    steps = np.abs(found.learning_rates) * found.direction_rms
    rows, is_back = np.arange(size), found.learning_rates < 0
    positive = steps[steps > 0]
    edge = positive.min() / 3 if positive.size else 1.0  # where zeros are drawn
    right.hlines(rows, edge, np.maximum(steps, edge), color="0.85", zorder=1)
    for chosen, style, label in (
        (steps > 0, {"color": "C0"}, None),
        (is_back, {"color": "C3"}, "negative rate"),
        (steps == 0, {"color": "C0", "markerfacecolor": "white"}, "rate zero"),
    ):
        if np.any(chosen):
            shown = np.maximum(steps[chosen], edge)
            right.plot(shown, rows[chosen], "o", label=label, clip_on=False, **style)
    right.set_xscale("log")
    right.set_xlim(edge, 1.5 * steps.max(initial=edge))
    right.set_yticks(rows, found.names, fontsize=min(9.0, max(4.5, 200 / size)))
    right.set_ylim(size - 0.5, -0.5)
    right.set_title(
        f"Decrease: predicted {found.predicted_decrease:.3g}, "
        f"actual {found.actual_decrease:.3g}",
        fontsize="medium",
    )
    right.set_xlabel("RMS change of the entries")
    add_grid(right)
    if np.any(is_back | (steps == 0)):
        right.legend(frameon=False, fontsize="small")
    return figure


def interactions_over_time(
    states: Sequence[Any], *, count: int = 6, columns: int = 3
) -> "Figure":
    """Draw the interactions at several steps of a training run, side by side.

    Args:
      states: states of an optimizer, in the order of training, such as one per refresh;
        or :class:`~partnewton.ScaleByPartitionNewtonState`, see
        :func:`partnewton.newton_state`.
      count: the maximal number of panels. If there are more states, evenly spaced ones
        are drawn, with the first and the last.
      columns: the number of panels in a row.

    Returns:
      A figure with one heat map per state and a common colour bar; see :func:`hessian`
      for its meaning.

    Raises:
      ValueError: there is no state.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, partnewton as pn
      >>> tx = pn.scale_by_partition_newton()
      >>> params = {"a": jnp.ones(3), "b": jnp.array(2.0)}
      >>> loss = lambda params: jnp.sum(params["a"] ** 2) * params["b"] ** 2
      >>> grads, state = jax.grad(loss)(params), tx.init(params)
      >>> _, state = tx.update(grads, state, params, value_fn=loss)
      >>> figure = interactions_over_time([state])
      >>> figure.axes[0].get_title()
      'step 0'
    """
    found = _newton_states(states)
    places = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    columns = min(columns, len(places))
    rows = -(-len(places) // columns)
    figure = new_figure((2.8 * columns + 1.6, 2.7 * rows + 0.4), "compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    names = _names(found[0])
    for i, (ax, place) in enumerate(zip(panels, places, strict=False)):
        _, image, _ = draw_hessian(found[place].hessian, names, ax)
        ax.set_title(f"step {_step(found[place])}", fontsize="medium")
        ax.set_xticks([])
        if i % columns:
            ax.set_yticks([])
    for ax in panels[len(places) :]:
        ax.set_visible(False)
    add_colour_bar(image, list(panels[: len(places)]))
    return figure


def dashboard(
    states: Sequence[Any], *, actual_decrease: np.typing.ArrayLike | None = None
) -> "Figure":
    """Draw a training run: loss, learning rates, interactions, predicted decreases.

    Args:
      states: states of an optimizer after its updates, in order, such as one per
        refresh. What is drawn is small: store ``pn.newton_state(state)``, for example
        with :func:`jax.device_get`.
      actual_decrease: for each state, the decrease of the loss for the rates of this
        state, applied in full; by default the predicted decrease alone is drawn.

    Returns:
      A figure with four axes. The loss is that at the last refresh before each state,
      and the interactions are those of the last state.

    Raises:
      ValueError: there is no state, or the number of decreases differs from theirs.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, partnewton as pn
      >>> tx = pn.partition_newton()
      >>> params = {"a": jnp.ones(3), "b": jnp.array(2.0)}
      >>> loss = lambda params: jnp.sum(params["a"] ** 2) * params["b"] ** 2
      >>> grads, state = jax.grad(loss)(params), tx.init(params)
      >>> _, state = tx.update(grads, state, params, value_fn=loss)
      >>> figure = dashboard([state])
      >>> figure.axes[1].get_title()
      'Learning rate of each subset'
    """
    found = _newton_states(states)
    steps = [_step(state) for state in found]
    names = _names(found[0])
    predicted = [float(state.predicted_decrease) for state in found]
    figure = new_figure((12.5, 8.5))
    (by_step, rates), (matrix, decreases) = figure.subplots(2, 2)
    values = np.array([float(state.loss) for state in found])
    losses({"loss": (steps, values)}, by_step, log=bool(np.all(values > 0)))
    by_step.set(title="Loss at the refreshes", ylabel="loss of the batch")
    history = np.array([np.asarray(state.learning_rates) for state in found])
    learning_rates((steps, dict(zip(names, history.T, strict=True))), rates)
    hessian(found[-1].summary, names, matrix)
    matrix.set_title(f"Interactions at step {steps[-1]}")
    if actual_decrease is not None:
        predicted_vs_actual((steps, predicted, actual_decrease), decreases)
    else:
        curve = {"predicted decrease": (steps, predicted)}
        positive = bool(np.all(np.array(predicted) > 0))
        losses(curve, decreases, ylabel="predicted decrease", log=positive)
        decreases.set_title("Predicted decrease of a full step")
    return figure


def _newton_states(states: Sequence[Any]) -> list[Any]:
    from partnewton.metrics import newton_state

    found = [newton_state(state) for state in states]
    if not found:
        raise ValueError("states is empty.")
    return found


def _names(state: Any) -> list[str]:
    numbered = (key.split(" ", maxsplit=1) for key in state.subsets)
    return [name for _, name in sorted((int(s), name) for s, name in numbered)]


def _step(state: Any) -> int:
    """The number of updates before that of the state."""
    return int(state.count) - 1
