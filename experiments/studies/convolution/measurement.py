"""Measure the symmetry of networks under translation, before and after training, and the stationarity of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.data.images import Images
from experiments.studies.convolution import backpropagation
from experiments.studies.convolution import stationarity as of_pixels
from experiments.training import loop
from experiments.training.recipe import Recipe
from gradscope import Estimate
from gradscope.frames import NETWORK, observed
from gradscope.measures import argmax_agreement, contrast, equivariance_error, invariance_error
from gradscope.models import MLP

SHIFTS = (1, 2, 3, 4, 6, 8)
CONVOLUTIONAL, CONNECTED = "alexnet_b", "fully_connected"
CONNECTED_DEPTH, CONNECTED_WIDTH = 2, 256
BEFORE, AFTER = "before", "after"
STAGES = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4")
RECTIFIED = {"relu1": "first ReLU", "relu2": "second ReLU"}  # maps that are pooled, and their names in figures
POOLINGS: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "subsampled": nn.MaxPool2d(1, stride=2),  # every second pixel of every second row
    "average": nn.AvgPool2d(2),
    "max": nn.MaxPool2d(2),
}
# The measured images are drawn from the first 10,000, the training images from the others.
MEASURED = 10_000
TESTED = 1_000
# A lower learning rate than in `Recipe`, which is meant for batches of 128.
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
DISTANCES = 17


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, train_steps: int, train_batch: int, num_images: int
) -> pd.DataFrame:
    """Errors of gradients by hand, errors of the symmetry of two networks, and the stationarity of images.

    Arguments:
        model: The AlexNet. A fully connected network is created in addition.
        x: Standardized images (B, 3, H, W) on which the networks are measured. B must be a multiple of four.
        train_steps, train_batch: Number of training steps, and batch size.
        num_images: Number of training images for the statistics of pixels.
    """
    by_hand = backpropagation.compared(generator)
    learned, tested = pictures()
    connected = MLP(
        depth=CONNECTED_DEPTH, width=CONNECTED_WIDTH, in_features=x[0].numel(), out_features=10, bias=True,
        generator=generator,
    )  # fmt: skip
    networks = {CONVOLUTIONAL: model, CONNECTED: connected}
    seed = int(torch.randint(2**31, (1,), generator=generator))
    recipe = Recipe(max_steps=train_steps, batch_size=train_batch, optimizer=SGD, seed=seed)
    chosen = torch.randperm(len(learned), generator=generator)[:num_images]
    gray = learned.images[chosen].double().mean(dim=1).numpy() / 255
    parts = [by_hand, stationarity(gray)]
    for name, network in networks.items():
        for training in (BEFORE, AFTER):
            if training == AFTER:
                loop.train(network.train(), learned, None, recipe)
                accuracy = loop.evaluate(network, tested)["test_accuracy"]
                parts.append(observed("test_accuracy", accuracy, network=name))
            found = [invariance(network.eval(), x)]
            if name == CONVOLUTIONAL:
                found += [equivariance(network, x), pooling(network, x)]
            parts.append(pd.concat(found).assign(network=name, training=training))
    return pd.concat(parts, ignore_index=True)


def pictures() -> tuple[Images, Images]:
    """Training images that are not among the measured images, and test images."""
    train = Images.cifar10(train=True)
    return train.split(len(train) - MEASURED)[1], Images.cifar10(train=False, limit=TESTED)


def invariance(network: nn.Module, x: Tensor) -> pd.DataFrame:
    """Change of outputs under shifts, fraction of images that keep their class, and distance between images."""
    measures = {"invariance_error": invariance_error, "class_agreement": argmax_agreement}
    parts = [
        _rows(name, [found(network, x, (shift, 0)) for shift in SHIFTS], shift=SHIFTS)
        for name, found in measures.items()
    ]
    return pd.concat([*parts, _rows("contrast", [contrast(network, x)])]).assign(num_samples=len(x))


def equivariance(network: nn.Module, x: Tensor) -> pd.DataFrame:
    """Errors of the maps of each stage: away from the border, and with a circular shift that all strides divide.

    Away from the border, mosaics of four images are used: the window that a late stage sees is larger than one image.
    """
    mosaics, parts = mosaic(x).contiguous(memory_format=torch.channels_last), []  # This layout is twice as fast.
    for index, stage in enumerate(STAGES):
        front = up_to(network, stage)
        errors = [equivariance_error(front, mosaics, (shift, 0)) for shift in SHIFTS]
        around = [equivariance_error(front, x, (SHIFTS[-1], 0), circular=True)]
        parts += [
            _rows("equivariance_error", errors, stage, index, shift=SHIFTS, num_samples=len(mosaics)),
            _rows("border_error", around, stage, index, shift=SHIFTS[-1], num_samples=len(x)),
        ]
    return pd.concat(parts)


def pooling(network: nn.Module, x: Tensor, shifts: Sequence[int] = (1,)) -> pd.DataFrame:
    """Change of maps under a shift of the input for each pooling, divided by the distance between two images."""
    parts = []
    for index, layer in enumerate(RECTIFIED):
        for name, pool in POOLINGS.items():
            front = nn.Sequential(up_to(network, layer), pool)
            distance = contrast(front, x).value
            changes = [invariance_error(front, x, (shift, 0)).value / distance for shift in shifts]
            rows = observed("pooled_change", changes, layer=layer, index=index, num_samples=len(x))
            parts.append(rows.assign(pooling=name, shift=shifts))
    return pd.concat(parts)


def _rows(
    quantity: str, estimates: Sequence[Estimate], layer: str = NETWORK, index: int = 0, **columns: Any
) -> pd.DataFrame:
    values, errors = [e.value for e in estimates], [e.stderr for e in estimates]
    return observed(quantity, values, stderr=errors, layer=layer, index=index).assign(**columns)


def up_to(network: nn.Module, layer: str) -> nn.Sequential:
    """The part of a network up to a layer, with the same weights."""
    names = [name for name, _ in network.named_children()]
    return nn.Sequential(*list(network.children())[: names.index(layer) + 1])


def mosaic(x: Tensor) -> Tensor:
    """Tiles of 2 x 2 images: (B, C, H, W) -> (B / 4, C, 2 H, 2 W)."""
    num, channels, height, width = x.shape
    tiles = x.reshape(num // 4, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(num // 4, channels, 2 * height, 2 * width)


def stationarity(images: npt.NDArray[np.float64]) -> pd.DataFrame:
    """How gray values of images (N, H, W) depend on the position; also profiles by row, column and distance."""
    first, second = (of_pixels.Moments.of(half) for half in (images[::2], images[1::2]))
    shape, explained = (images.shape[1], images.shape[2]), of_pixels.explained_by_displacement
    numbers = {
        "mean_spread": of_pixels.mean_spread(first, second),
        "variance_spread": of_pixels.variance_spread(first, second),
        "covariance_explained": explained(first.covariance, second.covariance, shape),
        "correlation_explained": explained(first.correlation, second.correlation, shape),
    }
    parts = [observed(quantity, value, num_samples=len(images)) for quantity, value in numbers.items()]
    for axis, name in enumerate(("row", "column")):
        mean, spread = of_pixels.along(first, second, axis, min(DISTANCES, *shape))
        profiles = {
            "pixel_mean": (first.mean + second.mean).mean(axis=1 - axis) / 2,
            "pixel_variance": (first.variance + second.variance).mean(axis=1 - axis) / 2,
            "correlation": mean,
            "correlation_spread": spread,
        }
        for quantity, values in profiles.items():
            parts.append(observed(quantity, values, axis=name, place=np.arange(len(values)), num_samples=len(images)))
    return pd.concat(parts)
