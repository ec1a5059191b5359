"""Statistics of pre-activations h: the inputs of a nonlinearity phi, after normalization if there is any.

``of`` names the argument of a statistic: the pre-activations (B, ...), the slopes phi'(h) (B, ...), or the pair of
pre-activations and responses phi(h).  The batch size B is at least 2.  A neuron is one entry of a sample's
pre-activation; in a convolution, one channel at one position.  Standard errors are sampling errors over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from gradscope.choices import Nonnegative, checked
from gradscope.estimates import Estimate, FloatArray
from gradscope.measures.samples import Statistic, jackknifed, mean_cosine, sample_mean, sums_of_units, without_one

PREACTIVATIONS, SLOPES, RESPONSES = "preactivations", "slopes", "responses"
BLOCK = 1 << 17  # entries of a block that fits into the processor's cache


class PreactivationMean(Statistic, quantity="preactivation_mean", of=PREACTIVATIONS, signed=True):
    """Mean over samples b and neurons n: mean_b mean_n h_bn.

    >>> PreactivationMean()(torch.tensor([[1.0, -2.0], [3.0, 4.0]])).value
    1.5
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        total = reduce(torch.add, (h.sum(dim=1) for h in _blocks(preactivations)))
        return [total / preactivations[0].numel()]

    def estimate(self, means: FloatArray) -> Estimate:
        return sample_mean(means, signed=True)


class PreactivationStd(Statistic, quantity="preactivation_std", of=PREACTIVATIONS):
    """Standard deviation over samples, as a root mean square over neurons: sqrt(mean_n Var_b[h_bn]); Var divides by B.

    The value is 1 after batch normalization.  A small value suggests that phi is nearly linear over the batch.

    >>> PreactivationStd()(torch.tensor([[0.0, 0.0], [2.0, 14.0]])).value
    5.0
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        total = _zeros(preactivations)
        for h in _blocks(preactivations):
            h -= h[:1].clone()  # otherwise rounding of a large mean spoils small deviations
            h -= h.mean(dim=0)
            total += h.square_().sum(dim=1)
        return [total / preactivations[0].numel()]

    def estimate(self, variances: FloatArray) -> Estimate:
        left_out = np.maximum(without_one(variances) / (len(variances) - 1), 0)
        return jackknifed(math.sqrt(variances.sum() / len(variances)), np.sqrt(left_out))


class SignDiversity(Statistic, quantity="sign_diversity", of=PREACTIVATIONS):
    """Mean over neurons of min(P, N) / (P + N), where P and N count a neuron's positive and negative pre-activations.

    The range is 0 to 0.5.  If the value is low, most neurons receive inputs of only one sign, for which ReLU-like
    functions are linear.  Zeros have neither sign; a neuron with only zeros has the value 0.  If both signs
    are equally likely, the expected value is about 1/2 - sqrt(1 / (2 pi B)): 0.460 for batch size B = 100.

    >>> SignDiversity()(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).value
    0.25
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        left_out = _zeros(preactivations)
        total, halves = left_out.new_zeros(()), left_out.new_zeros(())
        for h in _blocks(preactivations):
            signs = h.sign_()
            present = signs.abs()
            counts = [_counts(signs[start::2], present[start::2]) for start in (0, 1)]
            positive, negative = (even + odd for even, odd in zip(*counts, strict=True))
            whole = _rarer(positive, negative)
            total += (own := whole.sum())
            halves += (_rarer(*counts[0]).sum() + _rarer(*counts[1]).sum()) / 2
            # Without a sample, a neuron has one positive or one negative pre-activation less.
            less = _rarer(positive - 1, negative) - whole, _rarer(positive, negative - 1) - whole
            even, odd = (less[0] + less[1]) / 2, (less[0] - less[1]) / 2
            left_out += present @ even + signs @ odd + own
        neurons = preactivations[0].numel()
        return [total / neurons, halves / neurons, left_out / neurons]

    def estimate(self, total: FloatArray, halves: FloatArray, left_out: FloatArray) -> Estimate:
        # The minimum has a kink, where the bias falls like 1 / sqrt(B): half a batch has sqrt(2) times the bias.
        bias = (math.log(halves) - math.log(total)) / (math.sqrt(2) - 1) if halves > 0 and total > 0 else 0.0
        return jackknifed(float(total), left_out, bias=bias)


