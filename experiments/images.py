"""A whole data set of images on the device, as bytes, and batches of it made there; no worker processes.

Every random choice is a function of (seed, epoch or step), not of what was drawn before, so that a run that is resumed
in the middle of an epoch sees exactly the batches that it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experiments import cifar10, run
from experiments.data import CIFAR10_MEAN, CIFAR10_STD


@dataclass(frozen=True)
class Augmentation:
    """``flip`` left and right; ``crop``: shift by up to so many pixels, padded with zeros; ``cutout``: side of a square
    of zeros at a random place."""

    flip: bool = True
    crop: int = 0
    cutout: int = 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) of any dtype to the same, each sample by its own draw."""
        num, _, height, width = x.shape
        device = x.device

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (num,), generator=generator, device=generator.device).to(device)

        if self.flip:
            x = torch.where(draw(0, 2)[:, None, None, None].bool(), x.flip(3), x)
        if self.crop:
            padded = functional.pad(x, [self.crop] * 4)
            rows = draw(0, 2 * self.crop + 1)[:, None] + torch.arange(height, device=device)
            columns = draw(0, 2 * self.crop + 1)[:, None] + torch.arange(width, device=device)
            sample = torch.arange(num, device=device)[:, None, None]
            # Indexing puts the channels last; they go back to their place without a copy.
            x = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.cutout:
            inside = torch.ones(num, height, width, dtype=torch.bool, device=device)
            for size, dim in ((height, 1), (width, 2)):
                start = draw(-(self.cutout // 2), size - self.cutout // 2)[:, None]
                place = torch.arange(size, device=device)
                within = (place >= start) & (place < start + self.cutout)
                inside &= within[:, :, None] if dim == 1 else within[:, None, :]
            x = x.masked_fill(inside[:, None], 0)
        return x


@dataclass(frozen=True)
class Images:
    """``images`` (N, C, H, W) uint8, ``labels`` (N,) int64, on one device; ``mean``, ``std`` by channel, of 0..1."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD

    @classmethod
    def cifar10(cls, *, train: bool, device: torch.device, download: bool = False, limit: int | None = None) -> Images:
        """The training or the test set."""
        split = cifar10.load(train=train, limit=limit, download=download)
        return cls(torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, augmentation: Augmentation | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Standardized float32 images and labels of those indices; augmentation draws from a generator of this seed.

        Standardized before it is augmented, so that padding and cutout are the mean color.
        """
        device = self.images.device
        x = self.images[indices].float()
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, std = (torch.tensor(values, device=device).reshape(shape) for values in (self.mean, self.std))
        x = (x / 255 - mean) / std
        if augmentation is not None:
            x = augmentation(x, torch.Generator().manual_seed(seed))
        return x, self.labels[indices]

    def order(self, seed: int, epoch: int) -> Tensor:
        """All indices, shuffled anew for each epoch."""
        generator = run.generator(seed, f"order of epoch {epoch}")
        return torch.randperm(len(self), generator=generator).to(self.images.device)
