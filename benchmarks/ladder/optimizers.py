"""The compared optimizers: rivals with grids and schedules, and ours.

To try a variant, add a line to `VARIANTS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import partnewton as pn
from partnewton import averaging, rules

__all__ = ["DEFAULT", "ENTRIES", "FAMILIES", "OURS", "VARIANTS", "Entry"]

PyTree = Any
WARM_UP = 0.05  # of the steps


def _same(state: PyTree, params: PyTree) -> PyTree:
    del state
    return params


class Entry(NamedTuple):
    """An optimizer with a schedule, and the rates that are tried.

    Attributes:
      make: ``make(rate, steps)``, both traced, returns an optimizer; the number of
        steps is the horizon of its schedule.
      rates: the grid; (1,) if there is no rate to tune.
      evaluated: ``evaluated(state, params)``, the parameters whose loss counts.
      moves_evaluated: whether these are not the ones that are trained; the running
        statistics of batch norm are then estimated anew.
    """

    make: Callable[[jax.Array, jax.Array], Any]
    rates: tuple[float, ...] = (1.0,)
    evaluated: Callable[[PyTree, PyTree], PyTree] = _same
    moves_evaluated: bool = False


# --- Schedules -----------------------------------------------------------------------


def cosine(rate: jax.Array, steps: jax.Array) -> optax.Schedule:
    """A linear warm-up, then half a cosine to zero."""
    return lambda count: rate * _warm(count, steps) * _half_cosine(count, steps)


def linear(rate: jax.Array, steps: jax.Array) -> optax.Schedule:
    """A linear warm-up, then linearly to zero."""
    return lambda count: rate * _warm(count, steps) * (1 - _progress(count, steps))


def _warm(count: jax.Array, steps: jax.Array) -> jax.Array:
    return jnp.minimum((count + 1) / (WARM_UP * steps + 1), 1)


def _progress(count: jax.Array, steps: jax.Array) -> jax.Array:
    """From 0 after the warm-up to 1 after the last step."""
    return jnp.clip((count / steps - WARM_UP) / (1 - WARM_UP), 0, 1)


def _half_cosine(count: jax.Array, steps: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * _progress(count, steps)))


# --- Rivals ----------------------------------------------------------------------


def _half_decades(low: float, high: float) -> tuple[float, ...]:
    return tuple(float(f"{x:.3g}") for x in 10 ** np.arange(low, high + 0.1, 0.5))


_TUNED: dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]] = {
    "adamw": (
        lambda rate: optax.adamw(rate, weight_decay=0.01),
        _half_decades(-3.5, -1.5),
    ),
    "muon": (contrib.muon, _half_decades(-3, -1)),
    "sgdm": (lambda rate: optax.sgd(rate, 0.9), _half_decades(-2.5, -0.5)),
}
_SCHEDULES = {"cosine": cosine, "linear": linear}


def _scheduled(make: Callable, schedule: Callable, rates: tuple[float, ...]) -> Entry:
    return Entry(lambda rate, steps: make(schedule(rate, steps)), rates)


def _fixed(make: Callable[[], Any]) -> Entry:
    return Entry(lambda rate, steps: make())


_RIVALS: dict[str, Entry] = {
    **{
        f"{name}_{schedule}": _scheduled(make, schedule_fn, rates)
        for name, (make, rates) in _TUNED.items()
        for schedule, schedule_fn in _SCHEDULES.items()
    },
    "schedule_free": Entry(
        lambda rate, steps: contrib.schedule_free_adamw(),
        evaluated=contrib.schedule_free_eval_params,
        moves_evaluated=True,
    ),
    "prodigy": _fixed(contrib.prodigy),
    "momo_adam": _fixed(contrib.momo_adam),
}

# --- Ours ------------------------------------------------------------------------

OURS: dict[str, Entry] = {
    "partition_newton": _fixed(pn.partition_newton),
    "total_steps": Entry(lambda rate, steps: pn.partition_newton(total_steps=steps)),
}
"""What a user writes; the second one knows the number of steps."""


def _without(**arguments: Any) -> Entry:
    """`total_steps` with other arguments."""
    return Entry(
        lambda rate, steps: pn.partition_newton(total_steps=steps, **arguments)
    )


def _rule(
    seen: Callable[[pn.Summary], pn.Summary] = lambda summary: summary,
    *,
    third_order: bool = True,
    shrinkage: float = 0.5,
) -> rules.Rule:
    """The rule of `partition_newton` for a part of what a summary contains."""
    rule = rules.with_noise_floor(rules.robust(shrinkage=shrinkage))
    return rules.Rule(lambda summary: rule(seen(summary)), third_order=third_order)


def _second_order(summary: pn.Summary) -> pn.Summary:
    return summary._replace(third=jnp.zeros_like(summary.gradient))


def _diagonal(summary: pn.Summary) -> pn.Summary:
    return summary._replace(hessian=jnp.diag(jnp.diag(summary.hessian)))


ABLATIONS: dict[str, Entry] = {
    "no_third_order": _without(rule=_rule(_second_order, third_order=False)),
    "no_interactions": _without(rule=_rule(_diagonal)),
    "no_common_rate": _without(rule=_rule(shrinkage=0.0)),
    "one_rate": _without(param_labels="whole"),
    "no_average": _without(average=averaging.relative(averaging.none())),
    "no_lookback": _without(lookback_rate=0.0),
    "not_equilibrated": _without(direction=pn.directions.orthogonal_momentum()),
    "adam_direction": _without(direction=optax.scale_by_adam()),
}
"""`total_steps`, each without one of its parts."""

VARIANTS: dict[str, Entry] = {
    "lookback_rate=0.1": _fixed(lambda: pn.partition_newton(lookback_rate=0.1)),
    "weight_decay=0.1": Entry(
        lambda rate, steps: pn.partition_newton(total_steps=steps, weight_decay=0.1)
    ),
    **ABLATIONS,
    "factors": Entry(
        lambda rate, steps: pn.partition_newton(rate, total_steps=steps),
        (0.1, 0.2, 0.4),
    ),
}
"""Experiments with ours, which run only if they are named."""

ENTRIES: dict[str, Entry] = OURS | _RIVALS | VARIANTS
DEFAULT = tuple(x for x in ENTRIES if x not in VARIANTS)
FAMILIES: dict[str, tuple[str, ...]] = {
    **{x: (x,) for x in (*OURS, *VARIANTS)},
    **{name: tuple(f"{name}_{s}" for s in _SCHEDULES) for name in _TUNED},
    **{x: (x,) for x in ("schedule_free", "prodigy", "momo_adam")},
}
"""Rows of the tables, and their entries, of which the best one is shown."""
