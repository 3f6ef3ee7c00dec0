"""Programs of the adjoint engine, and comparisons of both engines."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import partnewton as pn
from partnewton.engines import compat
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.program import Program
from support.oracles import assert_close, quick_jit

PyTree = Any


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def program_for(loss: Callable, *args: Any) -> Program:
    """The program that the engine makes of a loss."""
    return program_of(compat.traced(loss, *args)[1])[0]


def with_both_engines(function, loss, params, direction, **kwargs):
    """The results of a function of the library, with both engines."""
    return [
        quick_jit(functools.partial(function, loss, engine=engine, **kwargs))(
            params, direction
        )
        for engine in ("adjoint", "jvp_of_grad")
    ]


def assert_summaries_agree(*args, rtol=1e-12, **kwargs):
    """Both engines on a summary; relative to the largest entry of each field."""
    summary, expected = with_both_engines(pn.summarize, *args, **kwargs)
    floor = 1e-2 * float(np.max(np.abs(expected.hessian)))
    for field in expected._fields:
        pair = [np.asarray(getattr(x, field)) for x in (summary, expected)]
        assert_close(*pair, rtol, field, floor)
    return expected


def assert_tensors_agree(*args, rtol=1e-12, **kwargs):
    """Both engines on derivative tensors; relative to the largest entry of each."""
    tensors, expected = with_both_engines(pn.derivative_tensors, *args, **kwargs)
    floor = 1e-2 * float(np.max(np.abs(expected[1])))
    for d, (x, y) in enumerate(zip(tensors, expected, strict=True), start=1):
        assert_close(x, np.asarray(y), rtol, f"tensor of order {d}", floor)


def assert_engines_agree(*args, **kwargs):
    """Both engines on summary and tensors."""
    assert_tensors_agree(*args, **kwargs)
    return assert_summaries_agree(*args, **kwargs)
