"""Statistics of the gradient of a loss with respect to the P parameters w of one layer.

g_b is the gradient of sample b's loss.  g = mean_b g_b is the gradient of the mean loss over B >= 2 samples.  Standard
errors are sampling errors over the batch, computed by the delta method unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gradscope.choices import Nonnegative, checked
from gradscope.estimates import Estimate, FloatArray
from gradscope.measures.samples import Statistic, jackknifed, mean_cosine, sums_of_units

GRADIENTS = "gradients"


@dataclass(frozen=True)
class LayerGradient:
    """Summary of the gradients of one layer in float64, from which all statistics of gradients are computed.

    Let g_b be the gradient of the loss of sample b, for B samples, with respect to the P parameters w of the layer.

    - ``mean`` (P,): g, the mean of g_b over b.  ``weight`` (P,): w.
    - ``squares`` (B,): |g_b|^2.  ``projections`` (B,): the inner products <g_b, g>.
    - ``unit_sums`` (G, P): sums of g_b / |g_b| over G groups of samples; sample b is in group b mod G.

    >>> LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), weight=torch.ones(2)).norm.value
    2.5
    """

    mean: Tensor
    weight: Tensor
    squares: Tensor
    projections: Tensor
    unit_sums: Tensor

    @classmethod
    def of(cls, gradients: Tensor, weight: Tensor) -> Self:
        """Return the summary of gradients (B, P) of B samples and of parameters (P,); each sample is its own group."""
        g = gradients.double()
        mean, lengths = g.mean(dim=0), g.norm(dim=1, keepdim=True)
        units = g / torch.where(lengths > 0, lengths, 1.0)
        return cls(mean, weight.double(), g.square().sum(dim=1), g @ mean, units)

    @property
    def norm(self) -> Estimate:
        """Norm |g| of the mean gradient, with its sampling error."""
        return GradientNorm()(self)

    @property
    def square(self) -> float:
        """Squared norm |g|^2 of the mean gradient."""
        return float(self.mean.square().sum())

    @cached_property
    def lengths(self) -> list[Tensor]:
        """The tensors that all statistics of norms share: (|g|^2, |w|, P), ``squares`` and ``projections``."""
        size = torch.full((), self.mean.numel(), dtype=self.mean.dtype, device=self.mean.device)
        return [torch.stack([self.mean.square().sum(), self.weight.norm(), size]), self.squares, self.projections]


class _OfLengths(Statistic):
    """Base class of the statistics of ``LayerGradient.lengths``."""

    def parts(self, gradient: LayerGradient) -> Sequence[Tensor]:
        return gradient.lengths


def _norm(lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
    """|g|, with its sampling error."""
    if not squares.any():  # the losses do not depend on these parameters
        return Estimate.exact(0.0)
    left_out = np.maximum(_squares_without_one(lengths[0], squares, projections), 0)
    return jackknifed(math.sqrt(lengths[0]), np.sqrt(left_out), length=True)


def _squares_without_one(square: float, squares: FloatArray, projections: FloatArray) -> FloatArray:
    """|g|^2 without one sample at a time, (B,)."""
    num = len(squares)
    left_out: FloatArray = (num**2 * square - 2 * num * projections + squares) / (num - 1) ** 2
    return left_out


class GradientNorm(_OfLengths, quantity="gradient_norm", of=GRADIENTS):
    """Euclidean norm |g| of the gradient g of the mean loss with respect to the parameters of a layer.

    >>> GradientNorm()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.ones(2))).value
    2.5
    """

    def estimate(self, lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
        return _norm(lengths, squares, projections)


class GradientRms(_OfLengths, quantity="gradient_rms", of=GRADIENTS):
    """Root mean square of the entries of a layer's gradient g, |g| / sqrt(P) for P parameters.

    >>> GradientRms()(LayerGradient.of(torch.full((2, 9), 0.5), torch.ones(9))).value
    0.5
    """

    def estimate(self, lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
        return _norm(lengths, squares, projections).scaled(1 / math.sqrt(lengths[2]))


class GradientZeroFraction(Statistic, quantity="gradient_zero_fraction", of=GRADIENTS):
    """Fraction of the entries of a layer's gradient that are exactly 0.

    >>> GradientZeroFraction()(LayerGradient.of(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.ones(2))).value
    0.5
    """

    def parts(self, gradient: LayerGradient) -> Sequence[Tensor]:
        return [(gradient.mean == 0).double().mean()]

    def estimate(self, fraction: FloatArray) -> Estimate:
        return Estimate.exact(float(fraction))


class GradientToWeight(_OfLengths, quantity="gradient_to_weight", of=GRADIENTS):
    """Norm of a layer's gradient divided by the norm of its weights, |g| / |w|; infinite if all weights are 0.

    >>> GradientToWeight()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([3.0, 4.0]))).value
    0.5
    """

    def estimate(self, lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
        weight = float(lengths[1])
        return _norm(lengths, squares, projections).scaled(1 / weight) if weight else Estimate.exact(math.inf)


@checked
@dataclass(frozen=True)
class UpdateToWeight(GradientToWeight, quantity="update_to_weight", of=GRADIENTS):
    """Relative change of a layer's parameters w in one step of gradient descent, ``learning_rate`` |g| / |w|.

    >>> gradient = LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([3.0, 4.0]))
    >>> UpdateToWeight(learning_rate=0.5)(gradient).value
    0.25
    """

    learning_rate: Nonnegative

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}.")

    def estimate(self, lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
        return super().estimate(lengths, squares, projections).scaled(self.learning_rate)


class GradientCosine(Statistic, quantity="gradient_cosine", of=GRADIENTS, signed=True):
    """Mean cosine between the gradients g_b of two different samples b, with respect to a layer's parameters.

        (|sum_b u_b|^2 - M) / (M (M - 1)) with u_b = g_b / |g_b|, over the M samples with a nonzero gradient

    The value is 1 if all gradients are parallel, and 0 if all are orthogonal or M < 2.  The standard error is that of a
    jackknife, which leaves out one group of samples at a time.

    >>> round(GradientCosine()(LayerGradient.of(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), torch.ones(2))).value, 6)
    0.96
    """

    def parts(self, gradient: LayerGradient) -> Sequence[Tensor]:
        return [*sums_of_units([gradient.unit_sums], gradient.unit_sums[:, 0]), gradient.squares]

    def estimate(self, whole: FloatArray, left_out: FloatArray, squares: FloatArray) -> Estimate:
        groups = len(left_out)
        members = np.array([np.count_nonzero(squares[group::groups] > 0) for group in range(groups)])
        return mean_cosine(whole, left_out, members)


class SignalToNoise(_OfLengths, quantity="signal_to_noise", of=GRADIENTS):
    """Signal-to-noise ratio of a layer's gradient: squared norm of the mean divided by the variance over samples.

    It is |g|^2 / V with V = sum_b |g_b - g|^2 / (B - 1), for the gradients g_b of B samples and their mean g.  The
    value is infinite if all gradients are equal and not 0.  On average, |g|^2 is larger than the squared norm of the
    true gradient by V / B.  Apart from this bias, the inverse V / |g|^2 is the simple noise scale of McCandlish et al.
    (2018), arXiv:1812.06162.

    >>> SignalToNoise()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.ones(2))).value
    0.5
    """

    def estimate(self, lengths: FloatArray, squares: FloatArray, projections: FloatArray) -> Estimate:
        num, signal, total = len(squares), float(lengths[0]), float(squares.sum())
        noise = (total - num * signal) / (num - 1)
        if noise <= 0 or signal == 0:
            return Estimate.exact(math.inf if signal else 0.0)
        signals = _squares_without_one(signal, squares, projections)
        noises = (total - squares - (num - 1) * signals) / max(num - 2, 1)
        return jackknifed(signal / noise, signals / noises, length=True)
