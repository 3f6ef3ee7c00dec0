"""Convolutions that are fast with XLA's CPU backend (as of jax 0.10).

It has a fast and a slow implementation, which differ by a factor of 20 to 40. The slow
one is used in two cases. If a kernel is larger than its image, XLA exchanges them; an
explicit padding with zeros makes the image the larger one. Inside a branch, the axes of
the kernel must have the usual order; in a transposed convolution, they have it if those
of the original kernel are exchanged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.engines.adjoint.lowerings import switch
from partnewton.engines.compat import Equation

__all__ = ["convolution_of_rows", "to_be_transposed"]

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def convolution_of_rows(equation: Equation) -> Convolution | None:
    """The convolution of an equation with explicit padding; None if not needed."""
    if not _is_convolution(equation) or not _is_swapped(equation):
        return None
    params = equation.params
    spatial = params["dimension_numbers"].lhs_spec[2:]

    def padded(image: jax.Array, kernel: jax.Array) -> jax.Array:
        widths = [(0, 0, 0)] * image.ndim
        for axis, (low, high), dilation in zip(
            spatial, params["padding"], params["lhs_dilation"], strict=True
        ):
            widths[axis] = (low, high, dilation - 1)
        image = jax.lax.pad(image, np.zeros((), image.dtype), widths)
        # Without it, XLA moves the padding back into the convolution.
        image = jax.lax.optimization_barrier(image)
        nothing = {
            "padding": [(0, 0)] * len(spatial),
            "lhs_dilation": (1,) * len(spatial),
        }
        return _convolve(equation, image, kernel, **nothing)

    def either(image: jax.Array, kernel: jax.Array) -> jax.Array:
        def plain(image: jax.Array, kernel: jax.Array) -> jax.Array:
            return _convolve(equation, image, kernel)

        return switch.on_cpu(padded, plain, image, kernel)

    return either


def to_be_transposed(equation: Equation) -> Convolution | None:
    """The convolution of an equation, with the channel axes of its kernel exchanged.

    None if the equation is no convolution.
    """
    if not _is_convolution(equation):
        return None
    numbers = equation.params["dimension_numbers"]
    outputs, inputs, *spatial = numbers.rhs_spec
    turned = numbers._replace(rhs_spec=(inputs, outputs, *spatial))

    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = jnp.swapaxes(kernel, inputs, outputs)
        return _convolve(equation, image, kernel, dimension_numbers=turned)

    return convolve


def _is_convolution(equation: Equation) -> bool:
    return equation.primitive.name == "conv_general_dilated"


def _is_swapped(equation: Equation) -> bool:
    numbers = equation.params["dimension_numbers"]
    image, kernel = (
        np.prod([atom.aval.shape[axis] for axis in spec[2:]])
        for atom, spec in zip(equation.invars, numbers[:2], strict=True)
    )
    groups = [equation.params[x] for x in ("feature_group_count", "batch_group_count")]
    return bool(image < kernel) and groups == [1, 1]


def _convolve(
    equation: Equation, image: jax.Array, kernel: jax.Array, **changed: object
) -> jax.Array:
    names = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
    )
    arguments = {name: equation.params[name] for name in names} | changed
    return jax.lax.conv_general_dilated(image, kernel, **arguments)
