"""The compared optimizers: fixed ones, and tuned ones with their grids of rates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import partnewton as pn
from partnewton import averaging, rules

__all__ = [
    "GRADIENT",
    "OPTIMIZERS",
    "OURS",
    "SWEEPS",
    "TUNED",
    "UNTUNED",
    "VARIANTS",
    "Candidate",
]


class Candidate(NamedTuple):
    """An optimizer and its grid of rates.

    Attributes:
      make: a function of a rate, which may be traced, and the number of steps.
      rates: the grid; [1] if there is no rate to tune.
      full_batch_only: whether it needs the same loss at each step.
    """

    make: Callable[[jax.Array, int], Any]
    rates: np.ndarray
    full_batch_only: bool = False


def _half_decades(low: float, high: float) -> np.ndarray:
    return 10.0 ** np.arange(low, high + 0.1, 0.5)


def _cosine(rate: jax.Array, steps: int) -> optax.Schedule:
    def schedule(count: jax.Array) -> jax.Array:
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / steps, 1)))

    return schedule


def _over_grid(make: Callable[[Any], Any], rates: np.ndarray) -> dict[str, Candidate]:
    return {
        "c": Candidate(lambda rate, steps: make(rate), rates),
        "s": Candidate(lambda rate, steps: make(_cosine(rate, steps)), rates),
    }


def _fixed(make: Callable[[], Any]) -> Candidate:
    return Candidate(lambda rate, steps: make(), np.ones(1))


_GRIDS = {
    "adam": (optax.adam, _half_decades(-3.5, -1)),
    "sgdm": (lambda rate: optax.sgd(rate, 0.9), _half_decades(-3, 0.5)),
    "muon": (contrib.muon, _half_decades(-3, -0.5)),
}

TUNED: dict[str, tuple[str, str]] = {
    name: (f"{name}_c", f"{name}_s") for name in _GRIDS
}
"""Each tuned optimizer and its two entries: constant and cosine schedules."""

UNTUNED: dict[str, Candidate] = {
    "momo_adam": _fixed(contrib.momo_adam),
    "prodigy": _fixed(contrib.prodigy),
    "dog": _fixed(contrib.dog),
    "dadapt_adamw": _fixed(contrib.dadapt_adamw),
    "cocob": _fixed(contrib.cocob),
    "mechanize": _fixed(lambda: contrib.mechanize(optax.adam(1e-3), weight_decay=0.0)),
    "lbfgs": Candidate(lambda rate, steps: optax.lbfgs(), np.ones(1), True),
}
"""Optimizers without a rate to tune, with their defaults."""

OURS: dict[str, Candidate] = {
    "partition_newton": _fixed(pn.partition_newton),
    "partition_newton_adam": _fixed(
        lambda: pn.partition_newton(direction=optax.scale_by_adam())
    ),
    "partition_newton_momentum": _fixed(
        lambda: pn.partition_newton(direction=optax.ema(0.9))
    ),
    "paper_newton": _fixed(lambda: pn.paper_newton(rule=pn.rules.cubic(10.0))),
}

GRADIENT = Candidate(lambda rate, steps: optax.scale(-rate), np.array([1e-3]))
"""Gradient descent, to measure the time of a step."""

_FACTORS = np.array([0.1, 0.2, 0.3, 0.45])


def _equilibrated(power: jax.Array) -> Any:
    muon = pn.directions.orthogonal_momentum()
    return pn.partition_newton(direction=pn.directions.equilibrated(muon, power))


SWEEPS: dict[str, Candidate] = {
    "power": Candidate(
        lambda rate, steps: _equilibrated(rate), np.array([0.0, 0.25, 0.35, 0.5])
    ),
    "lookback_rate": Candidate(
        lambda rate, steps: pn.partition_newton(lookback_rate=rate),
        np.array([0.0, 0.05, 0.1, 0.2]),
    ),
    "interval": Candidate(
        lambda rate, steps: pn.partition_newton(update_interval=rate.astype(int)),
        np.array([10.0, 20.0, 30.0, 100.0]),
    ),
    "per_tensor": _fixed(lambda: pn.partition_newton(param_labels="per_tensor")),
    "per_role": _fixed(lambda: pn.partition_newton(param_labels="per_role")),
    "factor": Candidate(lambda rate, steps: pn.partition_newton(rate), _FACTORS),
    "factor_adam": Candidate(
        lambda rate, steps: pn.partition_newton(rate, direction=optax.scale_by_adam()),
        _FACTORS,
    ),
    "factor_momentum": Candidate(
        lambda rate, steps: pn.partition_newton(rate, direction=optax.ema(0.9)),
        _FACTORS,
    ),
}
"""Sweeps over one argument; run only by ``--optimizers``."""


def _variant(
    *,
    direction: optax.GradientTransformation | None = None,
    rule: Any = None,
    average: Any = None,
    normalize: str = "rms",
    lookback_rate: float = 0.2,
    backtracking: int = 30,
    lookback: dict[str, float] | None = None,
) -> Any:
    """The chain of `partition_newton`, with arguments that it does not expose."""
    if direction is None:
        direction = pn.directions.equilibrated(pn.directions.orthogonal_momentum())
    if average is None:
        average = averaging.exponential(0.9, absolute_third=True)
        average = averaging.relative(average)
    return optax.chain(
        pn.directions.skip_nonfinite(direction),
        pn.scale_by_partition_newton(
            rules.with_noise_floor(rules.robust(shrinkage=0.5))
            if rule is None
            else rule,
            normalize=normalize,
            update_interval=None,
            average=average,
            backtracking=backtracking,
        ),
        pn.scale_by_lookback(lookback_rate, **(lookback or {})),
        optax.scale_by_learning_rate(0.2),
    )


def _rule(**options: Any) -> Any:
    return rules.with_noise_floor(rules.robust(**options))


_VARIANTS: dict[str, dict[str, Any]] = {
    "shrinkage=0": {"rule": _rule()},
    "shrinkage=1": {"rule": _rule(shrinkage=1.0)},
    "max_ratio=2": {"rule": _rule(shrinkage=0.5, max_ratio=2.0)},
    "max_ratio=50": {"rule": _rule(shrinkage=0.5, max_ratio=50.0)},
    "floor=0": {"rule": _rule(shrinkage=0.5, floor=0.0)},
    "not with_noise_floor": {"rule": rules.robust(shrinkage=0.5)},
    "no average": {"average": averaging.relative(averaging.none())},
    "not relative": {"average": averaging.exponential(0.9, absolute_third=True)},
    "not equilibrated": {"direction": pn.directions.orthogonal_momentum()},
    "lengths in norm": {"normalize": "norm"},
    "backtracking=0": {"backtracking": 0},
    "lookback_rate=0": {"lookback_rate": 0.0},
    "lookback_rate=0.1": {"lookback_rate": 0.1},
    "slope_position=0.5": {"lookback": {"slope_position": 0.5}},
    "slope_position=0.8": {"lookback": {"slope_position": 0.8}},
    "window_growth=0": {"lookback": {"window_growth": 0.0}},
    "window_growth=6": {"lookback": {"window_growth": 6.0}},
    "one slope": {"lookback": {"averaging_fraction": 0.0}},
}

VARIANTS: dict[str, Candidate] = {
    name: _fixed(functools.partial(_variant, **options))
    for name, options in _VARIANTS.items()
}
VARIANTS["clipped"] = _fixed(
    lambda: optax.chain(pn.partition_newton(), pn.clip_by_parameter_rms(0.01))
)
VARIANTS["weight_decay=0.1"] = _fixed(lambda: pn.partition_newton(weight_decay=0.1))
VARIANTS["total_steps"] = Candidate(
    lambda rate, steps: pn.partition_newton(total_steps=steps), np.ones(1)
)
"""`partition_newton` with one of its defaults changed; run by ``--variants``."""

OPTIMIZERS: dict[str, Candidate] = {
    **OURS,
    **SWEEPS,
    **VARIANTS,
    **{
        f"{name}_{schedule}": optimizer
        for name, (make, rates) in _GRIDS.items()
        for schedule, optimizer in _over_grid(make, rates).items()
    },
    **UNTUNED,
}
