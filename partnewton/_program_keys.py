"""Keys of jaxprs: two programs with equal keys compute the same.

A key is a nested tuple of what a jaxpr consists of, with variables numbered in the
order in which they are defined. It can be compared and hashed, unlike the jaxpr itself,
which is equal to no other, not even to one traced from the same code.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from partnewton.engines import compat

__all__ = ["NoKeyError", "key_of_program"]

_CUSTOM = (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)
_ORDERS = 4  # of derivatives, one more than a summary takes


class NoKeyError(Exception):
    """There is something in a program that cannot be compared."""


def key_of_program(jaxpr: Any) -> Hashable:
    """The key of a jaxpr as a function of its inputs and of its own constants.

    Constants of jaxprs inside of it are part of the key: arrays of numpy by value,
    those of jax, which may be large but never change, by identity. So are functions,
    and jaxprs inside of it that have no key: a jitted function is traced once.
    Rules of differentiation, which are traced anew with each program, are represented
    by the jaxprs of the derivatives that they give.

    Args:
      jaxpr: of the kind that :func:`jax.make_jaxpr` returns.

    Returns:
      The key.

    Raises:
      NoKeyError: the program has side effects, or something in it cannot be compared.
    """
    return _key_of_jaxpr(compat.open_jaxpr(jaxpr), _ORDERS)


def _key_of_jaxpr(jaxpr: Any, orders: int) -> Hashable:
    """The key of an open jaxpr, whose derivatives up to some order may be taken."""
    numbers: dict[Any, int] = {}

    def defined(variables: Any) -> Hashable:
        for variable in variables:
            numbers[variable] = len(numbers)
        return tuple(variable.aval for variable in variables)

    def read(atoms: Any) -> Hashable:
        return tuple(
            (x.aval, _key_of_array(x.val))
            if isinstance(x, core.Literal)
            else numbers[x]
            for x in atoms
        )

    inputs = defined(jaxpr.constvars), defined(jaxpr.invars)
    equations = []
    for equation in jaxpr.eqns:
        if equation.effects:
            raise NoKeyError(f"{equation.primitive} has side effects.")
        operands = read(equation.invars)
        params = _key_of_params(equation, orders)
        context = getattr(equation, "ctx", None)
        equations.append(
            (equation.primitive, context, operands, params, defined(equation.outvars))
        )
    return inputs, tuple(equations), read(jaxpr.outvars)


def _key_of_params(equation: compat.Equation, orders: int) -> Hashable:
    if equation.primitive in _CUSTOM:
        called = _key_of(equation.params["call_jaxpr"], orders)
        return called, _key_of_derivative(equation, orders)
    return _key_of(equation.params, orders)


def _key_of_derivative(equation: compat.Equation, orders: int) -> Hashable:
    """The key of what the rule of a function with a derivative of its own computes."""
    if orders == 0:
        return None
    if equation.params.get("symbolic_zeros"):
        raise NoKeyError("A rule with symbolic zeros may depend on which are zero.")
    inputs = [x for x in dict.fromkeys(equation.invars) if isinstance(x, core.Var)]
    if any(map(compat.is_explicit, inputs)):
        raise NoKeyError("The derivative is traced without a mesh.")
    function = compat.function_of([equation], inputs, equation.outvars)
    is_number = [jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in inputs]

    def of_numbers(numbers: list, others: list) -> list:
        numbers, others = iter(numbers), iter(others)
        outputs = function(*(next(numbers if i else others) for i in is_number))
        return [y for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)]

    def derivative(numbers: list, others: list) -> Any:
        if equation.primitive is primitives.custom_jvp_call_p:
            return jax.jvp(lambda x: of_numbers(x, others), [numbers], [numbers])
        outputs, pull = jax.vjp(lambda x: of_numbers(x, others), numbers)
        return outputs, pull(outputs)

    structs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
        for x in (variable.aval for variable in inputs)
    ]
    pairs = list(zip(structs, is_number, strict=True))
    arguments = [x for x, i in pairs if i], [x for x, i in pairs if not i]
    try:
        traced = jax.make_jaxpr(derivative)(*arguments)
    except Exception as error:  # of the user's rule, for those to see who need it
        raise NoKeyError("A rule of differentiation fails.") from error
    return _key_of(traced, orders - 1)


def _key_of(x: Any, orders: int) -> Hashable:
    """The key of anything that may be a parameter of an equation."""
    if isinstance(x, core.Jaxpr | core.ClosedJaxpr):
        constants = tuple(map(_key_of_array, compat.constants_of(x)))
        try:
            return constants, _key_of_jaxpr(compat.open_jaxpr(x), orders)
        except NoKeyError:
            if compat.open_jaxpr(x).effects:
                raise
            return _Same(x)  # the same again where a jitted function is called
    if isinstance(x, tuple | list):
        return type(x), tuple(_key_of(y, orders) for y in x)
    if isinstance(x, dict):
        return dict, tuple((name, _key_of(y, orders)) for name, y in x.items())
    if isinstance(x, np.ndarray | np.generic | jax.Array | float | complex):
        return _key_of_array(x)
    try:
        hash(x)
    except TypeError as error:
        raise NoKeyError(f"A {type(x).__name__} cannot be compared.") from error
    return type(x), x


def _key_of_array(x: Any) -> Hashable:
    if isinstance(x, jax.Array):
        return _Same(x)
    array = np.asarray(x)
    return type(x), array.dtype, array.shape, array.tobytes()


class _Same:
    """Equal to what stands for the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
