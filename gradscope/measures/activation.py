"""Statistics of pre-activations h: the inputs of a nonlinearity phi, after normalization if there is any.

``of`` names the argument of a statistic: the pre-activations (B, ...), the slopes phi'(h) (B, ...), or the pair of
pre-activations and responses phi(h).  The batch size B is at least 2.  A neuron is one entry of a sample's
pre-activation; in a convolution, one channel at one position.  Standard errors are sampling errors over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradscope.choices import Nonnegative, checked
from gradscope.estimates import Estimate, FloatArray
from gradscope.measures.blocks import PREACTIVATIONS, RESPONSES, SLOPES, Block, Blockwise, Neurons
from gradscope.measures.samples import jackknifed, mean_cosine, sample_mean, without_one


class PreactivationMean(Blockwise, quantity="preactivation_mean", of=PREACTIVATIONS, signed=True):
    """Mean pre-activation, over samples b and neurons n: mean_b mean_n h_bn.

    >>> PreactivationMean()(torch.tensor([[1.0, -2.0], [3.0, 4.0]])).value
    1.5
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        return [block.values.sum(dim=1)]

    def estimate(self, means: FloatArray) -> Estimate:
        return sample_mean(means, signed=True)


class PreactivationStd(Blockwise, quantity="preactivation_std", of=PREACTIVATIONS):
    """Standard deviation of pre-activations over the batch: sqrt(mean_n Var_b[h_bn]), for sample b and neuron n.

    The variance of each neuron n over the B samples (with divisor B) is averaged over neurons.  The value is 1 after
    batch normalization without affine parameters.  A small value suggests that the nonlinearity is nearly linear over
    the batch.

    >>> PreactivationStd()(torch.tensor([[0.0, 0.0], [2.0, 14.0]])).value
    5.0
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        return [block.spread]

    def estimate(self, variances: FloatArray) -> Estimate:
        left_out = np.maximum(without_one(variances) / (len(variances) - 1), 0)
        return jackknifed(math.sqrt(variances.sum() / len(variances)), np.sqrt(left_out))


class SignDiversity(Blockwise, quantity="sign_diversity", of=PREACTIVATIONS):
    """Mean over neurons of min(P, N) / (P + N), where P and N count a neuron's positive and negative pre-activations.

    The range is 0 to 0.5.  If the value is low, the pre-activations of most neurons have mainly one sign.  ReLU is
    linear on numbers of one sign.  Zeros have neither sign; a neuron with only zeros has the value 0.  If both signs
    are equally likely, the expected value is about 1/2 - sqrt(1 / (2 pi B)): 0.460 for batch size B = 100.

    >>> SignDiversity()(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).value
    0.25
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        signs = torch.sign(block.values, out=block.room("first"))
        present = torch.abs(signs, out=block.room("second"))
        # Rows: even samples, odd samples, all samples, all without a positive one, and all without a negative one.
        difference, number = _by_parity(signs), _by_parity(present)
        positive, negative = (number + difference).div_(2), (number - difference).div_(2)
        positive[3] -= 1
        negative[4] -= 1
        rarer = torch.minimum(positive, negative).clamp_min_(0) / (positive + negative).clamp_min_(1)
        even, odd, whole, *_ = rarer.sum(dim=1)
        less = rarer[3:] - rarer[2]
        left_out = present @ (less.sum(dim=0) / 2) + signs @ ((less[0] - less[1]) / 2) + whole
        return [whole, (even + odd) / 2, left_out]

    def estimate(self, total: FloatArray, halves: FloatArray, left_out: FloatArray) -> Estimate:
        # The minimum has a kink, where the bias falls like 1 / sqrt(B): half a batch has sqrt(2) times the bias.
        bias = (math.log(halves) - math.log(total)) / (math.sqrt(2) - 1) if halves > 0 and total > 0 else 0.0
        return jackknifed(float(total), left_out, bias=bias)


class Kurtosis(Blockwise, quantity="kurtosis", of=PREACTIVATIONS):
    """Kurtosis of the pre-activations h_bn of sample b and neuron n, after the mean over b is subtracted.

    It is mean(d^4) / mean(d^2)^2 with d_bn = h_bn - mean_b h_bn; both means are over samples and neurons.  The value is
    3 if all neurons are Gaussian with the same variance, and larger if tails are heavy or neurons differ in scale.  It
    is 0 if no pre-activation varies over the batch.  The standard error is unknown (None), because it depends on eighth
    moments, which cannot be estimated well from one batch.

    >>> round(Kurtosis()(torch.tensor([[0.0], [2.0]])).value, 6)
    1.0
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        squares, second = block.squares, block.spread
        if (scale := block.neurons.scale) is not None:  # kurtosis does not depend on it
            squares = (block.deviations / scale).square_()
            second = squares.sum(dim=1)
        return [torch.stack([second.sum(), torch.linalg.vector_norm(squares).square()]) / len(squares)]

    def estimate(self, moments: FloatArray) -> Estimate:
        second, fourth = moments.tolist()
        return Estimate(fourth / second**2 if second else 0.0, None)


class SampleCosine(Blockwise, quantity="sample_cosine", of=PREACTIVATIONS, signed=True):
    """Mean cosine between the pre-activations of two different samples.

    It is (|sum_b u_b|^2 - M) / (M (M - 1)) with u_b = h_b / |h_b|, where h_b is the vector of pre-activations of sample
    b.  Samples with h_b = 0 are left out, and M samples remain.  The value is 1 if these point in the same direction,
    and 0 if M < 2.

    >>> round(SampleCosine()(torch.tensor([[3.0, 4.0], [4.0, 3.0]])).value, 6)
    0.96
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        total = block.neurons.inverse_lengths @ block.values  # of the unit vectors
        return [total @ total, block.values @ total]

    def finished(self, sums: Sequence[Tensor], neurons: Neurons) -> Sequence[Tensor]:
        whole, products = sums
        nonzero = neurons.inverse_lengths > 0
        # |sum u - u_b|^2, with |u_b| = 1 or 0
        return [whole, whole - 2 * neurons.inverse_lengths * products + nonzero, nonzero]

    def estimate(self, whole: FloatArray, left_out: FloatArray, nonzero: FloatArray) -> Estimate:
        return mean_cosine(whole, left_out, nonzero)


