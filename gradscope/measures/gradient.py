"""Statistics of the gradient of a loss with respect to the P parameters w of one layer.

g_b is the gradient of sample b's loss.  g = mean_b g_b is the gradient of the mean loss over B >= 2 samples.  Standard
errors are sampling errors over the batch, computed by the delta method unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradscope.estimates import Estimate
from gradscope.measures.samples import Statistic, jackknifed, mean_cosine

GRADIENTS = "gradients"


@dataclass(frozen=True)
class LayerGradient:
    """Summary of one layer's gradients in float64; the argument of every statistic in this module.

    ``mean`` (P,): g.  ``weight`` (P,): w.  ``squares`` (B,): |g_b|^2.  ``projections`` (B,): <g_b, g>.
    ``unit_sums`` (G, P): sums of g_b / |g_b| over G groups of samples; sample b is in group b mod G.

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
        """Summarize the gradients g_b (B, P) and the parameters w (P,), with every sample in a group of its own."""
        g = gradients.double()
        mean, lengths = g.mean(dim=0), g.norm(dim=1, keepdim=True)
        units = g / torch.where(lengths > 0, lengths, 1.0)
        return cls(mean, weight.double(), g.square().sum(dim=1), g @ mean, units)

    @property
    def norm(self) -> Estimate:
        """|g|, with its sampling error."""
        if not self.squares.any():  # the losses do not depend on these parameters
            return Estimate.exact(0.0)
        return jackknifed(math.sqrt(self.square), self.squares_without_one.clamp_min(0).sqrt(), length=True)

    @property
    def square(self) -> float:
        """|g|^2."""
        return float(self.mean.square().sum())

    @property
    def squares_without_one(self) -> Tensor:
        """|g|^2 without one sample at a time, (B,)."""
        num = len(self.squares)
        return (num**2 * self.square - 2 * num * self.projections + self.squares) / (num - 1) ** 2


class GradientNorm(Statistic, quantity="gradient_norm", of=GRADIENTS):
    """Euclidean norm |g|.

    >>> GradientNorm()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.ones(2))).value
    2.5
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        return gradient.norm


class GradientRms(Statistic, quantity="gradient_rms", of=GRADIENTS):
    """Root mean square of the entries of the gradient, |g| / sqrt(P).

    >>> GradientRms()(LayerGradient.of(torch.full((2, 9), 0.5), torch.ones(9))).value
    0.5
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        return gradient.norm.scaled(1 / math.sqrt(gradient.mean.numel()))


class GradientZeroFraction(Statistic, quantity="gradient_zero_fraction", of=GRADIENTS):
    """Fraction of the entries of g that are exactly 0.

    >>> GradientZeroFraction()(LayerGradient.of(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.ones(2))).value
    0.5
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        return Estimate.exact(float((gradient.mean == 0).double().mean()))


class GradientToWeight(Statistic, quantity="gradient_to_weight", of=GRADIENTS):
    """Norm of the gradient divided by the norm of the weights, |g| / |w|; infinite if all weights are 0.

    >>> GradientToWeight()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([3.0, 4.0]))).value
    0.5
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        length = float(gradient.weight.norm())
        return gradient.norm.scaled(1 / length) if length else Estimate.exact(math.inf)


@dataclass(frozen=True)
class UpdateToWeight(Statistic, quantity="update_to_weight", of=GRADIENTS):
    """Relative change of the parameters in one step of gradient descent, ``learning_rate`` |g| / |w|.

    >>> gradient = LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([3.0, 4.0]))
    >>> UpdateToWeight(learning_rate=0.5)(gradient).value
    0.25
    """

    learning_rate: float

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}.")

    def __call__(self, gradient: LayerGradient) -> Estimate:
        return GradientToWeight()(gradient).scaled(self.learning_rate)


class GradientCosine(Statistic, quantity="gradient_cosine", of=GRADIENTS, signed=True):
    """Mean cosine between the gradients of two different samples.

        (|sum_b u_b|^2 - M) / (M (M - 1)) with u_b = g_b / |g_b|, over the M samples with a nonzero gradient

    The value is 1 if all gradients are parallel, and 0 if all are orthogonal or M < 2.  The standard error comes from a
    delete-a-group jackknife.

    >>> round(GradientCosine()(LayerGradient.of(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), torch.ones(2))).value, 6)
    0.96
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        groups, nonzero = len(gradient.unit_sums), (gradient.squares > 0).double()
        members = torch.stack([nonzero[group::groups].sum() for group in range(groups)])
        return mean_cosine([gradient.unit_sums], members)


class SignalToNoise(Statistic, quantity="signal_to_noise", of=GRADIENTS):
    """|g|^2 divided by the variance of one sample's gradient, sum_b |g_b - g|^2 / (B - 1).

    The value is infinite if all gradients are equal and not 0.  |g|^2 is biased upward by this variance / B.  Apart
    from the bias, 1 / value is the simple noise scale of McCandlish et al. (2018), arXiv:1812.06162.

    >>> SignalToNoise()(LayerGradient.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.ones(2))).value
    0.5
    """

    def __call__(self, gradient: LayerGradient) -> Estimate:
        num, signal, squares = len(gradient.squares), gradient.square, gradient.squares.sum()
        noise = float(squares - num * signal) / (num - 1)
        if noise <= 0 or signal == 0:
            return Estimate.exact(math.inf if signal else 0.0)
        signals = gradient.squares_without_one
        noises = (squares - gradient.squares - (num - 1) * signals) / max(num - 2, 1)
        return jackknifed(signal / noise, signals / noises, length=True)
