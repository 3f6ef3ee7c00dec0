"""Data sets of small images: scanned digits, and readers for local files.

Nothing is downloaded and nothing is unpickled: a file consists of a header and bytes.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["CLASSES", "Dataset", "digits", "from_folder"]

CLASSES = 10
"""The number of classes of all data sets: labels are 0, ..., 9."""


class Dataset(NamedTuple):
    """Images and their labels, split into a training set and a test set.

    Attributes:
      train_images: (N, height, width, channels), float32 in [0, 1].
      train_labels: (N,), int32.
      test_images: (M, height, width, channels), float32 in [0, 1].
      test_labels: (M,), int32.
      name: for titles and tables.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str


def digits(seed: int = 0, *, test_fraction: float = 0.2) -> Dataset:
    """The 1797 scanned digits of scikit-learn, 8 x 8 pixels each.

    Args:
      seed: the seed of the split, which is stratified by class.
      test_fraction: the fraction of the images in the test set.

    Returns:
      A :class:`Dataset`.

    Raises:
      ImportError: scikit-learn is not installed.

    Example:
      >>> digits(seed=0).train_images.shape
      (1437, 8, 8, 1)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        labels.astype(np.int32),
        test_size=test_fraction,
        random_state=seed,
        stratify=labels,
    )
    name = "scikit-learn digits"
    return Dataset(train_images, train_labels, test_images, test_labels, name)


def from_folder(folder: str | Path) -> Dataset:
    """Reads a data set from the files in a folder.

    The format is recognised by the names of the files:

    - MNIST, Fashion-MNIST and similar sets in IDX files, plain or gzipped:
      ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-...`` and
      ``t10k-labels-...``, also with a dot before ``idx``;
    - CIFAR-10 in its binary version: ``data_batch_1.bin`` to ``data_batch_5.bin`` and
      ``test_batch.bin``, in the folder or in ``cifar-10-batches-bin`` inside it.

    Args:
      folder: where the files are.

    Returns:
      A :class:`Dataset`.

    Raises:
      FileNotFoundError: if the folder or a file of the data set does not exist.
      ValueError: if a file does not have the format that its name implies; the message
        names the file, the error and what was expected.
      OSError: if a file cannot be read.

    Example:
      >>> from_folder("no/such/folder")
      Traceback (most recent call last):
      FileNotFoundError: no/such/folder: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder.")
    if any(_find(folder, _idx_names(stem)) for stem in IDX_STEMS):
        return _idx_dataset(folder)
    for place in (folder, folder / "cifar-10-batches-bin"):
        if _find(place, CIFAR_FILES):
            return _cifar_dataset(place, name=folder.resolve().name)
    raise FileNotFoundError(
        f"{folder}: no data set found, neither IDX files (train-images-idx3-ubyte, "
        "plain or .gz, ...) nor the binary version of CIFAR-10 (data_batch_1.bin, ...)."
    )


# --- IDX: MNIST and similar ------------------------------------------------------

IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_names(stem: str) -> list[str]:
    """The names under which a file is distributed."""
    dotted = stem.replace("-idx", ".idx")
    return [stem, f"{stem}.gz", dotted, f"{dotted}.gz"]


def _idx_dataset(folder: Path) -> Dataset:
    paths = [_required(folder, _idx_names(stem)) for stem in IDX_STEMS]
    train_images, train_labels, test_images, test_labels = paths
    train = _idx_pair(train_images, train_labels)
    test = _idx_pair(test_images, test_labels)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{test_images}: images of {_shape_text(test[0].shape[1:3])} pixels, but "
            f"those of {train_images.name} have {_shape_text(train[0].shape[1:3])}."
        )
    return Dataset(*train, *test, name=folder.resolve().name)


def _idx_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = _idx_array(images_path, dimensions=3)
    labels = _idx_array(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: {len(labels)} labels, but {images_path.name} has "
            f"{len(images)} images."
        )
    return _as_floats(images[..., None]), _checked_labels(labels, labels_path)


def _idx_array(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes: the magic number, big-endian sizes, then the entries."""
    content = _content(path)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(
            f"{path}: truncated, {len(content)} bytes are less than the {header} of an "
            "IDX header."
        )
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    expected = 0x0800 + dimensions  # unsigned bytes, number of dimensions
    if magic != expected:
        raise ValueError(
            f"{path}: bad magic number 0x{magic:08x}, expected 0x{expected:08x} (IDX, "
            f"unsigned bytes, {dimensions} dimension{'s' if dimensions > 1 else ''})."
        )
    size = math.prod(shape)
    if size == 0:
        raise ValueError(
            f"{path}: an empty data set, its header contains {_shape_text(shape)}."
        )
    if len(content) != header + size:
        problem = "truncated" if len(content) < header + size else "too long"
        raise ValueError(
            f"{path}: {problem}, {len(content) - header} bytes follow the header, "
            f"expected {_shape_text(shape)} = {size}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# --- CIFAR-10, binary version ----------------------------------------------------

CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_FILES = (*CIFAR_TRAIN, CIFAR_TEST)
CIFAR_RECORD = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes


def _cifar_dataset(folder: Path, name: str) -> Dataset:
    paths = [_required(folder, [file]) for file in CIFAR_FILES]
    *train, test = [_cifar_batch(path) for path in paths]
    images, labels = zip(*train, strict=True)
    return Dataset(np.concatenate(images), np.concatenate(labels), *test, name=name)


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _content(path)
    if not content:
        raise ValueError(f"{path}: an empty data set, the file has no bytes.")
    if len(content) % CIFAR_RECORD:
        raise ValueError(
            f"{path}: truncated, {len(content)} bytes are not a multiple of the "
            f"{CIFAR_RECORD} bytes of an image and its label."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _as_floats(images), _checked_labels(records[:, 0], path)


# --- Helpers of both formats -----------------------------------------------------


def _find(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _required(folder: Path, names: list[str]) -> Path:
    path = _find(folder, names)
    if path is None:
        others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
        raise FileNotFoundError(f"{folder / names[0]}: missing{others}.")
    return path


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a valid gzip file ({error}).") from error


def _as_floats(images: np.ndarray) -> np.ndarray:
    """Converts bytes to floats in [0, 1]."""
    return np.ascontiguousarray(images, np.float32) / 255


def _checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.max() >= CLASSES:
        raise ValueError(
            f"{path}: the label {labels.max()} at position {labels.argmax()} is out of "
            f"range, expected 0 to {CLASSES - 1}."
        )
    return labels.astype(np.int32)


def _shape_text(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)
