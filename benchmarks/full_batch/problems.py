"""All full-batch problems by name: ``make("burgers")``."""

from collections.abc import Callable

from benchmarks.full_batch import (
    elliptic,
    evolution,
    functions,
    gaussian_process,
    neural_ode,
    spin_chain,
    supervised,
)
from benchmarks.full_batch.objective import Objective

__all__ = ["PROBLEMS", "make"]

PROBLEMS: dict[str, Callable[[str, int], Objective]] = {
    **dict.fromkeys(elliptic.EQUATIONS, elliptic.objective),
    **dict.fromkeys(evolution.EQUATIONS, evolution.objective),
    "neural_ode": neural_ode.objective,
    "gaussian_process": gaussian_process.gaussian_process,
    "siren": supervised.siren,
    "regression": supervised.regression,
    "deep_linear": supervised.deep_linear,
    "digits_softmax": supervised.digits_softmax,
    "ising_rbm": spin_chain.ising,
    "heisenberg_mlp": spin_chain.heisenberg,
    **dict.fromkeys(functions.FUNCTIONS, functions.objective),
}


def make(name: str, seed: int = 0) -> Objective:
    """A problem by its name.

    Args:
      name: one of `PROBLEMS`.
      seed: the seed of random points or data, where a problem has any. Initial
        parameters depend on the key that ``init`` receives.
    """
    return PROBLEMS[name](name, seed)
