"""Operations that are applied to many rows of tangents."""

from collections.abc import Callable

import jax

from partnewton.engines.adjoint.dataflow import values_of
from partnewton.engines.adjoint.lowerings import (
    convolutions,
    products,
    reductions,
    switch,
)
from partnewton.engines.adjoint.op import Op

__all__ = ["function_of_rows", "transposable"]


def function_of_rows(op: Op) -> tuple[Callable[..., list[jax.Array]], bool]:
    """The function of an operation for rows, and whether it is given all rows at once.

    If not, it is a function of one row of each operand.
    """
    if len(op.equations) == 1 and switch.are_enabled():
        (equation,) = op.equations
        if products.is_batched(equation):
            return _by(op, products.product_of_rows(equation)), True
        for way_of in (convolutions.convolution_of_rows, reductions.sum_of_rows):
            way = way_of(equation)
            if way is not None:
                return _by(op, way), False
    return op.function, False


def transposable(op: Op) -> Callable[..., list[jax.Array]]:
    """The function of an operation, for transposition."""
    if len(op.equations) == 1 and switch.are_enabled():
        way = convolutions.to_be_transposed(op.equations[0])
        if way is not None:
            return _by(op, way)
    return op.function


def _by(op: Op, way: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    (equation,) = op.equations

    def function(*inputs: jax.Array) -> list[jax.Array]:
        values = dict(zip(op.inputs, inputs, strict=True))
        return [way(*values_of(equation.invars, values))]

    return function
