"""The size of optimizers' states: ``python -m benchmarks.state``.

Nothing is compiled: sizes follow from the shapes of ``tx.init(params)``.
"""

from collections.abc import Sequence

import jax

from benchmarks.cost_cases import NETWORKS, optimizer
from benchmarks.reporting import markdown, number

__all__ = ["bytes_per_parameter", "main"]

OPTIMIZERS = ("sgd", "adamw", "muon", "lbfgs", "partition_newton")
PARTS = ("direction", "rates", "lookback")


def bytes_per_parameter(network: str, names: Sequence[str]) -> list[float]:
    """Bytes of the state of each optimizer per parameter of the network."""
    params = NETWORKS[network]().params
    count = sum(x.size for x in jax.tree.leaves(params))
    states = [jax.eval_shape(optimizer(name).make().init, params) for name in names]
    return [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / count
        for state in states
    ]


def main() -> None:
    """Prints the table."""
    names = OPTIMIZERS + PARTS
    rows = [
        [network, *(number(x, 1, 2) for x in bytes_per_parameter(network, names))]
        for network in NETWORKS
    ]
    print("\n".join(markdown(["network", *names], rows)))


if __name__ == "__main__":
    main()
