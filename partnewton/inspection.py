"""A report on a loss: interactions, learning rates, and what a step achieves."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton import partitions, rules
from partnewton._checks import check_rule, check_value_fn
from partnewton._engine_arguments import checked_loss
from partnewton._error_hints import with_error_hints
from partnewton._measured_direction import MeasuredDirection
from partnewton.summary import Summary, summarize

__all__ = ["Report", "report"]

PyTree = Any

_WIDTH = 100  # of the table, in characters
_MAX_ROWS = 60
_LEGEND = (
    "interacts with: subset and value of the strongest interaction.\n"
    "Positive: the two steps compete. Negative: they help each other."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the derivatives of a loss along a direction say; see :func:`report`.

    Attributes:
      names: the names of the S subsets, in the order of all axes.
      entries: the number of entries of each subset, (S,).
      direction_rms: the RMS of the direction on each subset, (S,).
      summary: the derivatives along the direction, as NumPy arrays.
      learning_rates: the rates that the rule proposes, (S,).
      predicted_decrease: the decrease of the loss that the rule predicts for them.
      actual_decrease: the decrease of the loss for these rates.
      cost: the time of a summary, divided by that of a gradient; None if not measured.
    """

    names: tuple[str, ...]
    entries: np.ndarray
    direction_rms: np.ndarray
    summary: Summary
    learning_rates: np.ndarray
    predicted_decrease: float
    actual_decrease: float
    cost: float | None

    @property
    def interactions(self) -> np.ndarray:
        """hessian_st / sqrt(|hessian_ss hessian_tt|), (S, S)."""
        from partnewton import plot

        return plot.correlation(self.summary.hessian)

    def plot(self) -> Any:
        """Draw the interactions, and the step of each subset.

        Returns:
          A matplotlib figure, which a notebook displays.
        """
        from partnewton import plot

        return plot.report(self)

    def __str__(self) -> str:
        ratio = _ratio(self.actual_decrease, self.predicted_decrease)
        lines = [
            f"loss {float(self.summary.value):.6g}, predicted decrease "
            f"{self.predicted_decrease:.4g}, actual decrease "
            f"{self.actual_decrease:.4g}{ratio}"
        ]
        if self.cost is not None:
            lines.append(f"one summary takes the time of {self.cost:.2g} gradients")
        lines += ["", *_table(self), "", _LEGEND]
        return "\n".join(lines)


