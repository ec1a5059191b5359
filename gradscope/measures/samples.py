"""Standard errors over the samples of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradscope.estimates import Estimate

# A delete-a-group jackknife leaves out so many groups in turn: its error has about one degree of freedom less.
GROUPS = 20


def sample_mean(per_sample: Tensor) -> Estimate:
    """Mean over the samples (B,) with its standard error; exact as far as probes are concerned."""
    stderr = float(per_sample.std(correction=1)) / math.sqrt(len(per_sample))
    return Estimate(float(per_sample.mean()), stderr)


def influenced(value: float, influences: Tensor) -> Estimate:
    """``value`` with the error of the delta method: the standard deviation of the samples' influences over sqrt(B)."""
    return Estimate(value, float(influences.std(correction=1)) / math.sqrt(len(influences)))


def jackknife(statistic: Callable[[Tensor], float], samples: Tensor) -> Estimate:
    """``statistic(samples)`` with the error of a delete-a-group jackknife over at most `GROUPS` groups of samples."""
    num = min(GROUPS, len(samples))
    group = torch.arange(len(samples), device=samples.device) % num
    values = torch.tensor([statistic(samples[group != left_out]) for left_out in range(num)], dtype=torch.float64)
    variance = (num - 1) / num * float((values - values.mean()).square().sum())
    return Estimate(statistic(samples), math.sqrt(variance))
