"""Statistics of the gradient of a loss with respect to one layer's parameters.

g_b is the gradient of the loss of sample b (P,), g = mean_b g_b that of the mean loss, w the parameters.  Standard
errors are those of sampling the batch, by the delta method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradscope.estimates import Estimate
from gradscope.measures.samples import influenced

GRADIENTS = "gradients"


@dataclass(frozen=True)
class LayerGradient:
    """What is known of one layer's gradient, in float64.

    ``mean`` (P,): g.  ``weight`` (P,): w.  ``squares`` (B,): |g_b|^2.  ``projections`` (B,): <g_b, g>.
    ``unit_sums`` (G, P): sums of g_b / |g_b| over G groups of samples, the group of sample b being b mod G.
    """

    mean: Tensor
    weight: Tensor
    squares: Tensor
    projections: Tensor
    unit_sums: Tensor

    @property
    def norm(self) -> Estimate:
        """|g| with its sampling error; |g|^2 = mean_b <g_b, g>."""
        square = float(self.mean.square().sum())
        return influenced(square, 2 * (self.projections - square)).sqrt() if square else Estimate.exact(0.0)


@dataclass(frozen=True)
class GradientNorm:
    """|g|, the Euclidean norm."""

    quantity: ClassVar[str] = "gradient_norm"
    of: ClassVar[str] = GRADIENTS

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        return gradient.norm


@dataclass(frozen=True)
class GradientRms:
    """|g| / sqrt(P), the root mean square of an entry."""

    quantity: ClassVar[str] = "gradient_rms"
    of: ClassVar[str] = GRADIENTS

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        return gradient.norm.scaled(1 / math.sqrt(gradient.mean.numel()))


@dataclass(frozen=True)
class GradientZeroFraction:
    """Fraction of the entries of g that are exactly 0: parameters that no sample of the batch trains."""

    quantity: ClassVar[str] = "gradient_zero_fraction"
    of: ClassVar[str] = GRADIENTS

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """An exact number of this batch."""
        return Estimate.exact(float((gradient.mean == 0).double().mean()))


@dataclass(frozen=True)
class GradientToWeight:
    """|g| / |w|; infinite where all weights are 0."""

    quantity: ClassVar[str] = "gradient_to_weight"
    of: ClassVar[str] = GRADIENTS

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        length = float(gradient.weight.norm())
        return gradient.norm.scaled(1 / length) if length else Estimate.exact(math.inf)


@dataclass(frozen=True)
class UpdateToWeight:
    """``learning_rate`` |g| / |w|: the relative change of the parameters in one step of gradient descent."""

    learning_rate: float
    quantity: ClassVar[str] = "update_to_weight"
    of: ClassVar[str] = GRADIENTS

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}.")

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        return GradientToWeight()(gradient).scaled(self.learning_rate)


@dataclass(frozen=True)
class GradientCosine:
    """Mean cosine between the gradients of two different samples: (|sum_b u_b|^2 - M) / (M (M - 1)), u_b = g_b / |g_b|.

    1 where all samples pull the same way, 0 where they are orthogonal.  Only the M samples with a gradient count; 0
    where fewer than two have one.  The error is a delete-a-group jackknife.
    """

    quantity: ClassVar[str] = "gradient_cosine"
    of: ClassVar[str] = GRADIENTS
    signed: ClassVar[bool] = True

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        groups = len(gradient.unit_sums)
        nonzero = gradient.squares > 0
        members = [int(nonzero[group::groups].sum()) for group in range(groups)]
        total, count = gradient.unit_sums.sum(dim=0), sum(members)
        values = [
            _mean_cosine(total - part, count - num) for part, num in zip(gradient.unit_sums, members, strict=True)
        ]
        mean = sum(values) / groups
        variance = (groups - 1) / groups * sum((value - mean) ** 2 for value in values)
        return Estimate(_mean_cosine(total, count), math.sqrt(variance))


@dataclass(frozen=True)
class SignalToNoise:
    """|g|^2 / (sum_b |g_b - g|^2 / (B - 1)): the squared mean gradient over the variance of one sample's gradient.

    Its inverse is the simple noise scale of McCandlish et al. (2018), arXiv:1812.06162, up to the bias of |g|^2, which
    is 1/B of the noise.  Infinite where all samples agree.
    """

    quantity: ClassVar[str] = "signal_to_noise"
    of: ClassVar[str] = GRADIENTS

    def __call__(self, gradient: LayerGradient) -> Estimate:
        """B >= 2."""
        num, signal = len(gradient.squares), float(gradient.mean.square().sum())
        unbiased = num / (num - 1)
        noise = unbiased * float(gradient.squares.mean() - signal)
        if noise <= 0 or signal == 0:
            return Estimate.exact(math.inf if signal else 0.0)
        of_signal = 2 * (gradient.projections - signal)
        of_noise = unbiased * (gradient.squares - gradient.squares.mean() - of_signal)
        return influenced(signal / noise, (of_signal - signal / noise * of_noise) / noise)


def _mean_cosine(unit_sum: Tensor, count: int) -> float:
    return (float(unit_sum.square().sum()) - count) / (count * (count - 1)) if count > 1 else 0.0