def report(
    value_fn: Callable[[Any], Any],
    params: PyTree,
    direction: PyTree | None = None,
    *,
    param_labels: partitions.ParamLabels = partitions.per_tensor,
    rule: Callable[[Summary], rules.Proposal] | None = None,
    measure_cost: bool = True,
    has_aux: bool = False,
) -> Report:
    """Look at a loss: its interactions, learning rates, and what a step achieves.

    It computes the summary of the loss along the direction, the learning rates eta that
    a rule proposes for it, and the loss at ``params - sum_s eta_s * u_s``. This is for
    interactive use, for example in a notebook: it compiles the loss, and cannot be
    called inside of :func:`jax.jit`.

    Args:
      value_fn: the loss, a function from `params` to a scalar. Its data are constants:
        ``lambda params: loss(params, x, y)``.
      params: the parameters.
      direction: a pytree like `params`, with the sign of a gradient; by default the
        gradient.
      param_labels: the partition.
      rule: computes the learning rates; by default ``rules.robust()``.
      measure_cost: whether to measure the time of a summary, in gradients: medians of
        five calls.
      has_aux: whether `value_fn` returns ``(loss, aux)``; aux is ignored.

    Returns:
      A :class:`Report`. ``print(report)`` shows a table of at most 100 columns, and
      ``report.plot()`` a figure.

    Raises:
      ValueError, TypeError: an argument is invalid, as for
        :func:`~partnewton.summarize`.

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["a"]) * p["b"] + p["b"] ** 2
      >>> found = report(loss, params, rule=rules.newton(), measure_cost=False)
      >>> print(found)
      loss 23, predicted decrease 22.88, actual decrease 22.88 (100 %)
      <BLANKLINE>
      s  subset  entries  gradient  curvature   rate  RMS step  interacts with
      0  a             2        74        148  0.263       1.6        1:  0.70
      1  b             1        81        162  0.325      2.92        0:  0.70
      <BLANKLINE>
      interacts with: subset and value of the strongest interaction.
      Positive: the two steps compete. Negative: they help each other.
    """
    rule = rules.robust() if rule is None else rule
    check_rule(rule)
    partition = partitions.partition_of(params, param_labels)
    check_value_fn(value_fn)
    value_fn = with_error_hints(value_fn, params)

    def loss(params: PyTree) -> jax.Array:
        return checked_loss(value_fn(params), has_aux)[0]

    gradient = jax.jit(jax.grad(loss, allow_int=True))
    if direction is None:
        direction = gradient(params)

    @jax.jit
    def summary_of(params: PyTree, direction: PyTree) -> Summary:
        return summarize(
            loss,
            params,
            direction,
            param_labels=partition,
            third_order=rules.needs_third_order(rule),
        )

    @jax.jit
    def loss_after(params: PyTree, direction: PyTree, rates: jax.Array) -> jax.Array:
        measured = MeasuredDirection(direction, params, param_labels, None)
        return loss(measured.parameters_after(-rates))

    summary = summary_of(params, direction)
    proposal = jax.jit(functools.partial(rules.proposal_of, rule))(summary)
    after = loss_after(params, direction, proposal.learning_rates)
    cost = None
    if measure_cost:
        cost = _seconds(summary_of, params, direction) / _seconds(gradient, params)
    entries = partition.counts(jax.tree.leaves(params))
    leaves = partition.take_active(jax.tree.leaves(direction))
    squares = partition.of_active().inner(*2 * [[jnp.asarray(x) for x in leaves]])
    return Report(
        names=partition.names,
        entries=entries,
        direction_rms=np.sqrt(np.asarray(squares, np.float64) / entries),
        summary=jax.tree.map(np.asarray, summary),
        learning_rates=np.asarray(proposal.learning_rates),
        predicted_decrease=float(proposal.predicted_decrease),
        actual_decrease=float(summary.value) - float(after),
        cost=cost,
    )


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """The median time of five calls, after one that compiles."""
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _table(report: Report) -> list[str]:
    """One line per subset, of at most 100 characters."""
    numbers = {
        "entries": report.entries,
        "gradient": report.summary.gradient,
        "curvature": np.diagonal(report.summary.hessian),
        "third": report.summary.third,
        "rate": report.learning_rates,
        "RMS step": np.abs(report.learning_rates) * report.direction_rms,
    }
    columns = [
        [title, *(f"{x:.3g}" if title != "entries" else str(x) for x in values)]
        for title, values in numbers.items()
        if values is not None
    ]
    columns.append(["interacts with", *_strongest(report.interactions)])
    columns = [[x.rjust(max(map(len, column))) for x in column] for column in columns]
    numbering = ["s", *map(str, range(len(report.names)))]
    digits = len(numbering[-1])
    left = _WIDTH - digits - 2 - sum(len(column[0]) + 2 for column in columns)
    names = ["subset", *_shortened(report.names, left)]
    rows = zip(
        [x.rjust(digits) for x in numbering],
        [x.ljust(max(map(len, names))) for x in names],
        *columns,
        strict=True,
    )
    lines = ["  ".join(row) for row in rows]
    if len(lines) > _MAX_ROWS + 1:
        lines[_MAX_ROWS + 1 :] = [f"... and {len(lines) - _MAX_ROWS - 1} more"]
    return lines


def _strongest(interactions: np.ndarray) -> list[str]:
    """For each subset the largest interaction: the other subset, and the value."""
    sizes = np.nan_to_num(np.abs(interactions))
    np.fill_diagonal(sizes, 0)
    return [
        f"{t}: {interactions[s, t]:5.2f}" if sizes[s, t] > 0 else "none"
        for s, t in enumerate(np.argmax(sizes, axis=1))
    ]


def _shortened(names: Sequence[str], width: int) -> list[str]:
    """The names, with the middle of those that are too long left out."""
    tail = (width - 1) // 2
    return [
        name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"
        for name in names
    ]


def _ratio(actual: float, predicted: float) -> str:
    return f" ({100 * actual / predicted:.3g} %)" if predicted > 0 else ""
