"""Training loss and test accuracy, on a part of each split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partnewton.demo.experiment import Experiment

__all__ = ["MOST_EVALUATED", "compiled", "evaluation"]

MOST_EVALUATED = 2000  # upper bound on the images of each split
CHUNK = 500  # images evaluated at once

PyTree = Any


def evaluation(experiment: Experiment) -> Callable[[PyTree], tuple[float, float]]:
    """A compiled function from weights to training loss and test accuracy."""
    dataset = experiment.dataset
    train, test = jax.device_put(
        (
            _evenly_spaced(dataset.train_images, dataset.train_labels),
            _evenly_spaced(dataset.test_images, dataset.test_labels),
        )
    )

    def evaluate(params: PyTree, train: Any, test: Any) -> tuple[jax.Array, jax.Array]:
        def loss(example: Any) -> jax.Array:
            image, label = example
            return experiment.value_fn(params, image[None], label[None])

        def is_right(example: Any) -> jax.Array:
            image, label = example
            logits = experiment.logits_fn(params, image[None])[0]
            return jnp.mean(jnp.argmax(logits, axis=-1) == label)

        return (
            jnp.mean(jax.lax.map(loss, train, batch_size=CHUNK)),
            jnp.mean(jax.lax.map(is_right, test, batch_size=CHUNK)),
        )

    program = compiled(evaluate, experiment.params, train, test)

    def call(params: PyTree) -> tuple[float, float]:
        loss, accuracy = program(params, train, test)
        return float(loss), float(accuracy)

    return call


def _evenly_spaced(
    images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_EVALUATED` images, at evenly spaced indices."""
    count = min(len(images), MOST_EVALUATED)
    places = np.linspace(0, len(images) - 1, count).astype(int)
    return images[places], labels[places]


def compiled(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """The function, compiled for these arguments."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
