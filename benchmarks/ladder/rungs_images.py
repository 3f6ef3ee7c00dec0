"""Rungs on Fashion-MNIST and on scanned digits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, problems_base
from benchmarks.ladder import images, networks_images
from benchmarks.ladder.rung import Rung, supervised
from benchmarks.problems_base import cross_entropy, error_rate, squared

__all__ = ["DIGITS", "FASHION"]

DEEP = 20  # hidden layers
VGG11 = (32, "pool", 64, "pool", 128, 128, "pool", 256, 256, "pool", 256, 256, "pool")
NOISE = 0.5  # of the denoised images, whose pixels have the deviation 1
DENOISED = 20000  # images

_classifier = functools.partial(
    supervised, criterion=cross_entropy, metric=error_rate, metric_name="error rate"
)


def _mlp_digits(scale: int) -> Rung:
    train, test = problems_base.digits()
    widths = [64, *_scaled((128, 128), scale), 10]
    network = networks.mlp(widths, jax.nn.relu)
    return _classifier(network, train, test, batch=64, steps=300)


def _mlp_fashion(scale: int) -> Rung:
    train, test = _rows()
    widths = [784, *_scaled((256, 128), scale), 10]
    network = networks.mlp(widths, jax.nn.relu)
    return _classifier(network, train, test, batch=128, steps=500)


def _lenet_fashion(scale: int) -> Rung:
    network = networks_images.lenet(scale)
    return _classifier(network, *images.load(), batch=100, steps=2000)


def _cnn_fashion(scale: int) -> Rung:
    widths = _scaled((24, 48, 96, 96), scale)
    network = networks_images.normalised_cnn(widths, (1, 2, 2, 1))
    return _classifier(
        network,
        *images.load(),
        batch=64,
        steps=150,
        augment=images.shifted_and_flipped,
        evaluated=512,
    )


def _vgg_fashion(scale: int) -> Rung:
    plan: list[Any] = []
    for step in VGG11:
        plan += [step] if step == "pool" else _scaled((step,), scale)
    network = networks_images.plain_cnn(plan, places=1)
    return _classifier(network, *images.load(32), batch=32, steps=300)


def _deep_fashion(scale: int) -> Rung:
    train, test = _rows()
    widths = [784, *_scaled((128,) * DEEP, scale), 10]
    network = networks.mlp(widths, jax.nn.elu, jax.nn.initializers.he_normal())
    return _classifier(network, train, test, batch=100, steps=1500)


def _vit_fashion(scale: int) -> Rung:
    network = networks_images.vit(28, 4, 96 // scale, heads=4, layers=4)
    return _classifier(network, *images.load(), batch=32, steps=500)


def _unet_fashion(scale: int) -> Rung:
    """Removal of noise."""
    rng = np.random.default_rng(0)

    def noisy(data: tuple[np.ndarray, np.ndarray], count: int) -> tuple:
        clean = data[0][:count]
        noise = rng.standard_normal(clean.shape, np.float32)
        return clean + NOISE * noise, clean

    train, test = (
        noisy(x, n) for x, n in zip(images.load(), (DENOISED, 2000), strict=True)
    )
    return supervised(
        networks_images.unet(_scaled((12, 24, 48), scale)),
        train,
        test,
        squared,
        squared,
        metric_name="mean square",
        batch=32,
        steps=800,
        evaluated=512,
    )


def _resnet_gpu(scale: int) -> Rung:
    """ResNet-18 in bfloat16, with parameters in float32."""
    widths = _scaled((64, 128, 256, 512), scale)
    return _classifier(
        networks_images.resnet18(widths),
        *images.load(32),
        batch=128,
        steps=1500,
        augment=images.shifted_and_flipped,
        dtype=jnp.bfloat16,
    )


def _rows() -> tuple[tuple, tuple]:
    """Images as rows of 784 numbers."""
    (x, y), (x_test, y_test) = images.load()
    return (x.reshape(len(x), -1), y), (x_test.reshape(len(x_test), -1), y_test)


def _scaled(widths: tuple[int, ...], scale: int) -> list[int]:
    return [-(-width // scale) for width in widths]


DIGITS: dict[str, Callable[[int], Rung]] = {"mlp_digits": _mlp_digits}
FASHION: dict[str, Callable[[int], Rung]] = {
    "mlp_fashion": _mlp_fashion,
    "lenet_fashion": _lenet_fashion,
    "cnn_fashion": _cnn_fashion,
    "vgg_fashion": _vgg_fashion,
    "deep_fashion": _deep_fashion,
    "vit_fashion": _vit_fashion,
    "unet_fashion": _unet_fashion,
    "resnet18_gpu": _resnet_gpu,
}
"""Functions of a divisor of the widths; those that need the files of Fashion-MNIST."""
