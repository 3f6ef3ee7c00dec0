"""Variational energies of periodic spin chains, summed over all configurations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.full_batch.objective import (
    Objective,
    PyTree,
    cast,
    dtype_of,
    mlp,
    mlp_init,
    normal,
)

__all__ = ["Chain", "heisenberg", "heisenberg_chain", "ising", "ising_chain"]


class Chain(NamedTuple):
    """A Hamiltonian whose ground state has positive amplitudes.

    Attributes:
      spins: the configurations, (C, sites), of -1 and 1.
      diagonal: the diagonal of the Hamiltonian, (C,).
      neighbours: the configurations that are connected to each one, (C, K).
      elements: the matrix elements to these, (C, K); zeros fill the rows.
    """

    spins: np.ndarray
    diagonal: np.ndarray
    neighbours: np.ndarray
    elements: np.ndarray

    def matrix(self) -> np.ndarray:
        """The Hamiltonian as a dense matrix, (C, C)."""
        out = np.diag(self.diagonal)
        rows = np.arange(len(self.spins))[:, None]
        np.add.at(out, (rows, self.neighbours), self.elements)
        return out


def ising_chain(sites: int = 10, field: float = 1.0) -> Chain:
    """``H = -sum_i Z_i Z_(i+1) - field sum_i X_i``, critical for a field of 1."""
    states = np.arange(2**sites)
    spins = 1 - 2 * (states[:, None] >> np.arange(sites) & 1)
    diagonal = -np.sum(spins * np.roll(spins, -1, 1), 1)
    neighbours = states[:, None] ^ (1 << np.arange(sites))
    elements = np.full(neighbours.shape, -field)
    return Chain(spins, diagonal.astype(float), neighbours, elements)


def heisenberg_chain(sites: int = 10) -> Chain:
    """``H = sum_i S_i . S_(i+1)`` without magnetisation, in Marshall's basis.

    There, the sign of each exchange term is negative, and the ground state positive.
    """
    states = np.array([s for s in range(2**sites) if s.bit_count() == sites // 2])
    spins = 1 - 2 * (states[:, None] >> np.arange(sites) & 1)
    unequal = spins != np.roll(spins, -1, 1)
    bonds = (1 << np.arange(sites)) | (1 << (np.arange(sites) + 1) % sites)
    flipped = np.where(unequal, states[:, None] ^ bonds, states[:, None])
    diagonal = np.sum(np.where(unequal, -0.25, 0.25), 1)
    neighbours = np.searchsorted(states, flipped)
    return Chain(spins, diagonal, neighbours, np.where(unequal, -0.5, 0.0))


def ising(name: str = "ising_rbm", seed: int = 0) -> Objective:
    """The Ising chain of 10 sites, with a restricted Boltzmann machine of 20 units.

    ``log psi = a . s + sum_j log cosh(b_j + W_j . s)``. The seed is not used.
    """

    def init(key: jax.Array, dtype: Any) -> PyTree:
        sites, hidden = _ising().spins.shape[1], 20
        return {
            "visible": jnp.zeros(sites, dtype),
            "hidden": jnp.zeros(hidden, dtype),
            "kernel": 0.1 * normal(key, (sites, hidden), dtype),
        }

    def log_amplitude(params: PyTree, spins: jax.Array) -> jax.Array:
        z = jnp.abs(spins @ params["kernel"] + params["hidden"])
        log_cosh = z + jnp.log1p(jnp.exp(-2 * z)) - jnp.log(2.0)
        return spins @ params["visible"] + jnp.sum(log_cosh, -1)

    return _objective(name, _ising(), init, log_amplitude)


def heisenberg(name: str = "heisenberg_mlp", seed: int = 0) -> Objective:
    """The Heisenberg chain of 10 sites, with a network of 2 hidden layers of 24 tanh.

    The seed is not used.
    """

    def init(key: jax.Array, dtype: Any) -> PyTree:
        return mlp_init(key, (_heisenberg().spins.shape[1], 24, 24, 1), dtype)

    def log_amplitude(params: PyTree, spins: jax.Array) -> jax.Array:
        return mlp(params, spins, jnp.tanh)[:, 0]

    return _objective(name, _heisenberg(), init, log_amplitude)


def _objective(name: str, chain: Chain, init: Any, log_amplitude: Any) -> Objective:
    """The energy per site; its minimum is that of exact diagonalisation."""
    sites = chain.spins.shape[1]
    energies, states = np.linalg.eigh(chain.matrix())
    ground = np.abs(states[:, 0])

    neighbours = chain.neighbours.astype(np.int32)

    def amplitudes(params: PyTree) -> jax.Array:
        logs = log_amplitude(params, cast(chain.spins, dtype_of(params)))
        psi = jnp.exp(logs - jax.lax.stop_gradient(jnp.max(logs)))
        return psi / jnp.linalg.norm(psi)

    def loss(params: PyTree) -> jax.Array:
        psi = amplitudes(params)
        diagonal, elements = cast((chain.diagonal, chain.elements), psi.dtype)
        applied = diagonal * psi + jnp.sum(elements * psi[neighbours], -1)
        return jnp.sum(psi * applied) / sites

    def error(params: PyTree) -> jax.Array:
        psi = amplitudes(params)
        return jnp.linalg.norm(psi - cast(ground, psi.dtype))

    minimum = float(energies[0]) / sites
    return Objective(name, init, loss, error=error, minimum=minimum)


_ising = functools.cache(ising_chain)
_heisenberg = functools.cache(heisenberg_chain)
