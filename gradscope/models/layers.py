"""What all models share: layers whose weights an initializer fills later."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

from gradscope import initializers

MOST_WEIGHTS = 2**28  # of a layer: 1 GB in float32
Layer = TypeVar("Layer", bound=nn.Module)


def unfilled(kind: type[Layer], *sizes: int, **options: Any) -> Layer:
    """A CPU layer with uninitialized parameters; for small layers twice as fast as `torch.nn.utils.skip_init`."""
    if math.prod(sizes) > MOST_WEIGHTS:
        raise ValueError(
            f"A layer of sizes {sizes} has more than {MOST_WEIGHTS:,} weights: choose a smaller width, in_features, "
            "in_channels, out_features or num_classes."
        )
    layer = kind(*sizes, **options, device="meta")
    for name, parameter in tuple(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")))
    return layer


def fill(model: nn.Module, init: str, generator: torch.Generator | None) -> None:
    """Fill the weights of all linear and convolutional layers with one initializer, and their biases with zeros."""
    for layer in initializers.weighted(model).values():
        initializers.BY_NAME[init](layer.weight, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
