"""Characters of Python's own standard library, in windows."""

import functools
import sysconfig
from pathlib import Path

import numpy as np

__all__ = ["windows"]

# Long, and for years the same in substance; what is missing is passed over.
MODULES = ("argparse", "datetime", "decimal", "doctest", "inspect", "pickle", "typing")
VOCABULARY = 64  # the most frequent characters; all others are one


@functools.cache
def _codes() -> np.ndarray:
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [folder / f"{name}.py" for name in MODULES]
    text = "".join(p.read_text(encoding="utf-8") for p in paths if p.exists())
    raw = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    frequent = np.argsort(-np.bincount(raw, minlength=128), kind="stable")
    code = np.full(256, VOCABULARY - 1, np.int32)
    code[frequent[: VOCABULARY - 1]] = np.arange(VOCABULARY - 1)
    return code[raw]


def windows(length: int, count: int) -> tuple:
    """Windows and the same one character on: (x, y) to train on and to test on."""
    codes = _codes()
    rng = np.random.default_rng(0)
    cut = len(codes) * 9 // 10

    def drawn(low: int, high: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        starts = rng.integers(low, high - length - 1, n)[:, None]
        places = starts + np.arange(length)
        return codes[places], codes[places + 1]

    return drawn(0, cut, count), drawn(cut, len(codes), count // 8)
