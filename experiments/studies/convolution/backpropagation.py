"""Convolution and pooling with their gradients, written in NumPy to be read beside the formulas.

Images have shape (B, C, H, W) and kernels (K, C, h, w).  A "convolution" is a cross-correlation, as in torch: the
kernel is flipped only in the backward pass.  L is a scalar loss. All gradients are computed from G = dL/dY.

    Y[n, k, i, j] = b[k] + sum_c sum_u sum_v W[k, c, u, v] X[n, c, i s + u d - p, j s + v d - p]

with stride s, dilation d and padding p, and X = 0 outside the image.  Only the taps (u, v) of a kernel need a loop.

Reference: V. Dumoulin and F. Visin (2016), "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from gradscope.frames import observed

SIDE, CHANNELS, FILTERS, KERNEL = 11, 3, 4, 3
STRIDES, PADDINGS, DILATIONS, WINDOWS = (1, 2, 3), (0, 1), (1, 2), (2, 3)

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Size = tuple[int, ...]  # rows and columns


def conv2d(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """Y = X * W + b, (B, C, H, W) -> (B, K, H', W') with H' = floor((H + 2 p - d (h - 1) - 1) / s) + 1."""
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"Images (B, C, H, W) and kernels (K, C, h, w) must have the same number of channels C, got shapes "
            f"{x.shape} and {weight.shape}."
        )
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(
            "stride and dilation must be at least 1 and padding at least 0; "
            f"got stride={stride}, dilation={dilation}, padding={padding}."
        )
    height, width = (length + 2 * padding for length in x.shape[2:])
    if min(_output_size(np.empty((1, 1, height, width)), weight.shape[2:], 1, dilation)) < 1:
        raise ValueError(
            f"A kernel of {weight.shape[2:]} with dilation {dilation} is larger than the padded image, "
            f"{height} x {width}; increase the padding."
        )
    y = _correlate(_padded(x, padding), weight, stride, dilation)
    return y if bias is None else y + bias[:, None, None]


