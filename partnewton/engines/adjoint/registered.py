"""Rules registered by users: their results are checked, and exceptions reported."""

import warnings
from typing import Any

from partnewton.engines.adjoint.op import Op
from partnewton.engines.adjoint.registry import definition_of
from partnewton.engines.adjoint.tangent import Jet, Tangent
from partnewton.engines.adjoint.terms import Terms
from partnewton.engines.compat import Variable

__all__ = ["checked", "warn_of_failure"]


def checked(op: Op, result: Any) -> tuple[list[Jet], Terms]:
    """What a rule returned, or a TypeError if it is not jets and terms."""
    expected = (
        f"a rule must return a list of {len(op.written)} engines.Jet, one for each "
        "active output, and engines.Terms"
    )
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"{expected}, got {type(result).__name__}")
    jets, terms = result
    if not isinstance(terms, Terms):
        raise TypeError(f"{expected}, got {type(terms).__name__} as the second")
    if not isinstance(jets, tuple | list) or len(jets) != len(op.written):
        raise TypeError(f"{expected}, got {type(jets).__name__} as the first")
    for v, jet in zip(op.written, jets, strict=True):
        if not isinstance(jet, Jet):
            raise TypeError(f"{expected}, got a {type(jet).__name__} in the list")
        for tangent in jet:
            _check_tangent(tangent, v)
    return list(jets), terms


def _check_tangent(tangent: Any, v: Variable) -> None:
    if not isinstance(tangent, Tangent | None):
        raise TypeError(
            "a jet consists of two engines.Tangent or None, got "
            f"{type(tangent).__name__}"
        )
    if tangent is not None and tangent.values.shape[1:] != v.aval.shape:
        raise TypeError(
            f"each row of a tangent has the shape of the output, {v.aval.shape}"
            f", got rows of shape {tangent.values.shape[1:]}"
        )


def warn_of_failure(op: Op, error: Exception) -> None:
    """Warns of a registered rule that raised an exception, at its definition."""
    function = definition_of(op.rule.apply)
    if not hasattr(function, "__code__"):  # an object that can be called
        function = type(function).__call__
    code = function.__code__
    name = op.equations[0].primitive.name
    warnings.warn_explicit(
        f"The rule {op.rule.name} of the primitive {name} raised "
        f"{type(error).__name__}: {error}. The operation and all that depends on it "
        "are differentiated by jax instead: the summary is correct, and slower.",
        RuntimeWarning,
        code.co_filename,
        code.co_firstlineno,
        module=function.__module__,
        registry=_shown_warnings,
    )


_shown_warnings: dict = {}  # so that a warning is shown once, as by `warnings.warn`
