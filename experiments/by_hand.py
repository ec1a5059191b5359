"""The gradients of `experiments.backpropagation` beside torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from experiments import backpropagation as bp
from gradscope.frames import observed

SIDE, CHANNELS, FILTERS, KERNEL = 11, 3, 4, 3
STRIDES, PADDINGS, DILATIONS, WINDOWS = (1, 2, 3), (0, 1), (1, 2), (2, 3)


def compared(generator: torch.Generator) -> pd.DataFrame:
    """Largest difference between a gradient by hand and torch's, as a part of its largest entry; in float64.

    Of convolutions and poolings of all `STRIDES`, `PADDINGS`, and `DILATIONS` or `WINDOWS`, on random pictures.
    """
    found: dict[str, list[float]] = {}
    for stride, padding, dilation in itertools.product(STRIDES, PADDINGS, DILATIONS):
        how = {"stride": stride, "padding": padding, "dilation": dilation}
        x, weight, bias = (_noise(shape, generator) for shape in (
            (2, CHANNELS, SIDE, SIDE), (FILTERS, CHANNELS, KERNEL, KERNEL), (FILTERS,),
        ))  # fmt: skip
        g, expected = _torch(lambda *given, how=how: functional.conv2d(*given, **how), x, weight, bias)
        _note(found, "convolution, input", bp.conv2d_input_gradient(g, weight, x.shape, **how), expected[0])
        _note(found, "convolution, kernel", bp.conv2d_weight_gradient(g, x, (KERNEL, KERNEL), **how), expected[1])
        _note(found, "convolution, bias", bp.conv2d_bias_gradient(g), expected[2])
    for stride, padding, size in itertools.product(STRIDES, PADDINGS, WINDOWS):
        how = {"stride": stride, "padding": padding}
        x = _noise((2, CHANNELS, SIDE, SIDE), generator)
        g, expected = _torch(lambda x, how=how, size=size: functional.avg_pool2d(x, size, **how), x)
        _note(found, "average pooling", bp.average_pool2d_gradient(g, x.shape, size, **how), expected[0])
        g, expected = _torch(lambda x, how=how, size=size: functional.max_pool2d(x, size, **how), x)
        _, winners = bp.max_pool2d(x, size, **how)
        _note(found, "max pooling", bp.max_pool2d_gradient(g, winners, x.shape, size, **how), expected[0])
    parts = [
        observed("backpropagation_error", max(errors), layer=name, index=index, num_samples=len(errors))
        for index, (name, errors) in enumerate(found.items())
    ]
    return pd.concat(parts, ignore_index=True)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> bp.Array:
    return np.asarray(torch.randn(shape, dtype=torch.float64, generator=generator).numpy())


def _torch(function: Callable[..., Tensor], *arrays: bp.Array) -> tuple[bp.Array, list[bp.Array]]:
    """A gradient of the output, a wave over its entries, and torch's gradients of the arrays from it."""
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    y = function(*tensors)
    g = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).sin().reshape(y.shape)
    gradients = torch.autograd.grad(y, tensors, g)
    return g.numpy(), [gradient.numpy() for gradient in gradients]


def _note(found: dict[str, list[float]], name: str, by_hand: bp.Array, expected: bp.Array) -> None:
    found.setdefault(name, []).append(float(np.abs(by_hand - expected).max() / np.abs(expected).max()))
