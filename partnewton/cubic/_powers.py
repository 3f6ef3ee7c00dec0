"""Exact scaling by powers of two.

Exponents are read from the bits. `jnp.frexp` and `jnp.ldexp` are not used, because they
are lowered differently if float64 is disabled, as it can be when the code is compiled.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["ZERO_EXPONENT", "exponent_of", "ldexp", "power_of_two", "round_to"]

ZERO_EXPONENT = -(2**20)  # for the number 0; below any sum of a few exponents


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def exponent_of(x: jax.Array) -> jax.Array:
    """The e of |x| = m 2^e with m in [1/2, 1); `ZERO_EXPONENT` for 0."""
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(jnp.abs(x), _integer_dtype(x.dtype))
    exponent = (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 2)
    return jnp.where(jnp.abs(x) >= info.tiny, exponent, ZERO_EXPONENT)


def ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x * 2^exponent, exact wherever the result is a normal number."""
    half = exponent >> 1  # in two steps, as 2^exponent alone may be out of range
    return x * power_of_two(half, x.dtype) * power_of_two(exponent - half, x.dtype)


def power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    exponent = jnp.clip(exponent, info.minexp, info.maxexp - 1)
    bits = (exponent + (info.maxexp - 1)).astype(_integer_dtype(dtype)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def _integer_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The integer dtype with the same number of bits."""
    return jnp.dtype(jnp.int64 if dtype == jnp.float64 else jnp.int32)
