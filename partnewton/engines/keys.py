"""Keys of jaxprs: two programs with equal keys compute the same function.

A key is a nested tuple of the contents of a jaxpr, with variables numbered in the order
of their definition. Keys can be compared and hashed, unlike jaxprs, which are compared
by identity, even if they were traced from the same code.
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
_ORDERS = 4  # of derivatives, one more than a summary uses


class NoKeyError(Exception):
    """A program contains something that cannot be compared."""


def key_of_program(jaxpr: Any) -> Hashable:
    """The key of a jaxpr as a function of its inputs and of its own constants.

    The constants of inner jaxprs are part of the key: NumPy arrays by value, and jax
    arrays, which can be large but are immutable, by identity. Functions, and inner
    jaxprs without a key, are also compared by identity, since a jitted function is
    traced once. Custom differentiation rules, which are traced again with each program,
    are represented by the jaxprs of the derivatives that they define.

    Args:
      jaxpr: a closed jaxpr, as returned by :func:`jax.make_jaxpr`.

    Returns:
      The key.

    Raises:
      NoKeyError: the program has side effects, or something in it cannot be compared.
    """
    return _key_of_jaxpr(compat.open_jaxpr(jaxpr), _ORDERS)


def _key_of_jaxpr(jaxpr: Any, orders: int) -> Hashable:
    """The key of an open jaxpr and of its derivatives up to order `orders`."""
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
    """The key of the derivative that a custom differentiation rule defines."""
    if orders == 0:
        return None
    if equation.params.get("symbolic_zeros"):
        raise NoKeyError(
            "A rule with symbolic zeros can depend on which tangents are zero."
        )
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
    except (
        Exception
    ) as error:  # in a user's rule; it is raised again when the derivative is taken
        raise NoKeyError("A differentiation rule fails.") from error
    return _key_of(traced, orders - 1)


def _key_of(x: Any, orders: int) -> Hashable:
    """The key of a value that is a parameter of an equation."""
    if isinstance(x, core.Jaxpr | core.ClosedJaxpr):
        constants = tuple(map(_key_of_array, compat.constants_of(x)))
        try:
            return constants, _key_of_jaxpr(compat.open_jaxpr(x), orders)
        except NoKeyError:
            if compat.open_jaxpr(x).effects:
                raise
            return _Same(x)  # a jitted function has the same jaxpr at each call
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
    """Compares an object, which it keeps alive, by identity."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
