"""The equation, its points and the network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from partnewton.demo.experiment import Config, labels_of, make_writable

__all__ = ["Problem", "prepare", "true"]

HIDDEN = (24, 24)
POINTS = 200

PyTree = Any


class Problem(NamedTuple):
    """The problem that all optimizers solve, in float64: under `jax.enable_x64(True)`.

    Attributes:
      config: the options.
      params: the initial weights.
      solution: ``solution(params, x)``, the network at points x (n,), (n,).
      value_fn: the loss, ``value_fn(params)``.
      param_labels: the partition.
    """

    config: Config
    params: PyTree
    solution: Callable[[PyTree, jax.Array], jax.Array]
    value_fn: Callable[[PyTree], jax.Array]
    param_labels: Callable[[PyTree], PyTree]


def true(x: Any) -> Any:
    """The solution."""
    return jnp.sin(2 * jnp.pi * x) + 0.1 * jnp.sin(10 * jnp.pi * x)


def prepare(config: Config) -> Problem:
    """The network, its initial weights and the loss; creates the output folder.

    Args:
      config: the options.

    Returns:
      A :class:`Problem`.

    Raises:
      ValueError, OSError: if the configuration is invalid; the message is one line.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> problem = prepare(Config("cnn", 5, 0, "whole", None, folder, "pinn"))
      >>> with jax.enable_x64(True):
      ...     ends = problem.solution(problem.params, jnp.array([0.0, 1.0]))
      >>> [abs(y) for y in ends.tolist()]
      [0.0, 0.0]
    """
    if config.data_dir is not None:
        raise ValueError("--data-dir: the problem is an equation and needs no data.")
    with jax.enable_x64(True):
        params = _initial(config.seed)
        x = jnp.linspace(0.0, 1.0, POINTS)
        right_side = _second_derivative(true, x)
        scale = jnp.mean(right_side**2)
    param_labels = labels_of(config.partition, params)
    make_writable(config.output)

    def value_fn(params: PyTree) -> jax.Array:
        curvature = _second_derivative(lambda x: _solution(params, x), x)
        return jnp.mean((curvature - right_side) ** 2) / scale

    return Problem(config, params, _solution, value_fn, param_labels)


def _initial(seed: int) -> PyTree:
    """Kernels with Glorot's normal initialisation, and biases of zero, in float64."""
    sizes = (1, *HIDDEN, 1)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    initializer = jax.nn.initializers.glorot_normal()
    return {
        f"layer{i}": {"kernel": initializer(key, (n, m)), "bias": jnp.zeros(m)}
        for i, (key, n, m) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def _solution(params: PyTree, x: jax.Array) -> jax.Array:
    """The network, which is zero at both ends of [0, 1]."""
    h = 4 * x[:, None] - 2
    *hidden, last = params.values()
    for layer in hidden:
        h = jnp.tanh(h @ layer["kernel"] + layer["bias"])
    return x * (1 - x) * (h @ last["kernel"] + last["bias"])[:, 0]


def _second_derivative(
    function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """The second derivative of a function that acts on each point."""

    def slope(x: jax.Array) -> jax.Array:
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return jax.jvp(slope, (x,), (jnp.ones_like(x),))[1]
