"""A data set of images, kept on the device as bytes.  Batches are built on the device, without worker processes.

Every random choice depends only on the seed and the epoch or step, so a resumed run sees the same batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments import seeds
from experiments.data import cifar10_files
from experiments.data.batches import CIFAR10_MEAN, CIFAR10_STD, digits_with_labels
from gradscope.files import written

DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3235,) * 3
WHOLE = slice(None)
IMAGE_DIMS = 4  # (batch, channels, height, width); other samples are not augmented


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each image.

    Arguments:
        flip: Mirror half of the images.
        crop: Largest shift in pixels; the border is filled with zeros.
        cutout: Side of a square of zeros at a random place, in pixels.
        alternate: Mirror half of the images in the first epoch and the other half in the next, in turn, instead of at
            random in every epoch.
        reflect: Fill the border of shifted images with their reflection.

    Raises:
        ValueError: A number is negative, or ``alternate`` is set without ``flip``.
    """

    flip: bool = True
    crop: int = 0
    cutout: int = 0
    alternate: bool = False
    reflect: bool = False

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.augmentation.{name} must be >= 0 pixels, got {getattr(self, name)}.")
        if self.alternate and not self.flip:
            raise ValueError("train.augmentation.alternate=true mirrors images and needs train.augmentation.flip=true.")

    def __call__(
        self, x: Tensor, generator: torch.Generator, part: slice = WHOLE, whole: int | None = None,
        mirrored: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Augment images (B, C, H, W).  A ``part`` of a batch of size ``whole`` changes as it does in that batch.

        ``mirrored`` (B,) says which images to mirror; None: half of them, at random.
        """
        num, _, height, width = x.shape
        device = x.device
        if self.reflect and self.crop >= min(height, width):
            raise ValueError(
                f"train.augmentation.crop={self.crop} with reflect=true must be smaller than the images, "
                f"{height} x {width} pixels."
            )
        drawn = iter(self._drawn(whole or num, height, width, generator, part, device, mirrored is None))
        if self.flip:
            mask = next(drawn).bool() if mirrored is None else mirrored
            x = torch.where(mask[:, None, None, None], x.flip(3), x)
        if self.crop:
            padded = functional.pad(x, [self.crop] * 4, mode="reflect" if self.reflect else "constant")
            rows = next(drawn)[:, None] + torch.arange(height, device=device)
            columns = next(drawn)[:, None] + torch.arange(width, device=device)
            sample = torch.arange(num, device=device)[:, None, None]
            # Indexing puts the channels last; `permute` moves them back without a copy.
            x = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.cutout:
            offsets = [torch.arange(size, device=device) - next(drawn)[:, None] for size in (height, width)]
            rows, columns = ((offset >= 0) & (offset < self.cutout) for offset in offsets)
            x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        return x

    def _drawn(
        self, num: int, height: int, width: int, generator: torch.Generator, part: slice, device: torch.device,
        flips: bool,
    ) -> Tensor:  # fmt: skip
        """All random numbers, on the device: one row per random choice, one column per sample."""
        ranges = [(0, 2)] * (self.flip and flips) + [(0, 2 * self.crop + 1)] * (2 * bool(self.crop))
        half = self.cutout // 2
        ranges += [(-half, height - half), (-half, width - half)] * bool(self.cutout)
        drawn = [torch.randint(low, high, (num,), generator=generator)[part] for low, high in ranges]
        return _sent(torch.stack(drawn), device) if drawn else torch.empty(0, num, device=device)


@dataclass(frozen=True)
class Images:
    """Images or other samples with labels.

    Arguments:
        images: (N, C, H, W) uint8; or (N, ...) float32, or (N, T) int64 tokens, neither scaled nor standardized.
        labels: (N,) int64; -1 if there are none.  Of tokens: (N, T), the token that follows each.
        mean, std: Per channel, for pixel values in 0..1.
        on: The device of the batches, if it differs from the device of the images.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    on: torch.device | None = None

    @classmethod
    def cifar10(cls, *, train: bool, download: bool = False, limit: int | None = None) -> Images:
        """The training or the test set of CIFAR-10, of shape (N, 3, 32, 32)."""
        split = cifar10_files.load(train=train, limit=limit, download=download)
        return cls(torch.from_numpy(split.images), torch.from_numpy(split.labels))

    @classmethod
    def digits(cls, *, train: bool) -> Images:
        """Three quarters of scikit-learn's digits for training, or the other quarter, of shape (N, 3, 32, 32)."""
        pixels, labels = digits_with_labels()
        chosen = torch.arange(len(pixels)) % 4 != 3 if train else torch.arange(len(pixels)) % 4 == 3
        return cls(pixels[chosen], labels[chosen], DIGITS_MEAN, DIGITS_STD)

    def to(self, device: torch.device) -> Images:
        """The same images, moved to the device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), on=None)

    def chosen(self, which: Tensor) -> Images:
        """The images of these indices, or of a mask."""
        return replace(self, images=self.images[which], labels=self.labels[which])

    def with_moments(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
        """The same images, to be standardized by other moments."""
        return replace(self, mean=mean, std=std)

    def mapped(self, folder: Path, device: torch.device) -> Images:
        """The same images in a memory-mapped file named by a hash of its bytes; batches are on ``device``."""
        content = self.images.contiguous().numpy()
        path = folder / f"{hashlib.blake2b(content.data, digest_size=8).hexdigest()}.bytes"
        if not (path.is_file() and path.stat().st_size == content.nbytes):
            written(path, content.tofile)
        # Copy on write, because torch has no read-only tensors.
        mapped = torch.from_numpy(np.memmap(path, dtype=content.dtype, mode="c", shape=content.shape))
        return replace(self, images=mapped, on=device)

    def split(self, num: int) -> tuple[Images, Images]:
        """Two sets: all images except the last ``num``, and the last ``num`` images."""
        if not 0 < num < len(self):
            raise ValueError(f"holdout must be between 1 and {len(self) - 1} images, got {num!r}.")
        parts = zip(*(values.tensor_split([len(self) - num]) for values in (self.images, self.labels)), strict=True)
        first, last = (replace(self, images=images, labels=labels) for images, labels in parts)
        return first, last

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.on or self.images.device

    def batch(
        self, indices: Tensor, augmentation: Augmentation | None = None, seed: int = 0, part: slice = WHOLE,
        mirrored: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Standardized float32 images and labels of these indices, augmented with random numbers from ``seed``.

        ``part`` selects some samples of the batch.  Their values are the same as in the whole batch.  ``mirrored`` says
        which images of the batch to mirror; None: half of them, at random.
        """
        chosen = indices[part].to(self.images.device)
        x, y = (_sent(values[chosen], self.device) for values in (self.images, self.labels))
        if x.dtype == torch.uint8:  # standardized first, so that padding and cutout have the mean color
            mean, std = self._moments
            x = (x.float() / 255 - mean) / std
        if augmentation is not None and x.ndim == IMAGE_DIMS:
            mirrored = None if mirrored is None else _sent(mirrored[part], self.device)
            x = augmentation(x, torch.Generator().manual_seed(seed), part, len(indices), mirrored)
        return x, y

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation on the device, each of shape (1, C, 1, 1)."""
        shape = (1, -1, *[1] * (self.images.ndim - 2))
        mean, std = (torch.tensor(values, device=self.device).reshape(shape) for values in (self.mean, self.std))
        return mean, std

    def order(self, seed: int, epoch: int) -> Tensor:
        """All indices, in a random order for each epoch."""
        order = torch.randperm(len(self), generator=seeds.generator(seed, f"order of epoch {epoch}"))
        return order.to(self.images.device)

    def mirrored(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Whether images are mirrored in an epoch: at random in epoch 0, then each image in every other epoch."""
        return _first_mirrored(len(self), seed, self.images.device)[indices] ^ bool(epoch % 2)


@lru_cache(maxsize=2)
def _first_mirrored(num: int, seed: int, device: torch.device) -> Tensor:
    return torch.randint(2, (num,), generator=seeds.generator(seed, "first flips")).bool().to(device)


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """The value on the device.  A copy to CUDA starts from pinned memory, so that the CPU does not wait."""
    pin = device.type == "cuda" and value.device.type == "cpu"
    return (value.pin_memory() if pin else value).to(device, non_blocking=pin)
