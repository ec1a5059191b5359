"""Statistics of pre-activations: what a nonlinearity receives, after any normalization.

Each is a function of the pre-activations (B, ...), of the slopes phi'(h) there, or of pre-activations and responses
phi(h) together; a neuron is one entry of the pre-activation (for a convolution one channel at one position).  Standard
errors are those of sampling the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradscope.estimates import Estimate
from gradscope.measures.samples import influenced, jackknife, sample_mean

PREACTIVATIONS, SLOPES, RESPONSES = "preactivations", "slopes", "responses"
BLOCK = 1 << 18  # numbers


@dataclass(frozen=True)
class PreactivationMean:
    """Mean over samples and neurons: mean_b mean_n h_bn."""

    quantity: ClassVar[str] = "preactivation_mean"
    of: ClassVar[str] = PREACTIVATIONS
    signed: ClassVar[bool] = True

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        return sample_mean(_neurons(preactivations).mean(dim=1))


@dataclass(frozen=True)
class PreactivationStd:
    """Standard deviation over the samples of each neuron, then the quadratic mean over neurons.

    sqrt(mean over neurons of Var_b[h_b]), Var with 1/B, so that batch normalization reads 1.  A nonlinearity that
    receives values of small deviation is nearly linear over the batch.
    """

    quantity: ClassVar[str] = "preactivation_std"
    of: ClassVar[str] = PREACTIVATIONS

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        total = torch.zeros(len(preactivations), dtype=torch.float64, device=preactivations.device)
        for h in _blocks(preactivations):
            h = h if h.dtype == torch.float64 else h.float()
            # From the first sample, not from zero: a mean far above the deviations would drown them in rounding.
            deviations = h - h[0]
            deviations -= deviations.mean(dim=0)
            total += torch.linalg.vector_norm(deviations, dim=1, dtype=torch.float64).square()
        squares = total / preactivations[0].numel()  # (B,), its mean is the mean variance
        return sample_mean(squares).sqrt()


@dataclass(frozen=True)
class SignDiversity:
    """Mean over neurons of min(P, N) / (P + N): P positive and N negative pre-activations among the samples.

    Range 0 to 0.5; low means that most neurons see one sign only, where ReLU-like functions are linear.  Exact zeros
    count as neither, and a neuron with nothing but zeros as 0.  For a balanced neuron the expectation is
    1/2 - sqrt(1 / (2 pi B)) at batch size B, 0.460 at B = 100.
    """

    quantity: ClassVar[str] = "sign_diversity"
    of: ClassVar[str] = PREACTIVATIONS

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        total = torch.zeros(len(preactivations), dtype=torch.float64, device=preactivations.device)
        for h in _blocks(preactivations):
            signs = h.sign() if h.dtype == torch.float64 else h.float().sign()
            nonzero, surplus = signs.abs(), signs.sum(dim=0)
            minority = torch.where(surplus <= 0, 1.0, -1.0).to(signs.dtype)
            weights = 0.5 / nonzero.sum(dim=0).clamp_min(1)  # a sample in the minority counts 1 / (P + N)
            total += (nonzero @ weights + signs @ (minority * weights)).double()
        return sample_mean(total * (len(preactivations) / preactivations[0].numel()))


@dataclass(frozen=True)
class Kurtosis:
    """Fourth moment over the squared second, of deviations from each neuron's mean, pooled over neurons.

    mean(d^4) / mean(d^2)^2 with d_bn = h_bn - mean_b h_bn; 3 where all neurons are Gaussian of one variance, more where
    tails are heavy or neurons differ in scale, and 0 where nothing varies.
    """

    quantity: ClassVar[str] = "kurtosis"
    of: ClassVar[str] = PREACTIVATIONS

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        h = _neurons(preactivations)
        h = h / h.abs().amax().clamp_min(torch.finfo(h.dtype).tiny)  # any scale has the same kurtosis
        squares = (h - h.mean(dim=0)).square()
        second, fourth = squares.mean(dim=1), squares.square().mean(dim=1)
        if not second.any():
            return Estimate.exact(0.0)
        value = float(fourth.mean() / second.mean() ** 2)
        return influenced(value, fourth / second.mean() ** 2 - 2 * value * second / second.mean())


@dataclass(frozen=True)
class EffectiveRank:
    """exp of the entropy of the normalized singular values of the batch as a B x neurons matrix (Roy, Vetterli 2007).

    exp(-sum p_i ln p_i), p_i = s_i / sum s; between 1 (all samples parallel: collapse) and min(B, neurons); 0 for a
    matrix of zeros.  Not centred.  Cost: the SVD of B x neurons, and 20 more for the error, a jackknife, which is some
    15 % too large.
    """

    quantity: ClassVar[str] = "effective_rank"
    of: ClassVar[str] = PREACTIVATIONS

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        return jackknife(_effective_rank, _neurons(preactivations))


@dataclass(frozen=True)
class SampleCosine:
    """Mean cosine between the pre-activations of two different samples: 1 is a collapsed domain.

    (|sum_b u_b|^2 - B) / (B (B - 1)) with u_b = h_b / |h_b|; a sample of zeros has no direction and counts as 0.
    """

    quantity: ClassVar[str] = "sample_cosine"
    of: ClassVar[str] = PREACTIVATIONS
    signed: ClassVar[bool] = True

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2."""
        h = _neurons(preactivations)
        h = h / h.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
        lengths = h.norm(dim=1, keepdim=True)
        units = h / lengths.where(lengths > 0, 1.0)
        others = units @ units.sum(dim=0) - units.square().sum(dim=1)  # sum of cosines with all other samples
        value = others.mean() / (len(h) - 1)
        return influenced(float(value), 2 * others / (len(h) - 1))


