"""Weight initializations by name, each filling one weight tensor in place from an explicit generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradscope.probes import orthonormal

Initializer = Callable[..., Tensor]


def he(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 2 / fan_in, which keeps the length of signals through ReLU.

    He et al. (2015), arXiv:1502.01852.  ``weight``: (out, in, *kernel); fan_in = in times the kernel's area.
    """
    return _normal(weight, 2 / _fans(weight)[0], generator)


def lecun(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 1 / fan_in, for SELU, tanh and linear nets (LeCun et al. 1998, "Efficient BackProp")."""
    return _normal(weight, 1 / _fans(weight)[0], generator)


def xavier(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010)."""
    fan_in, fan_out = _fans(weight)
    return _normal(weight, 2 / (fan_in + fan_out), generator)


def orthogonal(weight: Tensor, *, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """``gain`` times a Haar-distributed matrix (out, in * kernel) with orthonormal rows or columns.

    Saxe, McClelland and Ganguli (2013), arXiv:1312.6120.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    short, long = sorted((rows, columns))
    directions = orthonormal(short, long, generator=generator, device=weight.device) / math.sqrt(long)
    return _fill(weight, gain * (directions if rows <= columns else directions.T).reshape(weight.shape))


def looks_linear(
    weight: Tensor, *, mirror_input: bool = True, mirror_output: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Orthogonal blocks that make a ReLU network a linear map at initialization.

    Balduzzi et al. (2017), "The shattered gradients problem", arXiv:1702.08591.  Halves of each layer
    mirror each other, relu(z) and relu(-z), and their difference is z.  With W orthogonal:

        inner layer                                 [[W, -W], [-W, W]]
        first layer (``mirror_input=False``)        [[W], [-W]]
        last layer (``mirror_output=False``)        [[W, -W]]

    Raises:
        ValueError: A mirrored side has an odd number of features.
    """
    rows, columns = weight.shape
    if (mirror_output and rows % 2) or (mirror_input and columns % 2):
        raise ValueError(
            f"looks_linear halves the features, so mirrored sides must be even; got a weight of {rows} x {columns}."
        )
    block = torch.empty(rows // (1 + mirror_output), columns // (1 + mirror_input), dtype=torch.float64)
    orthogonal(block, generator=generator)
    if mirror_input:
        block = torch.cat([block, -block], dim=1)
    if mirror_output:
        block = torch.cat([block, -block], dim=0)
    return _fill(weight, block)


def auto(activation: str) -> Initializer:
    """The initializer that keeps signals of a wide network stable under an activation.

    =================================  =================================================================
    relu, leaky_relu, elu, gelu, silu  `he`: keeps the length for relu; the usual choice for its relatives
    selu, tanh, sigmoid, linear        `lecun`: unit variance is a fixed point for selu and linear
    =================================  =================================================================
    """
    return he if activation in ("relu", "leaky_relu", "elu", "gelu", "silu") else lecun


BY_NAME: dict[str, Initializer] = {
    "he": he,
    "lecun": lecun,
    "xavier": xavier,
    "orthogonal": orthogonal,
    "looks_linear": looks_linear,
}


def _fans(weight: Tensor) -> tuple[int, int]:
    if weight.ndim < 2:
        raise ValueError(f"A weight has at least two dimensions (out, in, ...), got shape {tuple(weight.shape)}.")
    area = math.prod(weight.shape[2:])
    return weight.shape[1] * area, weight.shape[0] * area


def _normal(weight: Tensor, variance: float, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else weight.device
    return _fill(weight, torch.randn(weight.shape, generator=generator, device=source) * math.sqrt(variance))


def _fill(weight: Tensor, values: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.copy_(values)
