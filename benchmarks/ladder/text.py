"""Python's standard library and the documentation inside it, as bytes and as tokens."""

import functools
import os
import sysconfig
import tempfile
import zlib
from pathlib import Path

import numpy as np

from benchmarks.ladder import bpe

__all__ = ["checksum", "corpus", "use_cache", "windows"]

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "msilib"}
TEST_SHARE = 10  # a tenth of the files
LEARNED_FROM = 3_000_000  # bytes of the training text from which merges are learned
VARIABLE = "LADDER_CACHE"


def use_cache(folder: Path) -> None:
    """The folder in which tokens are kept, in new processes too."""
    os.environ[VARIABLE] = str(folder)


@functools.cache
def corpus() -> tuple[bytes, bytes]:
    """Training and test text: all modules without tests, each in one of the two.

    The module ``pydoc_data.topics`` is Python's documentation of its language. Files
    are in an order that does not depend on their folders.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [x for x in names if not LEFT_OUT & set(x.parts)]
    hashed = sorted((zlib.crc32(x.as_posix().encode()), x) for x in names)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, name in hashed:
        parts[number % TEST_SHARE == 0].append((root / name).read_bytes())
    return b"".join(parts[0]), b"".join(parts[1])


@functools.cache
def checksum() -> str:
    """Of the text, which differs between versions of Python."""
    return f"{zlib.crc32(b''.join(corpus())):08x}"


def windows(length: int, vocabulary: int = 256) -> tuple[tuple, tuple, float]:
    """Windows of training and test tokens, the same one later, and bytes per token.

    Args:
      length: of a window; windows do not overlap.
      vocabulary: 256 for bytes, more for byte pair encoding.

    Returns:
      ``(x, y)`` of training, ``(x, y)`` of test, each (n, length), and the mean number
      of bytes of a token of the test text.
    """
    texts = corpus()
    if vocabulary == 256:
        tokens = [np.frombuffer(text, np.uint8) for text in texts]
    else:
        tokens = _tokens(vocabulary)
    train, test = (_cut(x, length) for x in tokens)
    return train, test, len(texts[1]) / len(tokens[1])


def _cut(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    count = (len(tokens) - 1) // length
    x = tokens[: count * length].reshape(count, length)
    y = tokens[1 : count * length + 1].reshape(count, length)
    return x.astype(np.int32), y.astype(np.int32)


@functools.cache
def _tokens(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    folder = Path(os.environ.get(VARIABLE) or tempfile.mkdtemp())
    path = folder / f"bpe_{vocabulary}_{checksum()}.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["train"], stored["test"]
    train, test = corpus()
    merges = bpe.learn(train[:LEARNED_FROM], vocabulary)
    found = bpe.encode(train, merges), bpe.encode(test, merges)
    # All of the file or nothing: another process may look for it at this moment.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        np.savez(file, train=found[0], test=found[1], merges=np.array(merges))
    Path(file.name).replace(path)
    return found
