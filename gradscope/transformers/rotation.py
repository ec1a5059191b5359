"""Target positions of a large batch: every cotangent probes all positions, each in other samples.

In cotangent i, the sample of rank r is nonzero at position (r + i B) mod T only.  Ranks are a random permutation, so
the m samples that probe a position are a simple random sample without replacement.  For x_b = |J_b,ts^T v_b|^2, the
mean over these m samples is unbiased for the mean over all B samples.  Its variance is s^2 / m, with s^2 the variance
of x over the m samples, less m / B times the part of s^2 that is due to the choice of samples, divided by m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradscope.coefficients.gains import Length
from gradscope.coefficients.reductions import LN10
from gradscope.estimates import LOG10_2, satterthwaite

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# "auto" probes each position in at least this many samples: an error of 10 % if single samples scatter by 70 %.
SAMPLES = 48


def num_rotated(num_positions: int, batch_size: int) -> int:
    """The least number of cotangents with which every position is probed equally often, in `SAMPLES` samples."""
    cycle = num_positions // math.gcd(num_positions, batch_size)
    return cycle * math.ceil(num_positions * SAMPLES / batch_size / cycle)


def rotation(num: int, num_positions: int, batch_size: int, generator: torch.Generator) -> IntArray:
    """The position of every sample in every cotangent, (num, samples); no sample gets a position twice."""
    ranks = torch.randperm(batch_size, generator=generator, device=generator.device).cpu().numpy()
    number = np.arange(num)[:, None]
    cycle = num_positions // math.gcd(num_positions, batch_size)  # after which a sample would get its first position
    return (ranks + number * batch_size + number // cycle) % num_positions


@dataclass(frozen=True)
class Rotated:
    """Blocks of one layer, in the names of `gradscope.coefficients.reductions.Tally`; each array (blocks,).

    ``log10_stderr_probe`` is the error due to the probes and to the choice of the samples of each position, relative to
    the whole batch.  The error of the batch relative to the data set is unknown.
    """

    log10_values: FloatArray
    log10_stderr_probe: FloatArray
    probe_freedom: FloatArray

    @classmethod
    def of(
        cls, norms: FloatArray, exponents: IntArray, places: IntArray, source: Length, target: Length, *,
        size: int, reduction: str,
    ) -> Rotated:  # fmt: skip
        """Blocks from |J^T v| (cotangents, samples, source positions); ``size``: entries of f_k in the whole batch."""
        common, batch_size = int(exponents.max()), places.shape[1]
        x = np.square(np.ldexp(norms, (exponents - common)[:, None, None]))
        p, q = source.squares[0], target.squares[0]
        scale = 2.0 * LOG10_2 * (common + int(source.exponent[0]) - int(target.exponent[0])) + math.log10(
            batch_size / size
        )
        if reduction == "mean":
            x = x * (p / q)[:, None]
        else:
            scale += math.log10(p.sum() / q.sum())
        order = np.argsort(places, axis=None, kind="stable")
        num_positions = int(places.max()) + 1
        x = x.reshape(places.size, -1)[order].reshape(num_positions, -1, x.shape[2])
        num = x.shape[1]
        mean, deviations = x.mean(axis=1), x - x.mean(axis=1, keepdims=True)
        second, fourth = np.square(deviations).sum(axis=1), np.power(deviations, 4).sum(axis=1)
        # The variance of x^2 due to signs is at most 2/3 of E x^2: see `Gain.variance`.
        of_samples = np.maximum(second / (num - 1) - 2 / 3 * np.square(x).mean(axis=1), 0.0)
        variance = second / (num * (num - 1)) - of_samples / batch_size
        with np.errstate(divide="ignore"):
            return cls(
                log10_values=(np.log10(mean) + scale).ravel(),
                log10_stderr_probe=(np.sqrt(variance) / np.where(mean > 0, mean, 1.0) / LN10).ravel(),
                probe_freedom=satterthwaite(second, fourth, num).ravel(),
            )

    @property
    def log10_stderr_sample(self) -> FloatArray:
        """Unknown."""
        return np.full_like(self.log10_values, np.nan)

    @property
    def log10_stderr_cautious(self) -> FloatArray:
        """The error of `log10_stderr_probe`."""
        return self.log10_stderr_probe

    @property
    def fixed_share(self) -> FloatArray:
        """No part is free of noise."""
        return np.zeros_like(self.log10_values)

    @property
    def sample_freedom(self) -> FloatArray:
        """Unknown."""
        return np.full_like(self.log10_values, np.nan)
