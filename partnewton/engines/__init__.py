"""How derivatives along the parts of a direction are computed.

An engine is a module with two functions,

    summarize(loss, leaves, direction, partition, *, third_order, batch_size)
        -> (value, aux), gradient, hessian, third
    derivative_tensors(loss, leaves, direction, partition, *, order, batch_size)
        -> (value, aux), tensors

where `loss` maps a list of arrays to ``(value, aux)``, `leaves` and `direction` are
such lists, with equal shapes and dtypes, and `partition` is their
:class:`~partnewton.partitions.Partition`. Engines agree to rounding on everything.
"""

from types import ModuleType

from partnewton.engines import adjoint, jvp_of_grad

ENGINES: dict[str, ModuleType] = {"adjoint": adjoint, "jvp_of_grad": jvp_of_grad}
AUTO = "jvp_of_grad"


def get(name: str) -> ModuleType:
    """The engine called `name`, or the one that "auto" stands for."""
    engine = ENGINES.get(AUTO if name == "auto" else name)
    if engine is None:
        choices = ", ".join(repr(x) for x in ("auto", *ENGINES))
        raise ValueError(f"engine must be one of {choices}, got {name!r}.")
    return engine
