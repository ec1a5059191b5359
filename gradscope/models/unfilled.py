"""Layers with uninitialized parameters, for an initializer to fill."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def unfilled(kind: type[Layer], *sizes: int, **options: Any) -> Layer:
    """A CPU layer such as `torch.nn.Linear` with uninitialized parameters; no random numbers are drawn.

    `torch.nn.utils.skip_init` does the same, but takes twice as long for small layers.
    """
    layer = kind(*sizes, **options, device="meta")
    for name, parameter in tuple(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")))
    return layer
