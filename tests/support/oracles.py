"""Where the right answers come from: the function phi of S numbers, and nothing else.

    phi(eta) = L(params - sum_s eta_s * u_s)

is built here from an array of labels a leaf, without any help from the library. Its
derivatives at 0 are the summary, up to the sign (-1)^d. They are taken in two ways
that share nothing: by automatic differentiation in forward mode alone, and by central
differences of its values.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from support import compiling
from support.models import Problem

PyTree = Any
FROZEN = -1

# Tiny programs, used once: not worth an optimising compiler.
quick_jit = functools.partial(jax.jit, compiler_options=compiling.OPTIONS)


class Tensors(NamedTuple):
    """Value () and derivative tensors (S,), (S, S), (S, S, S) along the direction."""

    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    third: np.ndarray

    def merged(self, incidence: np.ndarray) -> "Tensors":
        """The tensors of a coarser partition: merging subsets adds entries.

        Args:
          incidence: (S, coarser S), 1 where a subset joins a coarser one. A subset
            that joins none is frozen.
        """
        return Tensors(
            self.value,
            np.einsum("s,sa->a", self.gradient, incidence),
            np.einsum("st,sa,tb->ab", self.hessian, incidence, incidence),
            np.einsum("rst,ra,sb,tc->abc", self.third, *[incidence] * 3),
        )


# --- Labels --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Split:
    """A partition written out: a number from 0 to S - 1, or FROZEN, for each entry.

    Attributes:
      labels: for each leaf an integer array of its shape.
    """

    labels: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """S."""
        return 1 + max(int(label.max()) for label in self.labels if label.size)

    def tree(self, params: PyTree) -> PyTree:
        """The labels as a pytree like `params`, to be given to the library."""
        return jax.tree.unflatten(jax.tree.structure(params), list(self.labels))

    def incidence(self, coarser: "Split") -> np.ndarray:
        """Which subset joins which of a coarser partition, (S, coarser S)."""
        result = np.zeros((self.size, coarser.size))
        for mine, theirs in zip(self.labels, coarser.labels, strict=True):
            moves = theirs != FROZEN
            result[mine[moves], theirs[moves]] = 1
        assert np.all(result.sum(axis=1) <= 1), "not coarser"
        return result


def split_of(params: PyTree, label_of: Callable[[int, np.ndarray], Any]) -> Split:
    """A split from a function of a leaf's place and of the places of its entries.

    The place of an entry is the sum of its indices, so that its remainder modulo 2 is
    a chequerboard, which reaches every row and every column of a matrix.

    Args:
      params: the parameters.
      label_of: from the number of a leaf, and the places of its entries, to an integer
        or an array of integers, FROZEN included. Labels are renumbered in the order in
        which they first appear, ascending within a leaf.
    """
    labels = []
    for i, leaf in enumerate(jax.tree.leaves(params)):
        shape = np.shape(leaf)
        place = np.indices(shape).sum(axis=0, dtype=int)
        labels.append(np.broadcast_to(label_of(i, place), shape))
    order = [x for label in labels for x in np.unique(label).tolist() if x != FROZEN]
    number = {x: n for n, x in enumerate(dict.fromkeys(order))} | {FROZEN: FROZEN}
    renumbered = [np.vectorize(number.get, otypes=[int])(label) for label in labels]
    return Split(tuple(renumbered))


def split_from_labels(params: PyTree, labels: PyTree) -> Split:
    """A split from a pytree with the structure of `params` of labels of any kind."""
    number: dict[Any, int] = {FROZEN: FROZEN}

    def numbered(label: Any, leaf: Any) -> np.ndarray:
        if isinstance(label, str | int):
            n = number.setdefault(label, len(number) - 1)
            return np.full(np.shape(leaf), n)
        for x in np.unique(label).tolist():
            number.setdefault(x, len(number) - 1)
        table = np.vectorize(number.get, otypes=[int])
        return np.broadcast_to(table(label), np.shape(leaf))

    pairs = zip(jax.tree.leaves(labels), jax.tree.leaves(params), strict=True)
    return Split(tuple(numbered(label, leaf) for label, leaf in pairs))


# --- phi -----------------------------------------------------------------------------


def phi(problem: Problem, split: Split) -> Callable[[jax.Array], jax.Array]:
    """The function of S numbers whose derivatives a summary consists of."""
    leaves, treedef = jax.tree.flatten(problem.params)
    directions = jax.tree.leaves(problem.direction)

    def function(eta: jax.Array) -> jax.Array:
        padded = jnp.append(eta, 0.0)  # FROZEN = -1 finds this zero
        moved = [
            leaf - padded[label].astype(leaf.dtype) * u
            for leaf, label, u in zip(leaves, split.labels, directions, strict=True)
        ]
        return problem.plain(jax.tree.unflatten(treedef, moved))

    return function


def by_forward_mode(problem: Problem, split: Split) -> Tensors:
    """The tensors of phi by jacfwd, three times: no reverse mode anywhere."""
    function = phi(problem, split)

    def derivatives(eta: jax.Array) -> tuple:
        gradient = jax.jacfwd(function)
        hessian = jax.jacfwd(gradient)
        return function(eta), gradient(eta), hessian(eta), jax.jacfwd(hessian)(eta)

    value, gradient, hessian, third = jax.device_get(
        quick_jit(derivatives)(jnp.zeros(split.size))
    )
    return Tensors(value, -gradient, hessian, -third)


class CentralDifferences:
    """The derivatives of phi by central differences, extrapolated to step zero.

    All orders are differences of values of phi alone. The steps h, h/2 and h/4 in the
    combination (D(h) - 20 D(h/2) + 64 D(h/4)) / 45 leave an error of O(h^6) from
    truncation and O(epsilon / h^d) from rounding; the steps below balance the two for
    a direction along which the loss varies on the scale of 1.
    """

    steps = (0.0, 2e-3, 2e-3, 4e-3)  # by order
    chunk = 64

    def __init__(self, problem: Problem, split: Split):
        self.size = split.size
        self._values = quick_jit(jax.vmap(phi(problem, split)))

    def phi(self, etas: Sequence[np.ndarray]) -> np.ndarray:
        """phi at each of some points, in chunks of one size."""
        points = np.asarray(etas)
        padding = -len(points) % self.chunk
        points = np.concatenate([points, np.zeros((padding, self.size))])
        values = [self._values(x) for x in np.split(points, len(points) // self.chunk)]
        return np.concatenate(values)[: len(etas)]

    def along(self, axes: np.ndarray) -> np.ndarray:
        """D^d L[v_1, ..., v_d] for each row of directions (N, d, S) in eta.

        The d-fold central difference sum_sigma prod(sigma) phi(h sum_k sigma_k v_k)
        over all signs, divided by (2h)^d.
        """
        order = axes.shape[1]
        signs = np.array(list(itertools.product([1, -1], repeat=order)))
        h = self.steps[order]

        def difference(h: float) -> np.ndarray:
            points = h * np.einsum("pk,nks->nps", signs, axes)
            values = self.phi(points.reshape(-1, self.size)).reshape(len(axes), -1)
            return values @ np.prod(signs, axis=1) / (2 * h) ** order

        # phi moves against the direction: hence the sign.
        d, d_half, d_quarter = (difference(h / n) for n in (1, 2, 4))
        return (-1) ** order * (d - 20 * d_half + 64 * d_quarter) / 45

    def tensors(self, incidence: np.ndarray) -> Tensors:
        """Value, gradient and hessian, and the diagonal of the third order alone.

        Args:
          incidence: (S, coarser S): the partition that is asked for.
        """
        axes = incidence.T
        pairs = list(itertools.combinations_with_replacement(range(len(axes)), 2))
        hessian = np.zeros((len(axes), len(axes)))
        for (s, t), x in zip(pairs, self.along(axes[np.array(pairs)]), strict=True):
            hessian[s, t] = hessian[t, s] = x
        return Tensors(
            self.phi([np.zeros(self.size)])[0],
            self.along(axes[:, None]),
            hessian,
            self.along(np.repeat(axes[:, None], 3, axis=1)),
        )


def types_of(tree: PyTree) -> list[tuple]:
    """Shape, dtype and weak type of each leaf: what must not change between steps."""
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def diagonal(third: np.ndarray) -> np.ndarray:
    """The entries (s, s, s) of a tensor of order 3."""
    return np.einsum("sss->s", third)


def assert_close(
    actual: Any, expected: Any, rtol: float, what: str, floor: float = 0.0
) -> None:
    """Equal, relative to the largest entry that is expected.

    Args:
      floor: a magnitude below which the expected entries are noise.
    """
    expected = np.asarray(expected)
    scale = max(floor, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        expected,
        rtol=0,
        atol=rtol * scale,
        err_msg=what,
        equal_nan=False,
    )