def conv2d_input_gradient(
    gradient: Array, weight: Array, shape: tuple[int, ...], *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """dL/dX: a full correlation of G with the flipped kernel, whose channels K and C are swapped.

        dL/dX[n, c, y, x] = sum_k sum_u sum_v W[k, c, u, v] G'[n, k, y + p - u d, x + p - v d]

    G' is G with s - 1 zeros between its entries.  ``shape`` is the shape of X.  Pixels that no window reaches get 0.
    """
    down, across = (dilation * (side - 1) for side in weight.shape[2:])
    height, width = ((length - 1) * stride + 1 for length in gradient.shape[2:])
    full = np.zeros((*gradient.shape[:2], height + 2 * down, width + 2 * across))
    full[:, :, down : down + height : stride, across : across + width : stride] = gradient
    flipped = weight[:, :, ::-1, ::-1].swapaxes(0, 1)  # (C, K, h, w)
    reached = _correlate(full, flipped, 1, dilation)
    padded = _padded(np.zeros(shape), padding)
    padded[:, :, : reached.shape[2], : reached.shape[3]] = reached
    return _cropped(padded, padding)


def conv2d_weight_gradient(
    gradient: Array, x: Array, kernel_size: tuple[int, int], *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """dL/dW, (K, C, h, w): the correlation of the input with G. G is used as a kernel with dilation s and stride d.

    dL/dW[k, c, u, v] = sum_n sum_i sum_j G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p]
    """
    result = np.empty((gradient.shape[1], x.shape[1], *kernel_size))
    for (u, v), window in _windows(_padded(x, padding), kernel_size, gradient.shape[2:], stride, dilation):
        result[:, :, u, v] = np.tensordot(gradient, window, axes=((0, 2, 3), (0, 2, 3)))
    return result


def conv2d_bias_gradient(gradient: Array) -> Array:
    """dL/db, (K,): the sum of G over samples and positions."""
    return np.asarray(gradient.sum(axis=(0, 2, 3)))


def average_pool2d(x: Array, size: int, *, stride: int | None = None, padding: int = 0) -> Array:
    """The mean of each window of m = size^2 pixels. Padding counts as zeros, as in torch by default.

    Y[n, c, i, j] = 1/m sum_u sum_v X[n, c, i s + u - p, j s + v - p], where the stride s is ``size`` by default
    """
    return np.asarray(_pool_taps(x, size, stride, padding, 0.0).mean(axis=0))


def average_pool2d_gradient(
    gradient: Array, shape: tuple[int, ...], size: int, *, stride: int | None = None, padding: int = 0
) -> Array:
    """dL/dX of `average_pool2d`: every pixel receives G / m from each window that contains the pixel."""
    return _scattered([gradient / size**2] * size**2, shape, size, stride, padding)


def max_pool2d(x: Array, size: int, *, stride: int | None = None, padding: int = 0) -> tuple[Array, Indices]:
    """The largest pixel of each window, and the number u size + v of its tap. Both have shape (B, C, H', W').

    If pixels are equal, the first in row-major order counts, as in torch. Padding is never the largest.
    """
    taps = _pool_taps(x, size, stride, padding, -np.inf)
    winners = taps.argmax(axis=0)
    return np.take_along_axis(taps, winners[None], axis=0)[0], winners


def max_pool2d_gradient(
    gradient: Array, winners: Indices, shape: tuple[int, ...], size: int, *, stride: int | None = None, padding: int = 0
) -> Array:
    """dL/dX of `max_pool2d`: a pixel receives G from each window in which the pixel is the largest."""
    parts = [np.where(winners == tap, gradient, 0.0) for tap in range(size**2)]
    return _scattered(parts, shape, size, stride, padding)


def _correlate(x: Array, weight: Array, stride: int, dilation: int) -> Array:
    """Cross-correlation without padding or bias: one matrix product over channels for each tap."""
    size = _output_size(x, weight.shape[2:], stride, dilation)
    y = np.zeros((len(x), len(weight), *size))
    for (u, v), window in _windows(x, weight.shape[2:], size, stride, dilation):
        y += np.einsum("kc,ncij->nkij", weight[:, :, u, v], window, optimize=True)
    return y


def _windows(
    x: Array, kernel_size: Size, size: Size, stride: int, dilation: int
) -> Iterator[tuple[tuple[int, int], Array]]:
    """Each tap (u, v) with the input pixels that it multiplies, one per output pixel, as a view (B, C, H', W')."""
    height, width = ((outputs - 1) * stride + 1 for outputs in size)
    for u, v in itertools.product(*map(range, kernel_size)):
        top, left = u * dilation, v * dilation
        yield (u, v), x[:, :, top : top + height : stride, left : left + width : stride]


def _output_size(x: Array, kernel_size: Size, stride: int, dilation: int) -> Size:
    sides = zip(x.shape[2:], kernel_size, strict=True)
    return tuple((length - dilation * (side - 1) - 1) // stride + 1 for length, side in sides)


def _pool_taps(x: Array, size: int, stride: int | None, padding: int, fill: float) -> Array:
    """The pixels that each tap of a window reads, as an array of shape (size^2, B, C, H', W')."""
    if size < 1 or (stride is not None and stride < 1) or not 0 <= padding <= size // 2:
        raise ValueError(
            f"Pooling needs size and stride of at least 1 and a padding of at most half the size; got size={size}, "
            f"stride={stride}, padding={padding}."
        )
    padded = _padded(x, padding, fill)
    if min(padded.shape[2:]) < size:
        raise ValueError(f"A window of {size} x {size} is larger than the padded image, {padded.shape[2:]}.")
    step = stride or size
    windows = _windows(padded, (size, size), _output_size(padded, (size, size), step, 1), step, 1)
    return np.stack([window for _, window in windows])


def _scattered(parts: list[Array], shape: tuple[int, ...], size: int, stride: int | None, padding: int) -> Array:
    """The adjoint of `_pool_taps`: ``parts[tap]`` is added to the pixels that this tap has read."""
    padded = _padded(np.zeros(shape), padding)
    windows = _windows(padded, (size, size), parts[0].shape[2:], stride or size, 1)
    for part, (_, window) in zip(parts, windows, strict=True):
        window += part  # Windows are views of padded.
    return _cropped(padded, padding)


def _padded(x: Array, padding: int, fill: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), constant_values=fill)


def _cropped(x: Array, padding: int) -> Array:
    return x[:, :, padding : x.shape[2] - padding, padding : x.shape[3] - padding]


def compared(generator: torch.Generator) -> pd.DataFrame:
    """The largest difference between each gradient by hand and by torch, divided by the largest entry, in float64.

    Cases: all `STRIDES` and `PADDINGS`, with all `DILATIONS` (convolution) or `WINDOWS` (pooling), on random images.
    """
    found: dict[str, list[float]] = {}
    noise = partial(torch.randn, dtype=torch.float64, generator=generator)

    def note(expected: list[Array], **by_hand: Array) -> None:
        for theirs, (name, ours) in zip(expected, by_hand.items(), strict=True):
            error = np.abs(ours - theirs).max() / np.abs(theirs).max()
            found.setdefault(name, []).append(float(error))

    images, kernels = (2, CHANNELS, SIDE, SIDE), (FILTERS, CHANNELS, KERNEL, KERNEL)
    for stride, padding, dilation in itertools.product(STRIDES, PADDINGS, DILATIONS):
        how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        x, weight, bias = (noise(shape).numpy() for shape in (images, kernels, (FILTERS,)))
        g, expected = _torch(partial(functional.conv2d, **how), x, weight, bias)
        note(expected, **{
            "convolution, input": conv2d_input_gradient(g, weight, x.shape, **how),
            "convolution, kernel": conv2d_weight_gradient(g, x, (KERNEL, KERNEL), **how),
            "convolution, bias": conv2d_bias_gradient(g),
        })  # fmt: skip
    for stride, padding, size in itertools.product(STRIDES, PADDINGS, WINDOWS):
        how = {"stride": stride, "padding": padding}
        x = noise(images).numpy()
        g, expected = _torch(partial(functional.avg_pool2d, kernel_size=size, **how), x)
        note(expected, **{"average pooling": average_pool2d_gradient(g, x.shape, size, **how)})
        g, expected = _torch(partial(functional.max_pool2d, kernel_size=size, **how), x)
        winners = max_pool2d(x, size, **how)[1]
        note(expected, **{"max pooling": max_pool2d_gradient(g, winners, x.shape, size, **how)})
    parts = [
        observed("backpropagation_error", max(errors), layer=name, index=index, num_samples=len(errors))
        for index, (name, errors) in enumerate(found.items())
    ]
    return pd.concat(parts, ignore_index=True)


def _torch(function: Callable[..., Tensor], *arrays: Array) -> tuple[Array, list[Array]]:
    """A gradient of the output (a sine wave over the entries). From this, torch computes gradients of the arrays."""
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    y = function(*tensors)
    g = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).sin().reshape(y.shape)
    gradients = torch.autograd.grad(y, tensors, g)
    return g.numpy(), [gradient.numpy() for gradient in gradients]
