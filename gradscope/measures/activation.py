"""Statistics of pre-activations: what a nonlinearity receives, after any normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradscope.estimates import Estimate


@dataclass(frozen=True)
class PreactivationStd:
    """Standard deviation over the samples of each neuron, then the quadratic mean over neurons.

    sqrt(mean over neurons of Var_b[h_b]), Var with 1/B, so that batch normalization reads 1.  A nonlinearity that
    receives values of small deviation is nearly linear over the batch.  A neuron is one entry of the pre-activation
    (for a convolution one channel at one position).
    """

    quantity: ClassVar[str] = "preactivation_std"

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2.  The standard error is that of sampling the batch."""
        h = _neurons(preactivations)
        squares = (h - h.mean(dim=0)).square().mean(dim=1)  # (B,), its mean is the mean variance
        return _sample_mean(squares).sqrt()


@dataclass(frozen=True)
class SignDiversity:
    """Mean over neurons of min(P, N) / (P + N): P positive and N negative pre-activations among the samples.

    Range 0 to 0.5; low means that most neurons see one sign only, where ReLU-like functions are linear.  Exact zeros
    count as neither, and a neuron with nothing but zeros as 0.  For a balanced neuron the expectation is
    1/2 - sqrt(1 / (2 pi B)) at batch size B, 0.460 at B = 100.
    """

    quantity: ClassVar[str] = "sign_diversity"

    def __call__(self, preactivations: Tensor) -> Estimate:
        """``preactivations``: (B, ...), B >= 2.  The standard error is that of sampling the batch."""
        h = _neurons(preactivations)
        positive, negative = (h > 0).double(), (h < 0).double()
        fewer_positive = positive.sum(dim=0) <= negative.sum(dim=0)
        signed = (positive + negative).mean(dim=0)
        minority = positive.where(fewer_positive, negative) / signed.where(signed > 0, 1.0)
        return _sample_mean(minority.mean(dim=1))


def _neurons(preactivations: Tensor) -> Tensor:
    """(B, ...) -> (B, neurons) in float64."""
    if preactivations.ndim < 2 or preactivations.shape[0] < 2:
        raise ValueError(
            "Statistics over samples need at least two of them, "
            f"got pre-activations of shape {tuple(preactivations.shape)}."
        )
    return preactivations.detach().flatten(1).double()


def _sample_mean(per_sample: Tensor) -> Estimate:
    """Mean over the samples (B,) with its standard error; exact as far as probes are concerned."""
    stderr = float(per_sample.std(correction=1)) / math.sqrt(len(per_sample))
    return Estimate(float(per_sample.mean()), stderr)
