"""Windows of characters from Python's standard library."""

import functools
import sysconfig
from pathlib import Path

import numpy as np

__all__ = ["windows"]

# Long modules that hardly change between versions; missing ones are skipped.
MODULES = ("argparse", "datetime", "decimal", "doctest", "inspect", "pickle", "typing")
VOCABULARY = 64  # the most frequent characters, and one code for all others


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
    """Training and test data: windows, and the windows one character later."""
    codes = _codes()
    rng = np.random.default_rng(0)
    cut = len(codes) * 9 // 10

    def draw(low: int, high: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        starts = rng.integers(low, high - length - 1, n)[:, None]
        indices = starts + np.arange(length)
        return codes[indices], codes[indices + 1]

    return draw(0, cut, count), draw(cut, len(codes), count // 8)
