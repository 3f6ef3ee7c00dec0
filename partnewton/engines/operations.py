"""What is known of operations, by name.

These tables only make the adjoint engine faster. An operation that is in none of them
is a local function like any other, differentiated by jax itself.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from partnewton.engines import versions
from partnewton.engines.dataflow import is_variable

__all__ = [
    "has_power",
    "is_affine",
    "is_elementwise",
    "is_known",
    "is_linear",
    "is_piecewise_linear",
    "is_singular",
    "may_mask",
    "moves",
]

_ALL = range(1000)

# Linear in these operands together.
LINEAR: dict[str, Collection[int]] = {
    **dict.fromkeys(
        [
            "add",
            "add_any",
            "all_gather",
            "all_gather_invariant",
            "all_to_all",
            "broadcast_in_dim",
            "complex",
            "concatenate",
            "conj",
            "convert_element_type",
            "copy",
            "copy_p",
            "cumsum",
            "device_put",
            "fft",
            "imag",
            "mesh_cast",
            "name",
            "neg",
            "optimization_barrier",
            "pad",
            "pbroadcast",
            "pcast",
            "ppermute",
            "psum",
            "psum_invariant",
            "psum_scatter",
            "pvary",
            "real",
            "reduce_precision",
            "reduce_scatter",
            "reduce_sum",
            "reduce_window_sum",
            "reshape",
            "reshard",
            "rev",
            "select_n",
            "sharding_constraint",
            "slice",
            "split",
            "squeeze",
            "stack",
            "sub",
            "tile",
            "transpose",
        ],
        _ALL,
    ),
    "div": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "gather": (0,),
    "scatter-add": (0, 2),
    "triangular_solve": (1,),
}

# Linear in either operand, as long as the other one stands still.
PRODUCTS = frozenset(["conv_general_dilated", "dot_general", "mul"])

# Linear almost everywhere, if they are about real numbers.
PIECEWISE_LINEAR = frozenset(
    [
        "abs",
        "clamp",
        "cummax",
        "cummin",
        "max",
        "min",
        "reduce_max",
        "reduce_min",
        "reduce_window_max",
        "reduce_window_min",
        "rem",
        "scatter",
        "select_and_gather_add",
        "select_and_scatter_add",
        "sort",
        "top_k",
    ]
)

# Constant almost everywhere, if they are about real numbers.
PIECEWISE_CONSTANT = frozenset(["ceil", "floor", "round", "sign"])

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "one_minus_square",
        "or",
        "polynomial",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)


# Elementwise functions with an infinite derivative somewhere, of any order.
SINGULAR = frozenset(
    [
        "acos",
        "acosh",
        "asin",
        "atan2",
        "atanh",
        "cbrt",
        "digamma",
        "div",
        "erf_inv",
        "integer_pow",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "pow",
        "rsqrt",
        "sqrt",
        "tan",
    ]
)

# Those of them that are regular for positive operands; the divisor, of `div`.
SINGULAR_AT_ZERO = SINGULAR - {"acos", "acosh", "asin", "atanh", "erf_inv", "tan"}

# What keeps the derivatives of some entries away from others, beside all that is
# piecewise linear or not in these tables: an adjoint that is not finite may end here.
_MASKING = frozenset(
    [
        "concatenate",
        "dynamic_update_slice",
        "gather",
        "pad",
        "scatter-add",
        "select_n",
        "stack",
    ]
)


def may_mask(equation: versions.Equation) -> bool:
    """Whether the result may stand still at some entries where the operands move."""
    name = equation.primitive.name
    if name in ("concatenate", "pad", "stack"):
        return not all(
            _is_inexact(atom) and is_variable(atom) for atom in equation.invars
        )
    is_plain = name in LINEAR or name in PRODUCTS or name in ELEMENTWISE
    return name in _MASKING or name in PIECEWISE_LINEAR or not is_plain


def is_singular(
    equation: versions.Equation, positive: Collection[versions.Variable] = ()
) -> bool:
    """Whether an elementwise function has an infinite derivative at some number.

    Args:
      equation: the function.
      positive: the variables that are greater than zero.
    """
    return any(
        e.primitive.name in SINGULAR and not _is_kept_away(e, positive)
        for e in _elementary(equation)
    )


def has_power(equation: versions.Equation) -> bool:
    """Whether an elementwise function has to do with powers that are not whole."""
    return any(e.primitive.name == "pow" for e in _elementary(equation))


def is_known(equation: versions.Equation) -> bool:
    """Whether an operation is in one of the tables, or consists of such ones."""
    name = equation.primitive.name
    return is_elementwise(equation) or any(
        name in table for table in (LINEAR, PRODUCTS, PIECEWISE_LINEAR)
    )


def _elementary(equation: versions.Equation) -> list[versions.Equation]:
    """The equations that an equation consists of, if it is a function with a rule."""
    if equation.primitive is not primitives.custom_jvp_call_p:
        return [equation]
    inside = versions.open_jaxpr(equation.params["call_jaxpr"])
    return [e for inner in inside.eqns for e in _elementary_or_inlined(inner)]


def _elementary_or_inlined(equation: versions.Equation) -> list[versions.Equation]:
    inside = versions.inlined(equation)
    if inside is None:
        return _elementary(equation)
    inner = versions.open_jaxpr(inside).eqns
    return [e for x in inner for e in _elementary_or_inlined(x)]


def _is_kept_away(
    equation: versions.Equation, positive: Collection[versions.Variable]
) -> bool:
    """Whether the number with the infinite derivative is out of reach."""
    name, read = equation.primitive.name, equation.invars
    if name == "integer_pow" and equation.params["y"] >= 0:
        return True
    if name not in SINGULAR_AT_ZERO:
        return False
    atom = read[1] if name == "div" else read[0]
    return atom in positive if is_variable(atom) else name == "div"


def moves(equation: versions.Equation) -> bool:
    """Whether results differ at all when operands move a little."""
    name = equation.primitive.name
    return name != "stop_gradient" and not (
        name in PIECEWISE_CONSTANT and _is_real(equation)
    )


def is_linear(equation: versions.Equation, active: Collection[int]) -> bool:
    """Whether an operation is linear in the operands at the places `active`."""
    name = equation.primitive.name
    if name in PRODUCTS:
        return len(active) <= 1
    return set(active) <= set(LINEAR.get(name, ()))


def is_affine(equation: versions.Equation, active: Collection[int]) -> bool:
    """Whether an operation that is linear may have a constant term besides: ``x + 1``.

    It has one where such operands stand still, or where a gather fills in.
    """
    name = equation.primitive.name
    return name == "gather" or (
        name not in PRODUCTS
        and any(
            n in LINEAR[name] and n not in active
            for n, atom in enumerate(equation.invars)
            if jnp.issubdtype(atom.aval.dtype, np.inexact)
        )
    )


def is_piecewise_linear(equation: versions.Equation) -> bool:
    """Whether an operation is linear in all operands, almost everywhere."""
    return equation.primitive.name in PIECEWISE_LINEAR and _is_real(equation)


def is_elementwise(equation: versions.Equation) -> bool:
    """Whether each entry of the result depends on the same entry of the operands."""
    if equation.effects:
        return False
    if equation.primitive is primitives.custom_jvp_call_p:
        inside = equation.params["call_jaxpr"]
    else:
        inside = versions.inlined(equation)
    if inside is None:
        return equation.primitive.name in ELEMENTWISE
    return all(map(is_elementwise, versions.open_jaxpr(inside).eqns))


def _is_inexact(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, np.inexact)


def _is_real(equation: versions.Equation) -> bool:
    return not any(
        jnp.issubdtype(atom.aval.dtype, np.complexfloating)
        for atom in (*equation.invars, *equation.outvars)
    )
