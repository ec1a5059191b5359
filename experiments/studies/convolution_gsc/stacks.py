"""Plain stacks of convolutions that differ in stride, padding or pooling, and the mean field of their GSC.

Mean field assumes many channels and independent weights of mean 0. The taps of a kernel are then independent. So the
covariance of two positions follows from covariances in the previous layer, of positions with the same displacement.
Squared gradients add up over taps. With He's variance, convolution and ReLU keep GSC. Pooling and borders change GSC.
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
# For each kind: padding mode, padding width, stride of the first convolution of a stage, pooling after a stage.
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
TAPS = 4  # of a 2 x 2 pooling window


class Stack(nn.Sequential):
    """``stages`` stages of ``convs`` convolutions 3 x 3 with ReLU, He's weights and no biases; ``kind`` is in `KINDS`.

    The layers are conv1, conv2, ... (each with its ReLU), and with pooling also pool1, pool2, ... after the stages. The
    input and every layer have ``channels`` channels. All kinds with the same seed have the same weights.
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
                step = stride if place == 0 else 1
                conv = nn.Conv2d(channels, channels, KERNEL, step, padding, padding_mode=mode, bias=False)
                initializers.he(conv.weight, generator=generator)
                layers[f"conv{stage * convs + place + 1}"] = nn.Sequential(conv, nn.ReLU())
            if pool != "none":
                layers[f"pool{stage + 1}"] = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        super().__init__(layers)


def expected_log10_gsc(kind: str, *, stages: int, convs: int, side: int) -> FloatArray:
    """log10 GSC to the output in mean field, from the input (white noise, ``side`` pixels wide) and every layer."""
    if kind == "zeros":
        return _zero_padding(stages * convs, side)
    pool = KINDS[kind][-1]
    if pool == "none":
        return np.zeros(stages * convs + 1)
    factors, c = list[float](), 0.0  # c: correlation of two positions at the input of a layer
    for _ in range(stages):
        for _ in range(convs - 1):
            c = relu_correlation(c)
        into, of_pool, c = max_pooling(c) if pool == "max" else average_pooling(c)
        factors += [*[1.0] * (convs - 1), into, of_pool]
    return np.append(np.cumsum(np.log10(factors[::-1]))[::-1], 0.0)


def relu_correlation(c: float) -> float:
    """The cosine of two outputs of a layer with He's weights, E[relu(u) relu(v)] / E[relu(u)^2].

    u and v are pre-activations with correlation c. Y. Cho and L. Saul (2009), "Kernel methods for deep learning".
    """
    return (math.sqrt((1 - c) * (1 + c)) + (math.pi - math.acos(c)) * c) / math.pi


def average_pooling(c: float) -> tuple[float, float, float]:
    """Three numbers: factor of GSC of a convolution, factor of GSC of 2 x 2 average pooling, cosine of two outputs.

    Pooling averages m = 4 values relu(h), whose pre-activations h have the correlation c. Then |J|_F^2 / n = 1/m^2. If
    two taps have the cosine rho, |x|^2 / |y|^2 = m^2 / (1 + (m - 1) rho). The factor is 1 / (1 + (m - 1) rho).
    """
    rho = relu_correlation(c)
    sum_of_taps = 1 + (TAPS - 1) * rho
    return 1.0, 1 / sum_of_taps, TAPS * rho / sum_of_taps


def max_pooling(c: float) -> tuple[float, float, float]:
    """The same numbers as `average_pooling`, for 2 x 2 max pooling.

    |J|_F^2 / n = 1/m, because each output passes its gradient to one tap. |x|^2 / |y|^2 = m (1/2) / M with
    M = E[max(h_1 .. h_m, 0)^2] and Var h = 1, so the factor is 1 / (2 M). The chosen tap is positive with probability
    p = P(max h > 0) instead of 1/2, so the ReLU before the pooling passes 2 p times as much of a squared gradient.

    Taps share the variable u: h = sqrt(c) u + sqrt(1 - c) e. Given u, the m values e are independent.
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
    """log10 of GSC(k, L) = mean(g_k) mean(s_k) / mean(g_k s_k), s_k = P s_(k-1), g_k = P^T g_(k+1), s_0 = g_L = 1.

    s_k is the mean square of layer k at each position, and g_k the mean square of the gradient. P_ij is the fraction of
    the taps of position i that lie on position j. P is symmetric, so g_k = s_(L-k).
    """
    taps, squares = np.eye(side, k=-1) + np.eye(side) + np.eye(side, k=1), [np.ones((side, side))]
    for _ in range(depth):  # P is a product of a matrix for rows and one for columns
        squares.append(taps @ squares[-1] @ taps / KERNEL**2)
    pairs = zip(squares, reversed(squares), strict=True)
    return np.array([math.log10(g.mean() * s.mean() / (g * s).mean()) for s, g in pairs])
