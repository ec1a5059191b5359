"""Plain stacks of convolutions that differ in stride, padding or pooling, and mean field for their GSC.

Mean field (many channels, independent weights of mean 0): taps of a kernel are independent, so that the covariance of
two positions is handed on at the same displacement, and gradients add up over taps.  With He's variance a convolution
and its ReLU then keep GSC, whatever the stride; what changes it is a border with fewer taps, and pooling.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import nn

from gradscope import initializers

FloatArray = npt.NDArray[np.float64]

Mode = Literal["zeros", "reflect", "circular"]
# What each kind pads with and by how much, the stride of the first convolution of a stage, and the end of a stage.
KINDS: dict[str, tuple[Mode, int, int, str]] = {
    "circular": ("circular", 1, 1, "none"),
    "valid": ("zeros", 0, 1, "none"),
    "reflect": ("reflect", 1, 1, "none"),
    "zeros": ("zeros", 1, 1, "none"),
    "strided": ("circular", 1, 2, "none"),
    "max": ("circular", 1, 1, "max"),
    "average": ("circular", 1, 1, "average"),
}
KERNEL = 3
TAPS = 4  # of a window of pooling, 2 x 2


class Stack(nn.Sequential):
    """``stages`` times ``convs`` convolutions 3 x 3 with ReLU, He's weights, no biases, and the end of a stage.

    Layers are conv1, conv2, ... (each with its ReLU) and, in stacks that pool, pool1, ... after every stage.

    Arguments:
        kind: circular, valid, reflect, zeros (padding), strided (the first convolution of each stage has stride 2),
            max or average (2 x 2 pooling at the end of each stage); the last three on a torus.
        channels: Of every layer, and of the input.
        stages, convs: How many stages, and convolutions in each.
        generator: Source of the weights; kinds of one seed share them.

    Raises:
        ValueError: An unknown kind.
    """

    def __init__(
        self, *, kind: str, channels: int, stages: int, convs: int, generator: torch.Generator | None = None
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        mode, padding, stride, pool = KINDS[kind]
        layers = OrderedDict[str, nn.Module]()
        for stage in range(stages):
            for place in range(convs):
                conv = nn.Conv2d(
                    channels,
                    channels,
                    KERNEL,
                    stride=stride if place == 0 else 1,
                    padding=padding,
                    padding_mode=mode,
                    bias=False,
                )
                initializers.he(conv.weight, generator=generator)
                layers[f"conv{stage * convs + place + 1}"] = nn.Sequential(conv, nn.ReLU())
            if pool != "none":
                layers[f"pool{stage + 1}"] = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        super().__init__(layers)


def expected_log10_gsc(kind: str, *, stages: int, convs: int, side: int) -> FloatArray:
    """Mean field of log10 GSC to the output, of the input and every layer of a `Stack` on white noise of that side."""
    if kind == "zeros":
        return _zero_padding(stages * convs, side)
    pool = KINDS[kind][-1]
    if pool == "none":
        return np.zeros(stages * convs + 1)
    factors, c = list[float](), 0.0  # c: correlation of any two positions, before a layer
    for _ in range(stages):
        for place in range(convs):
            h, c = c, relu_correlation(c)
            factors.append(1.0)
            if place == convs - 1:
                into, of_pool, c = max_pooling(h) if pool == "max" else average_pooling(h)
                factors[-1] = into
                factors.append(of_pool)
    return np.append(np.cumsum(np.log10(factors[::-1]))[::-1], 0.0)


def relu_correlation(c: float) -> float:
    """E[relu(u) relu(v)] / E[relu(u)^2] for normal u, v of correlation c, the cosine after a layer of He's weights.

    Cho and Saul (2009), "Kernel methods for deep learning".
    """
    return (math.sqrt((1 - c) * (1 + c)) + (math.pi - math.acos(c)) * c) / math.pi


def average_pooling(c: float) -> tuple[float, float, float]:
    """Factors of GSC of the convolution before, and of 2 x 2 average pooling of relu(h); the cosine of two outputs.

    m = 4 taps of 1/m: |J|_F^2 / n = 1/m^2, and |x|^2 / |y|^2 = m^2 / (1 + (m - 1) rho) where two taps have the cosine
    rho; so the factor is 1 / (1 + (m - 1) rho), 1 for taps that are orthogonal and 1/m for equal ones.

    Arguments:
        c: Correlation of two pre-activations h.
    """
    rho = relu_correlation(c)
    sum_of_taps = 1 + (TAPS - 1) * rho
    return 1.0, 1 / sum_of_taps, TAPS * rho / sum_of_taps


def max_pooling(c: float) -> tuple[float, float, float]:
    """The same of 2 x 2 max pooling.

    |J|_F^2 / n = 1/m, for each output hands its gradient to one tap; |x|^2 / |y|^2 = m (1/2) / M with
    M = E[max(h_1 .. h_m, 0)^2], Var h = 1: the factor is 1 / (2 M).  That tap is positive with probability
    p = P(max h > 0) and not 1/2, so that the ReLU before lets pass 2 p as much.

    Given the part u that all taps share, h = sqrt(c) u + sqrt(1 - c) e, the m values e are independent.
    """
    u, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    t, widths = np.polynomial.legendre.leggauss(400)
    t, widths = 5 * (t + 1), 5 * widths  # 0 to 10 standard deviations
    below = special.ndtr((t[:, None] - math.sqrt(c) * u) / math.sqrt(1 - c)) ** TAPS  # P(max < t | u)
    none_positive = special.ndtr(-math.sqrt(c) * u / math.sqrt(1 - c)) ** TAPS
    mean = widths @ (1 - below)  # E[max(h, 0) | u]
    square = float(weights @ (2 * (widths * t) @ (1 - below)))
    p = 1 - float(weights @ none_positive)
    return 2 * p, 1 / (2 * square), float(weights @ mean**2) / square


def _zero_padding(depth: int, side: int) -> FloatArray:
    """From the number of taps that lie inside: lengths fall at the border, gradients do, and they fall together.

    GSC(k, L) = mean(g_k) mean(s_k) / mean(g_k s_k), with s_k the mean square of layer k by position, s_k = P s_(k-1),
    and g_k that of the gradient, P^T ... P^T 1; P_ij is the part of the taps of i that are on j.
    """
    taps = np.eye(side, k=-1) + np.eye(side) + np.eye(side, k=1)
    squares, gradients = [np.ones((side, side))], [np.ones((side, side))]
    for _ in range(depth):  # P is a product of rows and columns, and symmetric
        squares.append(taps @ squares[-1] @ taps / KERNEL**2)
        gradients.append(taps @ gradients[-1] @ taps / KERNEL**2)
    pairs = zip(squares, reversed(gradients), strict=True)
    return np.array([math.log10(g.mean() * s.mean() / (g * s).mean()) for s, g in pairs])
