"""A whole data set of images on the device, as bytes, and batches of it made there; no worker processes.

Every random choice is a function of (seed, epoch or step), not of what was drawn before, so that a run that is resumed
in the middle of an epoch sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments import seeds
from experiments.data import cifar10_files
from experiments.data.batches import CIFAR10_MEAN, CIFAR10_STD, digits_with_labels
from experiments.files import written

DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3235,) * 3
WHOLE = slice(None)


@dataclass(frozen=True)
class Augmentation:
    """``flip`` left and right; ``crop``: shift by up to so many pixels, padded with zeros; ``cutout``: side of a square
    of zeros at a random place."""

    flip: bool = True
    crop: int = 0
    cutout: int = 0

    def __call__(self, x: Tensor, generator: torch.Generator, part: slice = WHOLE, whole: int | None = None) -> Tensor:
        """(B, C, H, W) of any dtype to the same, each sample by its own draw.

        ``part``: which samples of a batch of ``whole`` these are, so that shares of a batch see what the batch would.
        """
        num, _, height, width = x.shape
        device = x.device
        drawn = iter(self._drawn(whole or num, height, width, generator, part, device))
        if self.flip:
            x = torch.where(next(drawn)[:, None, None, None].bool(), x.flip(3), x)
        if self.crop:
            padded = functional.pad(x, [self.crop] * 4)
            rows = next(drawn)[:, None] + torch.arange(height, device=device)
            columns = next(drawn)[:, None] + torch.arange(width, device=device)
            sample = torch.arange(num, device=device)[:, None, None]
            # Indexing puts the channels last; they go back to their place without a copy.
            x = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.cutout:
            inside = torch.ones(num, height, width, dtype=torch.bool, device=device)
            for size, dim in ((height, 1), (width, 2)):
                start = next(drawn)[:, None]
                place = torch.arange(size, device=device)
                within = (place >= start) & (place < start + self.cutout)
                inside &= within[:, :, None] if dim == 1 else within[:, None, :]
            x = x.masked_fill(inside[:, None], 0)
        return x

    def _drawn(
        self, num: int, height: int, width: int, generator: torch.Generator, part: slice, device: torch.device
    ) -> Tensor:
        """What is drawn for each sample, one row a choice, on the device in one copy that is not waited for."""
        ranges = [(0, 2)] * self.flip + [(0, 2 * self.crop + 1)] * (2 * bool(self.crop))
        half = self.cutout // 2
        ranges += [(-half, height - half), (-half, width - half)] * bool(self.cutout)
        drawn = [torch.randint(low, high, (num,), generator=generator)[part] for low, high in ranges]
        return _sent(torch.stack(drawn), device) if drawn else torch.empty(0, num, device=device)


@dataclass(frozen=True)
class Images:
    """``images`` (N, C, H, W) uint8, ``labels`` (N,) int64; ``mean``, ``std`` by channel, of 0..1.

    ``device``: where batches are made; the images themselves lie there too, or in memory or a mapped file, from which
    each batch is then copied.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    on: torch.device | None = None

    @classmethod
    def cifar10(cls, *, train: bool, download: bool = False, limit: int | None = None) -> Images:
        """The training or the test set of CIFAR-10, (N, 3, 32, 32)."""
        split = cifar10_files.load(train=train, limit=limit, download=download)
        return cls(torch.from_numpy(split.images), torch.from_numpy(split.labels))

    @classmethod
    def digits(cls, *, train: bool) -> Images:
        """Three quarters of the handwritten digits of scikit-learn, or the rest, 3 x 32 x 32 pixels."""
        pixels, labels = digits_with_labels()
        chosen = torch.arange(len(pixels)) % 4 != 3 if train else torch.arange(len(pixels)) % 4 == 3
        return cls(pixels[chosen], labels[chosen], DIGITS_MEAN, DIGITS_STD)

    def to(self, device: torch.device) -> Images:
        """The same, with all images on the device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), on=None)

    def mapped(self, folder: Path, device: torch.device) -> Images:
        """The same, with images in a file of the folder that is mapped into memory, and batches on the device.

        The file holds the bytes of the images, nothing else, and is named by their digest, so that other images of the
        same number are never taken for these.  It is written unless it is there and whole.
        """
        content = self.images.contiguous().numpy()
        path = folder / f"{hashlib.blake2b(content.data, digest_size=8).hexdigest()}.bytes"
        if not (path.is_file() and path.stat().st_size == self.images.numel()):
            written(path, content.tofile)
        shape = (*self.images.shape,)
        # Copy on write, because torch has no tensors that may only be read.
        mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=shape))
        return replace(self, images=mapped, labels=self.labels, on=device)

    def split(self, num: int) -> tuple[Images, Images]:
        """All but the last ``num`` images, and those."""
        if not 0 < num < len(self):
            raise ValueError(f"holdout must be between 1 and {len(self) - 1} images, got {num!r}.")
        parts = (slice(None, len(self) - num), slice(len(self) - num, None))
        first, last = (replace(self, images=self.images[part], labels=self.labels[part]) for part in parts)
        return first, last

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.on or self.images.device

    def batch(
        self, indices: Tensor, augmentation: Augmentation | None = None, seed: int = 0, part: slice = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """Standardized float32 images and labels of those indices; augmentation draws from a generator of this seed.

        Standardized before it is augmented, so that padding and cutout are the mean color.  ``part``: only these
        samples of the batch, exactly as they are in the whole.
        """
        device = self.device
        chosen = indices[part].to(self.images.device)
        x, y = self.images[chosen], self.labels[chosen]
        if x.device != device:
            x, y = _sent(x, device), _sent(y, device)
        mean, std = self._moments
        x = (x.float() / 255 - mean) / std
        if augmentation is not None:
            x = augmentation(x, torch.Generator().manual_seed(seed), part, len(indices))
        return x, y

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the device, (1, C, 1, 1), made once and not at each step."""
        shape = (1, -1, *[1] * (self.images.ndim - 2))
        mean, std = (torch.tensor(values, device=self.device).reshape(shape) for values in (self.mean, self.std))
        return mean, std

    def order(self, seed: int, epoch: int) -> Tensor:
        """All indices, shuffled anew for each epoch."""
        generator = seeds.generator(seed, f"order of epoch {epoch}")
        return torch.randperm(len(self), generator=generator).to(self.images.device)


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """On the device; to CUDA from pinned memory, for only that is copied while the processor goes on."""
    pin = device.type == "cuda"
    return (value.pin_memory() if pin else value).to(device, non_blocking=pin)
