"""The contributions of operations to the derivatives of the loss.

A rule returns its terms, and has no side effects. Those of several operations are added
by `+`, which collects them; :meth:`Terms.total` computes the sums, an S x S matrix and
S numbers, at once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines import compat
from partnewton.engines.adjoint.inner import gram
from partnewton.engines.adjoint.spans import Span
from partnewton.engines.adjoint.tangent import Tangent

__all__ = ["Terms", "over_all_devices", "placed"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Block:
    """Terms `factor` * `values`, with an axis for the subsets of each of `spans`."""

    values: jax.Array
    spans: tuple[Span, ...] = dataclasses.field(metadata={"static": True})
    factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    def places(self, within: Span) -> np.ndarray:
        """The flat indices of the values in an array over the subsets of a span."""
        index = [np.arange(x.start, x.stop) - within.start for x in self.spans]
        shape = (within.count,) * len(self.spans)
        return np.ravel_multi_index(np.ix_(*index), shape).astype(np.int32).ravel()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Terms of the Hessian and of the diagonal of the third order.

    Attributes:
      hessian: blocks with two axes; only the symmetric part of their sum is used.
      third: blocks with one axis.
    """

    hessian: tuple[_Block, ...] = ()
    third: tuple[_Block, ...] = ()

    @classmethod
    def of_hessian(
        cls,
        left: Tangent,
        right: Tangent,
        *,
        weight: jax.Array | None = None,
        factor: float = 1.0,
    ) -> "Terms":
        """Terms sum_i weight_i left_si right_ti of the Hessian, symmetrised.

        Args:
          left, right: tangents of values of the same shape.
          weight: an array of this shape; by default ones.
          factor: a number by which all are multiplied.
        """
        values = over_all_devices(gram(left.values, right.values, weight))
        return cls(hessian=(_Block(values, (left.span, right.span), factor),))

    @classmethod
    def of_third(cls, span: Span, values: jax.Array, *, factor: float = 1.0) -> "Terms":
        """Terms of the third order.

        Args:
          span: the subsets.
          values: a number for each of them, (span.count,).
          factor: a number by which all are multiplied.
        """
        return cls(third=(_Block(over_all_devices(values), (span,), factor),))

    @classmethod
    def of_totals(cls, span: Span, hessian: jax.Array, third: jax.Array) -> "Terms":
        """Sums over the subsets of a span, from :meth:`total`."""
        return cls((_Block(hessian, (span, span)),), (_Block(third, (span,)),))

    def __add__(self, other: "Terms") -> "Terms":
        return Terms(self.hessian + other.hessian, self.third + other.third)

    def total(self, span: Span, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
        """The sums of all terms over the subsets of a span: S x S, and S."""
        return _total(self.hessian, 2, span, dtype), _total(self.third, 1, span, dtype)


def placed(tangent: Tangent | None, span: Span, dtype: np.dtype) -> jax.Array:
    """The tangent of a scalar as an array with an entry for each subset of a span."""
    if tangent is None:
        return jnp.zeros(span.count, dtype)
    return _total([_Block(tangent.values.real, (tangent.span,))], 1, span, dtype)


def _total(
    blocks: Sequence[_Block], ndim: int, span: Span, dtype: np.dtype
) -> jax.Array:
    """The sum of blocks over a span, with few scatter operations."""
    everything = (span,) * ndim
    full = [x for x in blocks if x.spans == everything]
    sums = [x.factor * x.values.astype(dtype) for x in full]
    zeros = jnp.zeros((span.count,) * ndim, dtype)
    flat = sum(sums[1:], start=sums[0] if sums else zeros).ravel()
    others = [x for x in blocks if x.spans != everything]
    for factor in sorted({block.factor for block in others}):
        some = [block for block in others if block.factor == factor]
        places = np.concatenate([block.places(span) for block in some])
        values = [block.values.ravel().astype(dtype) for block in some]
        more = factor * jnp.concatenate(values)
        flat = flat.at[places].add(more, mode="promise_in_bounds")
    return flat.reshape(zeros.shape)


def over_all_devices(x: jax.Array) -> jax.Array:
    """The sum over the axes of a `shard_map` along which an array varies."""
    axes = compat.varying_axes(x)
    return jax.lax.psum(x, axes) if axes else x