@checked
@dataclass(frozen=True)
class SaturatedFraction(Blockwise, quantity="saturated_fraction", of=SLOPES):
    """Fraction of pre-activations h where the nonlinearity phi is nearly flat: |phi'(h)| < ``slope``.

    The fraction is over all samples and neurons.  For ReLU, phi is flat where h <= 0; for tanh and the default slope of
    0.05, where |h| > 2.2.

    >>> SaturatedFraction()(torch.tensor([[1.0, 0.01], [0.5, 0.9]])).value
    0.25
    """

    slope: Nonnegative = 0.05

    def of_block(self, block: Block) -> Sequence[Tensor]:
        # Write numbers directly: converting a boolean mask takes several times longer.
        steepness = block.steepness
        flat = torch.lt(steepness, self.slope, out=block.neurons.room("flat", steepness, steepness.dtype))
        return [flat.sum(dim=1, dtype=torch.promote_types(flat.dtype, torch.float32)).double()]

    def estimate(self, fractions: FloatArray) -> Estimate:
        return sample_mean(fractions)


class DeadFraction(Blockwise, quantity="dead_fraction", of=SLOPES):
    """Fraction of dead neurons: neurons at which the nonlinearity has slope 0 for every sample of the batch.

    A larger batch gives a smaller value, so the standard error is unknown (None).

    >>> DeadFraction()(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).value
    0.5
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        # amax, because comparisons and `any` along the first dimension are slow in torch.
        return [block.steepness.amax(dim=0).count_nonzero().double()]

    def estimate(self, alive: FloatArray) -> Estimate:
        return Estimate(1 - float(alive), None)


class LinearFitError(Blockwise, quantity="linear_fit_error", of=RESPONSES):
    """Fraction of the variance of activations phi(h) that no linear function of the pre-activation h explains.

        sum_n min_(a, c) E_b[(phi(h_bn) - a h_bn - c)^2] / sum_n Var_b[phi(h_bn)]

    h_bn is the pre-activation of neuron n for sample b, and a line (a, c) is fitted for each neuron.

    The value is 0 if phi is linear or constant over the data, and at most 1.  For h ~ N(0, 1) it is 0.2665 for ReLU and
    0.0697 for tanh.  A small value shows near-linearity; small `PreactivationStd` and `SignDiversity` only suggest it.
    Because the line is fitted to the B samples themselves, the value is too small, by a factor of about 1 - 1/B.

    >>> h = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> round(LinearFitError()((h, h.relu())).value, 6)
    0.25
    """

    def of_block(self, block: Block) -> Sequence[Tensor]:
        h, a = block.deviations, block.responses
        a -= a.mean(dim=0)
        total = torch.linalg.vector_norm(a, dim=1).square_()
        variance = block.squares.sum(dim=0)
        inverse = variance.where(variance > 0, 1.0).reciprocal_()
        spare = block.room("second")
        left = torch.addcmul(a, h, torch.mul(h, a, out=spare).sum(dim=0) * inverse, value=-1, out=a).square_()
        unexplained = left.sum(dim=1).sum()  # faster than one sum
        # Without a sample, the sum of squared residuals of a line falls by r^2 / (1 - leverage).  The factor keeps the
        # difference positive where it is 0 but for rounding.
        room = torch.addcmul(h.new_full((), 1 - 1 / len(h)), block.squares, inverse, value=1e-12 - 1, out=spare)
        left.div_(room)
        return [total, unexplained, left.sum(dim=1)]

    def estimate(self, total: FloatArray, unexplained: FloatArray, left_out: FloatArray) -> Estimate:
        if not total.any():
            return Estimate.exact(0.0)
        return jackknifed(float(unexplained / total.sum()), (unexplained - left_out) / without_one(total))


def _by_parity(numbers: Tensor) -> Tensor:
    """Sums over the even samples, over the odd ones, and three times over all of them: (5, neurons)."""
    even, odd = numbers[::2].sum(dim=0), numbers[1::2].sum(dim=0)
    return torch.stack([even, odd, *[even + odd] * 3])