@dataclass(frozen=True)
class SaturatedFraction:
    """Fraction of samples and neurons where the nonlinearity is flat: |phi'(h)| < ``slope``.

    For ReLU that is the inactive half; for tanh, where |h| > 2.2 with the default of 0.05.
    """

    slope: float = 0.05
    quantity: ClassVar[str] = "saturated_fraction"
    of: ClassVar[str] = SLOPES

    def __call__(self, slopes: Tensor) -> Estimate:
        """``slopes``: phi'(h), (B, ...), B >= 2."""
        return sample_mean((_neurons(slopes).abs() < self.slope).double().mean(dim=1))


@dataclass(frozen=True)
class DeadFraction:
    """Fraction of neurons where phi'(h) = 0 for every sample of the batch, so that no gradient passes.

    It falls as the batch grows.  Its error is unknown (null): no sample of the batch tells how rare the next one is.
    """

    quantity: ClassVar[str] = "dead_fraction"
    of: ClassVar[str] = SLOPES

    def __call__(self, slopes: Tensor) -> Estimate:
        """``slopes``: phi'(h), (B, ...), B >= 2."""
        # The largest, because torch is slow at comparing, and at "any" along the first dimension.
        blocks = (block if block.dtype == torch.float64 else block.float() for block in _blocks(slopes))
        alive = sum(int(block.abs().amax(dim=0).count_nonzero()) for block in blocks)
        return Estimate(1 - alive / slopes[0].numel(), None)


@dataclass(frozen=True)
class LinearFitError:
    """Part of the variance of phi(h) that no linear function of h explains: 0 where a layer is linear over the data.

    sum_n min_(a, c) E_b[(phi(h_bn) - a h_bn - c)^2] / sum_n Var_b[phi(h_bn)], a line for each neuron n; between 0 and
    1, and 0 where nothing varies.  It measures pseudo-linearity directly, where a small deviation or sign diversity of
    the pre-activations only makes it likely.  For h ~ N(0, 1): ReLU 0.2665, tanh 0.0697.

    The error is that of sampling the batch to first order; the fit itself takes two degrees of freedom a neuron, so
    that on B samples the value is about a factor 1 - 1/B too small.
    """

    quantity: ClassVar[str] = "linear_fit_error"
    of: ClassVar[str] = RESPONSES

    def __call__(self, responses: tuple[Tensor, Tensor]) -> Estimate:
        """``responses``: h and phi(h), both (B, ...), B >= 2."""
        h, a = (_neurons(values) for values in responses)
        h, a = h - h.mean(dim=0), a - a.mean(dim=0)
        variance = h.square().mean(dim=0)
        slope = (h * a).mean(dim=0) / variance.where(variance > 0, 1.0)
        left, total = (a - slope * h).square().sum(dim=1), a.square().sum(dim=1)  # (B,)
        if not total.any():
            return Estimate.exact(0.0)
        value = float(left.mean() / total.mean())
        # The fit is a minimum, so that to first order a sample does not move its line.
        return influenced(value, (left - value * total) / total.mean())


def _blocks(values: Tensor) -> Sequence[Tensor]:
    """(B, ...) as pieces (B, some neurons) that stay in the processor's cache."""
    flat = _flat(values)
    return flat.split(max(1, BLOCK // len(flat)), dim=1)


def _effective_rank(h: Tensor) -> float:
    values = torch.linalg.svdvals(h)
    if not values.any():
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def _neurons(values: Tensor) -> Tensor:
    """(B, ...) -> (B, neurons) in float64."""
    return _flat(values).double()


def _flat(values: Tensor) -> Tensor:
    """(B, ...) -> (B, neurons) as they are, in the order in which they lie in memory: neurons have no order."""
    if values.ndim < 2 or values.shape[0] < 2:
        raise ValueError(
            f"Statistics over samples need at least two of them, got pre-activations of shape {tuple(values.shape)}."
        )
    values = values.detach()
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
