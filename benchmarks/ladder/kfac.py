"""K-FAC of kfac-jax, which is not an optax transformation."""

import importlib.util

__all__ = ["RUNGS", "is_installed"]

RUNGS = ("mlp_digits", "mlp_fashion", "lenet_fashion", "deep_fashion")


def is_installed() -> bool:
    """Whether kfac-jax can be imported."""
    return importlib.util.find_spec("kfac_jax") is not None
