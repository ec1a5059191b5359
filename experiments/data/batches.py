"""Batches to measure on: Gaussian noise, CIFAR-10, and the digits of scikit-learn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from experiments.data import cifar10_files
from experiments.data.cifar10_files import IMAGE_SHAPE

# Mean and standard deviation of the training images per channel, for pixel values in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

CIFAR10_POOL = 10_000  # batches for measurements are drawn from the images of the first file


def noise(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Standard Gaussian noise of shape (batch_size, *shape)."""
    _check_batch_size(batch_size)
    return torch.randn(batch_size, *shape, generator=generator)


def cifar10(batch_size: int, shape: tuple[int, ...], *, download: bool, generator: torch.Generator) -> Tensor:
    """Random images of the CIFAR-10 training set, standardized per channel, of shape (batch_size, 3, 32, 32)."""
    batch = _choose(_cifar10_pool(download), batch_size, "CIFAR-10 images in the pool", generator).float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return (batch - mean) / std


def digits(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Random digits, enlarged from 8 x 8 pixels, standardized over all pixels, of shape (batch_size, 3, 32, 32)."""
    images, _ = _digits()
    batch = _choose(images, batch_size, "digits", generator)[:, None]
    return ((_enlarged(batch) - images.mean()) / images.std()).expand(-1, *IMAGE_SHAPE).contiguous()


def digits_with_labels() -> tuple[Tensor, Tensor]:
    """All digits as uint8 of shape (1797, 3, 32, 32), and their labels of shape (1797,)."""
    images, labels = _digits()
    enlarged = _enlarged(images[:, None]) * (255 / 16)
    return enlarged.round().clamp(0, 255).to(torch.uint8).expand(-1, *IMAGE_SHAPE).contiguous(), labels


def digits_8x8(batch_size: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Random handwritten digits of 8 x 8 pixels, standardized over all pixels, of shape (batch_size, 64)."""
    pixels, _ = digits_8x8_with_labels()
    return _choose(pixels, batch_size, "digits", generator)


def digits_8x8_with_labels() -> tuple[Tensor, Tensor]:
    """All digits, standardized over all pixels, of shape (1797, 64), and their labels of shape (1797,)."""
    images, labels = _digits()
    return ((images - images.mean()) / images.std()).flatten(1), labels


def _enlarged(images: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(images, size=IMAGE_SHAPE[1:], mode="bilinear", align_corners=False)


def _choose(images: Tensor, batch_size: int, what: str, generator: torch.Generator) -> Tensor:
    _check_batch_size(batch_size)
    if batch_size > len(images):
        raise ValueError(f"data.batch_size={batch_size} is too large: there are only {len(images)} {what}.")
    return images[torch.randperm(len(images), generator=generator)[:batch_size]]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}.")


@lru_cache(maxsize=1)
def _cifar10_pool(download: bool) -> Tensor:
    return torch.from_numpy(cifar10_files.load(train=True, limit=CIFAR10_POOL, download=download).images)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Images of shape (1797, 8, 8) with values in 0..16, and labels of shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'data=digits needs scikit-learn: pip install "gradscope-toolkit[digits]", or use data=noise to measure.'
        ) from error
    found = load_digits()
    return torch.from_numpy(found.images.astype(np.float32)), torch.from_numpy(found.target.astype(np.int64))