class Kurtosis(Statistic, quantity="kurtosis", of=PREACTIVATIONS):
    """Kurtosis mean(d^4) / mean(d^2)^2 of the deviations d_bn = h_bn - mean_b h_bn, pooled over neurons.

    The value is 3 if all neurons are Gaussian with the same variance, larger if tails are heavy or neurons differ in
    scale, and 0 if no pre-activation varies over the batch.  The standard error is unknown (None): it depends on eighth
    moments, which a batch does not show.

    >>> round(Kurtosis()(torch.tensor([[0.0], [2.0]])).value, 6)
    1.0
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        scale = largest(flattened(preactivations).abs().amax().double())  # kurtosis does not depend on it
        sums = []
        for h in _blocks(preactivations):
            h /= scale
            h -= h.mean(dim=0)
            squares = h.square_()
            sums.append(torch.stack([squares.sum(), torch.linalg.vector_norm(squares).square()]))
        return [reduce(torch.add, sums) / preactivations.numel()]

    def estimate(self, moments: FloatArray) -> Estimate:
        second, fourth = moments.tolist()
        return Estimate(fourth / second**2 if second else 0.0, None)


class SampleCosine(Statistic, quantity="sample_cosine", of=PREACTIVATIONS, signed=True):
    """Mean cosine between two different samples, (|sum_b u_b|^2 - B) / (B (B - 1)) with u_b = h_b / |h_b|.

    The value is 1 if all samples point in the same direction.  Cosines with a sample that is zero count as 0.

    >>> round(SampleCosine()(torch.tensor([[3.0, 4.0], [4.0, 3.0]])).value, 6)
    0.96
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        scales = largest(flattened(preactivations).abs().amax(dim=1, keepdim=True).double())
        parts = ((h / scales).square_().sum(dim=1, keepdim=True) for h in _blocks(preactivations))
        squares = reduce(torch.add, parts)
        lengths = scales * squares.sqrt().where(squares > 0, 1.0)
        whole, left_out = sums_of_units((h / lengths for h in _blocks(preactivations)), squares[:, 0])
        return [whole, left_out, squares[:, 0] > 0]

    def estimate(self, whole: FloatArray, left_out: FloatArray, nonzero: FloatArray) -> Estimate:
        return mean_cosine(whole, left_out, nonzero)


@checked
@dataclass(frozen=True)
class SaturatedFraction(Statistic, quantity="saturated_fraction", of=SLOPES):
    """Fraction of pre-activations, over all samples and neurons, where phi is flat: |phi'(h)| < ``slope``.

    For ReLU these are the inactive pre-activations; for tanh and the default slope of 0.05, those with |h| > 2.2.

    >>> SaturatedFraction()(torch.tensor([[1.0, 0.01], [0.5, 0.9]])).value
    0.25
    """

    slope: Nonnegative = 0.05

    def parts(self, slopes: Tensor) -> Sequence[Tensor]:
        flat = reduce(torch.add, ((h.abs() < self.slope).double().sum(dim=1) for h in _blocks(slopes)))
        return [flat / slopes[0].numel()]

    def estimate(self, fractions: FloatArray) -> Estimate:
        return sample_mean(fractions)


