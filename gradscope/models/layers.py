"""What all models share: checks of sizes, and layers whose weights an initializer fills later."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from gradscope import initializers

Layer = TypeVar("Layer", bound=nn.Module)


def check_sizes(**sizes: object) -> None:
    """Raise TypeError or ValueError for the first size that is not an integer of at least 1; the message names it."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} must be an integer of at least 1, got {size!r}.")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")


def unfilled(kind: type[Layer], *sizes: int, **options: Any) -> Layer:
    """A CPU layer with uninitialized parameters; for small layers twice as fast as `torch.nn.utils.skip_init`."""
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
