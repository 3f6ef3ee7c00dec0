"""How derivatives along the parts of directions are computed.

There are two engines, whose results agree up to rounding: :class:`Adjoint`, the fast
one, and :class:`JvpOfGrad`, the reference.

:func:`register_linear`, :func:`register_elementwise`,
:func:`register_piecewise_linear`, :func:`register_piecewise_constant` and :func:`rule`
extend the adjoint engine by primitives; the other names are what a rule receives, uses
and returns. Primitives that are not registered are differentiated by jax: registration
is for speed only. It is not checked, so compare both engines where a primitive is new.
:func:`operations` lists the operations of a loss with the rules that apply to them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from partnewton.engines.adjoint import Adjoint
from partnewton.engines.adjoint.listing import Operation, operations
from partnewton.engines.adjoint.op import Apply, Op, Request
from partnewton.engines.adjoint.registry import (
    register_elementwise,
    register_linear,
    register_piecewise_constant,
    register_piecewise_linear,
    rule,
)
from partnewton.engines.adjoint.rows import push
from partnewton.engines.adjoint.spans import Span, overlap
from partnewton.engines.adjoint.tangent import Jet, Tangent, add, densify, restrict
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.jvp_of_grad import JvpOfGrad
from partnewton.partitions import Partition

__all__ = [
    "ENGINES",
    "Adjoint",
    "Apply",
    "Engine",
    "Jet",
    "JvpOfGrad",
    "Op",
    "Operation",
    "Request",
    "Span",
    "Tangent",
    "Terms",
    "add",
    "densify",
    "get",
    "operations",
    "overlap",
    "push",
    "register_elementwise",
    "register_linear",
    "register_piecewise_constant",
    "register_piecewise_linear",
    "restrict",
    "rule",
]

Leaves = Sequence[jax.Array]
Loss = Callable[[Leaves], tuple[jax.Array, Any]]


class Engine(Protocol):
    """The methods that compute derivatives of a loss along the parts of directions.

    The arguments of both methods are `loss`, a function from a list of arrays to
    ``(value, aux)``; `leaves`, such a list; `directions`, K directions as a list of
    arrays with a leading axis K and the shapes and dtypes of `leaves`; and the
    partition of the entries of `leaves`.
    """

    def summarize(
        self,
        loss: Loss,
        leaves: Leaves,
        directions: Leaves,
        partition: Partition,
        *,
        third_order: bool,
    ) -> tuple[tuple[jax.Array, Any], jax.Array, jax.Array, jax.Array | None]:
        """Value and aux, gradient (K, S), hessian (K, S, K, S), third (K, S)."""
        ...

    def derivative_tensors(
        self,
        loss: Loss,
        leaves: Leaves,
        directions: Leaves,
        partition: Partition,
        *,
        order: int,
    ) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
        """Value and aux, and the tensors of order 1 to `order`, (K, S) * d."""
        ...


ENGINES: dict[str, Engine] = {"adjoint": Adjoint(), "jvp_of_grad": JvpOfGrad()}


def get(engine: str | Engine) -> Engine:
    """The engine with a name; an engine is returned unchanged.

    Args:
      engine: "adjoint", "jvp_of_grad", "auto" for the default, or an engine.

    Returns:
      An engine.

    Example:
      >>> get("auto") is get("adjoint")
      True

    Raises:
      ValueError: there is no engine of this name.
      TypeError: the argument is neither a name nor an engine.
    """
    if isinstance(engine, str):
        name = "adjoint" if engine == "auto" else engine
        if name not in ENGINES:
            choices = ", ".join(repr(x) for x in ("auto", *ENGINES))
            raise ValueError(f"engine must be one of {choices}, got {engine!r}.")
        return ENGINES[name]
    if isinstance(engine, type) or not hasattr(engine, "summarize"):
        raise TypeError(
            "engine must be a name or an engine such as "
            f"partnewton.engines.Adjoint(batch_size=32), got {engine!r}."
        )
    return engine