class DeadFraction(Statistic, quantity="dead_fraction", of=SLOPES):
    """Fraction of neurons with phi'(h) = 0 for every sample of the batch, so that no gradient passes.

    The larger the batch, the smaller the value.  The standard error is unknown (None).

    >>> DeadFraction()(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).value
    0.5
    """

    def parts(self, slopes: Tensor) -> Sequence[Tensor]:
        # amax, because comparisons and `any` along the first dimension are slow in torch.
        alive = reduce(torch.add, (h.abs().amax(dim=0).count_nonzero() for h in _blocks(slopes, copied=False)))
        return [alive.double() / slopes[0].numel()]

    def estimate(self, alive: FloatArray) -> Estimate:
        return Estimate(1 - float(alive), None)


class LinearFitError(Statistic, quantity="linear_fit_error", of=RESPONSES):
    """Fraction of the variance of phi(h) that no linear function of h explains.

        sum_n min_(a, c) E_b[(phi(h_bn) - a h_bn - c)^2] / sum_n Var_b[phi(h_bn)], with one line (a, c) per neuron n

    The value is 0 if phi is linear or constant over the data, and at most 1.  For h ~ N(0, 1) it is 0.2665 for ReLU and
    0.0697 for tanh.  This statistic measures near-linearity, which a small `PreactivationStd` or `SignDiversity` only
    suggests.  Because lines are fitted to the batch, the value is too small by a factor of about 1 - 1/B.

    >>> h = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> round(LinearFitError()((h, h.relu())).value, 6)
    0.25
    """

    def parts(self, responses: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        total, left_out = _zeros(responses[0]), _zeros(responses[0])
        unexplained = torch.zeros_like(total[0])
        for h, a in zip(*map(_blocks, responses), strict=True):
            h -= h.mean(dim=0)
            a -= a.mean(dim=0)
            total += a.square().sum(dim=1)
            squares = h.square()
            variance = squares.sum(dim=0)
            variance = variance.where(variance > 0, 1.0)
            left = a.sub_(h.mul_((h * a).sum(dim=0) / variance)).square_()
            unexplained += left.sum()
            # Without a sample, the sum of squared residuals of a line falls by r^2 / (1 - leverage).
            left.div_(squares.div_(variance).neg_().add_(1 - 1 / len(h)).clamp_min_(1e-12))
            left_out += left.sum(dim=1)
        return [total, unexplained, left_out]

    def estimate(self, total: FloatArray, unexplained: FloatArray, left_out: FloatArray) -> Estimate:
        if not total.any():
            return Estimate.exact(0.0)
        return jackknifed(float(unexplained / total.sum()), (unexplained - left_out) / without_one(total))


def _blocks(values: Tensor, *, copied: bool = True) -> Iterator[Tensor]:
    """The values (B, ...) in blocks of shape (B, some of the neurons): float64 copies, or views."""
    flat = flattened(values)
    for block in flat.split(max(1, BLOCK // len(flat)), dim=1):
        yield block.to(torch.float64, copy=True) if copied else block


def _counts(signs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of positive and of negative entries of each neuron."""
    difference, number = signs.sum(dim=0), present.sum(dim=0)
    return (number + difference) / 2, (number - difference) / 2


def _rarer(positive: Tensor, negative: Tensor) -> Tensor:
    """min(P, N) / (P + N), and 0 if both are 0."""
    return torch.minimum(positive, negative).clamp_min(0) / (positive + negative).clamp_min(1)


def largest(value: Tensor) -> Tensor:
    """The value, by which others are divided so that their squares stay in the range of float64."""
    return value.clamp_min(torch.finfo(torch.float64).tiny)


def _zeros(values: Tensor) -> Tensor:
    """A zero for every sample."""
    return torch.zeros(len(flattened(values)), dtype=torch.float64, device=values.device)


def flattened(values: Tensor) -> Tensor:
    """Return the values as a matrix (B, neurons), in memory order, because the order of neurons does not matter."""
    if values.ndim < 2 or values.shape[0] < 2 or 0 in values.shape:
        raise ValueError(
            "Statistics need pre-activations (B, ...) of at least two samples with at least one neuron, got shape "
            f"{tuple(values.shape)}."
        )
    values = values.detach()
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
