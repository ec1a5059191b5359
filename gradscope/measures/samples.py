"""The base class of layer statistics, and functions that compute a standard error from the samples of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradscope.estimates import Estimate

GROUPS = 20  # groups of the delete-a-group jackknife; the standard error has about GROUPS - 1 degrees of freedom


@dataclass(frozen=True)
class Statistic:
    """Base class of layer statistics.  The keywords of a class header set the attributes of a `gradscope.Measure`."""

    quantity: ClassVar[str]
    of: ClassVar[str]
    signed: ClassVar[bool]

    def __init_subclass__(cls, quantity: str, of: str, signed: bool = False) -> None:
        cls.quantity, cls.of, cls.signed = quantity, of, signed


def sample_mean(per_sample: Tensor) -> Estimate:
    """The mean of ``per_sample`` (B,), one number per sample, with its standard error."""
    return influenced(float(per_sample.mean()), per_sample)


def influenced(value: float, influences: Tensor) -> Estimate:
    """``value`` with its standard error by the delta method, std(influences) / sqrt(B); ``influences`` are (B,)."""
    return Estimate(value, float(influences.std(correction=1)) / math.sqrt(len(influences)))


def jackknife(statistic: Callable[[Tensor], float], samples: Tensor) -> Estimate:
    """``statistic(samples)`` with its standard error by a jackknife that omits one group of samples at a time."""
    num = min(GROUPS, len(samples))
    group = torch.arange(len(samples), device=samples.device) % num
    values = torch.tensor([statistic(samples[group != left_out]) for left_out in range(num)], dtype=torch.float64)
    variance = (num - 1) / num * float((values - values.mean()).square().sum())
    return Estimate(statistic(samples), math.sqrt(variance))
