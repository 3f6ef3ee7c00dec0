"""Convolutions of images that are smaller than the kernel.

XLA swaps such an image and its kernel, and its CPU backend then convolves at a small
part of its usual speed: with images of 2x2, kernels of 3x3 and 512 channels at a
fortieth (jax 0.10.2). With the zeros around the image written out, the image is the
larger of the two and nothing is swapped.
"""

from collections.abc import Callable

import jax
import numpy as np

from partnewton.engines.versions import Equation

__all__ = ["is_swapped", "with_zeros_written_out"]


def is_swapped(equation: Equation) -> bool:
    """Whether an equation is a convolution whose kernel is larger than its image."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    params, (image, kernel) = equation.params, equation.invars
    numbers = params["dimension_numbers"]
    sizes = [
        np.prod([atom.aval.shape[axis] for axis in spec[2:]])
        for atom, spec in ((image, numbers.lhs_spec), (kernel, numbers.rhs_spec))
    ]
    grouped = params["feature_group_count"] * params["batch_group_count"] > 1
    return bool(sizes[0] < sizes[1] and not grouped)


def with_zeros_written_out(equation: Equation) -> Callable[..., jax.Array]:
    """The same convolution, on a CPU with an image that is padded beforehand."""
    params = equation.params
    spatial = params["dimension_numbers"].lhs_spec[2:]

    def convolve(image: jax.Array, kernel: jax.Array, **changed: object) -> jax.Array:
        arguments = {
            name: changed.get(name, params[name])
            for name in (
                "window_strides",
                "padding",
                "lhs_dilation",
                "rhs_dilation",
                "dimension_numbers",
                "precision",
                "preferred_element_type",
            )
        }
        return jax.lax.conv_general_dilated(image, kernel, **arguments)

    def padded(image: jax.Array, kernel: jax.Array) -> jax.Array:
        widths = [(0, 0, 0)] * image.ndim
        for axis, (low, high), dilation in zip(
            spatial, params["padding"], params["lhs_dilation"], strict=True
        ):
            widths[axis] = (low, high, dilation - 1)
        image = jax.lax.pad(image, np.zeros((), image.dtype), widths)
        # Or XLA would take the zeros back into the convolution.
        image = jax.lax.optimization_barrier(image)
        nothing = [(0, 0)] * len(spatial)
        ones = (1,) * len(spatial)
        return convolve(image, kernel, padding=nothing, lhs_dilation=ones)

    def either(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(image, kernel, cpu=padded, default=convolve)

    return either
