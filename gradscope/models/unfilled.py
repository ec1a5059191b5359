"""Layers whose parameters are not drawn, because an initializer fills them next."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def unfilled(kind: type[Layer], *sizes: int, **options: Any) -> Layer:
    """A layer such as `torch.nn.Linear` on the CPU, with memory of any content in place of weights, and no random
    number drawn.

    `torch.nn.utils.skip_init` makes the same; for small layers it takes twice as long.
    """
    layer = kind(*sizes, **options, device="meta")
    for name, parameter in tuple(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")))
    return layer
