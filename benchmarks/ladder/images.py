"""Fashion-MNIST from its own files, and random shifts and flips."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ladder.rung import Batch
from partnewton.demo import data

__all__ = ["FOLDERS", "find", "load", "shifted_and_flipped"]

FOLDERS = ("/usr/share/datasets/fashion-mnist", "~/fashion-mnist", "data/fashion-mnist")
"""Where the files are looked for; Debian's dataset-fashion-mnist has the first."""

VARIABLE = "LADDER_DATA"
MEAN, DEVIATION = 0.286, 0.353  # of the pixels of the training images


def find(folder: Path | None = None) -> Path | None:
    """The folder with the files: the given one, or the first one that has them.

    Raises:
      FileNotFoundError: the given folder does not contain them.
      ValueError: a file of the given folder has another format.
    """
    if folder is not None:
        data.from_folder(folder)
        return folder
    for name in FOLDERS:
        place = Path(name).expanduser()
        if (place / "train-images-idx3-ubyte.gz").is_file() or (
            place / "train-images-idx3-ubyte"
        ).is_file():
            return place
    return None


def use(folder: Path) -> None:
    """The folder of :func:`load`, in new processes too."""
    os.environ[VARIABLE] = str(folder)


@functools.cache
def load(size: int = 28) -> tuple[tuple, tuple]:
    """Training and test images ``(n, size, size, 1)``, standardised, and labels."""
    folder = os.environ.get(VARIABLE) or find()
    if folder is None:
        raise FileNotFoundError(f"no images in any of {', '.join(FOLDERS)}.")
    found = data.from_folder(folder)
    margin = (size - 28) // 2

    def prepared(images: np.ndarray) -> np.ndarray:
        around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
        return np.pad((images - MEAN) / DEVIATION, around, "edge").astype(np.float32)

    return (
        (prepared(found.train_images), found.train_labels),
        (prepared(found.test_images), found.test_labels),
    )


def shifted_and_flipped(key: jax.Array, batch: Batch, pixels: int = 2) -> Batch:
    """Each image shifted by up to `pixels` in both directions, and flipped or not."""
    images, labels = batch
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (len(images), 2), 0, 2 * pixels + 1)
    flips = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    around = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
    padded = jnp.pad(images, around, "edge")

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        corner = (shift[0], shift[1], 0)
        return jax.lax.dynamic_slice(image, corner, images.shape[1:])

    images = jax.vmap(crop)(padded, shifts)
    return jnp.where(flips, images[:, :, ::-1], images), labels
