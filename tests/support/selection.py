"""Which cases of a test run by default, and which are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """The cases of a parametrisation, all but a few of them marked slow.

    Args:
      cases: the values of the parameter.
      default: those among them that run without ``-m ""`` too.
    """
    cases = list(cases)
    unknown = [x for x in default if x not in cases]
    if unknown:
        raise ValueError(f"{unknown} are none of the cases {cases}")
    return [
        x if x in default else pytest.param(x, marks=pytest.mark.slow) for x in cases
    ]
