"""Differences between versions of jax, and functions without a public name in jax.

Everything else in the engines is written against jaxprs as `jax.extend.core` shows
them. Up to jax 0.10 a closed jaxpr is an object around an open one; from 0.11 on there
is one kind, with its constants inside.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import PartitionSpec

__all__ = [
    "Equation",
    "Jaxpr",
    "Variable",
    "arity",
    "as_call",
    "called_jaxpr",
    "constants_of",
    "function_of",
    "is_explicit",
    "is_reference",
    "jaxpr_of",
    "kernels_in",
    "may_be_sharded",
    "mentions",
    "named_axes",
    "num_equations",
    "on_a_mesh",
    "open_jaxpr",
    "traced",
    "varying_axes",
    "zeros",
]

Equation = core.JaxprEqn
Variable = core.Var
Jaxpr = core.Jaxpr


def traced(fun: Callable, *args: Any) -> tuple[Callable, Any]:
    """`fun` traced once, as a function that returns a list, and its closed jaxpr."""
    closed = jax.make_jaxpr(fun)(*args)
    return core.jaxpr_as_fun(closed), closed


def open_jaxpr(jaxpr: Any) -> Jaxpr:
    """The jaxpr that has `constvars`, whether closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def constants_of(jaxpr: Any) -> list[Any]:
    """The values of its `constvars`; none for an open jaxpr."""
    return list(getattr(jaxpr, "consts", None) or ())


def function_of(
    equations: Sequence[Equation],
    inputs: Sequence[Variable],
    outputs: Sequence[Variable],
) -> Callable[..., list[jax.Array]]:
    """The equations as a function; it may be differentiated and batched.

    Rules of the equations' own, `custom_jvp` and `custom_vjp`, stay in force.
    """
    jaxpr = jaxpr_of(equations, inputs, outputs)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))


def jaxpr_of(
    equations: Sequence[Equation],
    inputs: Sequence[Variable],
    outputs: Sequence[Variable],
) -> Jaxpr:
    """The equations as a jaxpr."""
    effects = frozenset().union(*(equation.effects for equation in equations))
    names = (None,) * len(inputs), (None,) * len(outputs)
    debug_info = core.DebugInfo("partnewton", "step", *names)
    return core.Jaxpr(
        (), tuple(inputs), tuple(outputs), list(equations), effects, debug_info
    )


def called_jaxpr(equation: Equation) -> Any | None:
    """The jaxpr of an equation that is a call, or None."""
    if equation.primitive in (primitives.jit_p, primitives.remat_p):
        return equation.params["jaxpr"]
    if equation.primitive is primitives.closed_call_p:
        return equation.params["call_jaxpr"]
    return None


def arity(equation: Equation) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan`.

    What is scanned over has one axis more outside of the body than inside.
    """
    body = open_jaxpr(equation.params["jaxpr"])
    num_xs = sum(
        outer.aval.ndim > inner.aval.ndim
        for outer, inner in zip(equation.invars, body.invars, strict=True)
    )
    num_carry = sum(
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(equation.outvars, body.outvars, strict=True)
    )
    return len(body.invars) - num_xs - num_carry, num_carry


def mentions(jaxpr: Any, name: str) -> bool:
    """Whether a jaxpr, or a jaxpr in its equations, contains a primitive."""
    return any(equation.primitive.name == name for equation in _all_equations(jaxpr))


def num_equations(equation: Equation) -> int:
    """The number of equations in the jaxprs of an equation."""
    insides = core.jaxprs_in_params(equation.params)
    return sum(len(list(_all_equations(inside))) for inside in insides)


def kernels_in(jaxpr: Any) -> list[str]:
    """The names of the Pallas kernels in a jaxpr."""
    calls = [e for e in _all_equations(jaxpr) if e.primitive.name == "pallas_call"]
    return sorted({repr(_name_of_kernel(call.params)) for call in calls})


def _name_of_kernel(params: dict[str, Any]) -> str:
    inside = getattr(params["jaxpr"], "debug_info", None)
    name = params.get("name") or getattr(inside, "func_name", None)
    return str(name or "without a name")


def _all_equations(jaxpr: Any) -> Iterator[Equation]:
    for equation in open_jaxpr(jaxpr).eqns:
        yield equation
        for inside in core.jaxprs_in_params(equation.params):
            yield from _all_equations(inside)


def is_reference(atom: Any) -> bool:
    """Whether a variable of a jaxpr stands for a mutable array, `jax.new_ref`."""
    return type(atom.aval).__name__ == "AbstractRef"


def named_axes(jaxpr: Any) -> tuple[str, ...]:
    """The named axes around a jaxpr over which it computes, as in ``psum(x, name)``."""
    effects = open_jaxpr(jaxpr).effects
    axes = [x.name for x in effects if type(x).__name__ == "NamedAxisEffect"]
    return tuple(sorted(map(str, axes)))


def as_call(function: Callable) -> Callable:
    """The function as a call that XLA does not inline on CPU.

    XLA usually inlines calls. Its CPU backend then fuses, for example, a transposition
    into each operation that reads its result, so that it is compiled and computed
    several times. The results of a call that is not inlined are computed once. On a
    mesh, where arrays can be sharded, the function is returned as it is.
    """

    def called(*args: Any) -> Any:
        if on_a_mesh():
            return function(*args)
        if jax.default_backend() != "cpu":
            return jitted(*args)
        with set_xla_metadata(inlineable="false"):
            return jitted(*args)

    def inside(*args: Any) -> Any:
        # The context manager also applies to all that is traced inside of the call.
        with set_xla_metadata(inlineable="true"):
            return function(*args)

    jitted = jax.jit(inside)
    return called


def varying_axes(x: jax.Array | Variable) -> tuple[str, ...]:
    """The mesh axes of a `shard_map` along which an array differs by device.

    None outside of `shard_map`, and inside of one with ``check_vma=False``.
    """
    aval = x.aval if isinstance(x, Variable) else jax.typeof(x)
    # `vma` up to jax 0.10.0, and `mat.varying` since.
    axes = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return tuple(sorted(axes))


def is_explicit(x: jax.Array | Variable) -> bool:
    """Whether an array is sharded over explicit axes of a mesh, by its type."""
    aval = x.aval if isinstance(x, Variable) else jax.typeof(x)
    return any(axis is not None for axis in aval.sharding.spec)


def on_a_mesh() -> bool:
    """Whether there is a current mesh, so that arrays can be sharded over it."""
    return not jax.sharding.get_abstract_mesh().empty


def may_be_sharded(*arrays: jax.Array) -> bool:
    """Whether arrays are sharded explicitly, or can be sharded over a current mesh."""
    return on_a_mesh() or any(map(is_explicit, arrays))


def zeros(variable: Variable, leading: tuple[int, ...]) -> jax.Array:
    """Zeros of the type of a variable, with additional leading axes."""
    aval = variable.aval
    shape = leading + aval.shape
    spec = PartitionSpec(*(None,) * len(leading), *aval.sharding.spec)
    if any(axis is not None for axis in spec):
        result = jnp.zeros(shape, aval.dtype, out_sharding=spec)
    else:
        result = jnp.zeros(shape, aval.dtype)
    axes = varying_axes(variable)
    return jax.lax.pcast(result, axes, to="varying") if axes else result
