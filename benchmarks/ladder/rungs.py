"""All rungs, from small to large."""

from collections.abc import Callable

from benchmarks.ladder.rung import Rung
from benchmarks.ladder.rungs_images import DIGITS, FASHION
from benchmarks.ladder.rungs_science import SCIENCE
from benchmarks.ladder.rungs_text import TEXT

__all__ = ["GPU", "QUICK", "RUNGS", "make", "needs_fashion"]

RUNGS: dict[str, Callable[[int], Rung]] = DIGITS | SCIENCE | FASHION | TEXT
GPU = tuple(name for name in RUNGS if name.endswith("_gpu"))
"""Rungs for an accelerator, which run only if they are named."""

QUICK = ("mlp_digits", "lenet_fashion")


def make(name: str, scale: int = 1) -> Rung:
    """The rung with this name, its widths divided by `scale`."""
    return RUNGS[name](scale)


def needs_fashion(name: str) -> bool:
    """Whether the rung needs the files of Fashion-MNIST."""
    return name in FASHION
