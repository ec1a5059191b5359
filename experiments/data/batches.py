"""Batches to measure on: Gaussian noise, CIFAR-10, and the digits of scikit-learn."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data import cifar10_files as archive
from experiments.data.cifar10_files import IMAGE_SHAPE

# Mean and standard deviation of the training images by channel, of values in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

# A measured batch is drawn from this many images, which is one file of the official layout.
CIFAR10_POOL = 10_000


def noise(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Standard Gaussian noise, (batch_size, *shape)."""
    _check_batch_size(batch_size)
    return torch.randn(batch_size, *shape, generator=generator)


def cifar10(batch_size: int, shape: tuple[int, ...], *, download: bool, generator: torch.Generator) -> Tensor:
    """Random images of the training set, standardized by channel, (batch_size, 3, 32, 32)."""
    images, _ = _cifar10_pool(download)
    batch = _choose(images, batch_size, "CIFAR-10 images in the pool", generator).float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return (batch - mean) / std


def digits(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Random handwritten digits, enlarged from 8x8 to three equal 32x32 channels and standardized as a whole.

    Raises:
        ModuleNotFoundError: scikit-learn, the extra ``digits``, is not installed.
    """
    images = _digits()
    batch = _choose(images, batch_size, "digits", generator)[:, None]
    return ((_enlarged(batch) - images.mean()) / images.std()).expand(-1, *IMAGE_SHAPE).contiguous()


def digits_with_labels() -> tuple[Tensor, Tensor]:
    """All digits as bytes (1797, 3, 32, 32), and what they show."""
    enlarged = _enlarged(_digits()[:, None]) * (255 / 16)
    return enlarged.round().clamp(0, 255).to(torch.uint8).expand(-1, *IMAGE_SHAPE).contiguous(), _digit_labels()


def digits_8x8(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Random handwritten digits as they are, 64 features, standardized as a whole, (batch_size, 64)."""
    pixels, _ = digits_8x8_with_labels()
    return _choose(pixels, batch_size, "digits", generator)


def digits_8x8_with_labels() -> tuple[Tensor, Tensor]:
    """All digits, (1797, 64), standardized as a whole, and what they show."""
    images = _digits()
    return ((images - images.mean()) / images.std()).flatten(1), _digit_labels()


def _enlarged(images: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(images, size=IMAGE_SHAPE[1:], mode="bilinear", align_corners=False)


def _choose(images: Tensor, batch_size: int, what: str, generator: torch.Generator) -> Tensor:
    _check_batch_size(batch_size)
    if batch_size > len(images):
        raise ValueError(f"data.batch_size={batch_size} is more than the {len(images)} {what}.")
    return images[torch.randperm(len(images), generator=generator)[:batch_size]]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}.")


@lru_cache(maxsize=1)
def _cifar10_pool(download: bool) -> tuple[Tensor, Tensor]:
    split = archive.load(train=True, limit=CIFAR10_POOL, download=download)
    return torch.from_numpy(split.images), torch.from_numpy(split.labels)


def _digits() -> Tensor:
    return torch.from_numpy(np.asarray(_digit_set().images, dtype=np.float32))


def _digit_labels() -> Tensor:
    return torch.from_numpy(np.asarray(_digit_set().target, dtype=np.int64))


@lru_cache(maxsize=1)
def _digit_set() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'data=digits needs scikit-learn: pip install "gradscope-toolkit[digits]", or measure with data=noise.'
        ) from error
    return load_digits()
