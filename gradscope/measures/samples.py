"""The base class of layer statistics, and their sampling errors over the samples of a batch, by the jackknife.

With t_i, the value without sample i, and t, the value of all B samples (logarithms, if the statistic is positive):

    variance            (B - 1) / B sum_i d_i^2,   d_i = t_i - mean t
    bias                (B - 1) (mean t - value)
    degrees of freedom  f / 2 - 1,   f = 2 / (sum_i d_i^4 / (sum_i d_i^2)^2 - 1 / B)   (2 to B - 1)

f is Satterthwaite's formula for this variance.  It is halved because the batch shows too little of a heavy tail.  The
standard error is sqrt(variance + bias^2), multiplied by the 97.5 % quantile of Student's t over that of the normal
distribution.  So ``value`` -+ 1.96 standard errors (on a log scale if it is positive) is a 95 % interval for the value
of a large population.  The error is unknown (None) where this does not hold: for fewer than `SAMPLES` samples, if all
samples agree, or if the bias exceeds `BIAS` times the spread, so that the value depends on the size of the batch.

The length of a mean of vectors has stricter rules.  Noise makes it larger, and a batch whose mean is large by chance
also shows a small bias and a small spread.  So the bias must stay below half of `BIAS` times the spread, the spread of
the logarithm below `SPREAD`, and the error holds for the worst case: the bias is added to 1.96 spreads, not its square.

A mean cosine c of unit vectors u_b is unbiased.  Its variance v is nearly proportional to |mean u|^2, so a batch with a
small value shows a small spread.  Its error d / 1.96 therefore contains the variance of the upper end c + d: d solves
d^2 = 1.96^2 v (1 + d c / |mean u|^4).  The second c / |mean u|^2 keeps out the part of |mean u|^2 that is noise.

Reference: Efron and Stein (1981), "The jackknife estimate of variance".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from gradscope.choices import ArgumentError, shown
from gradscope.estimates import UPPER, Estimate, FloatArray, freedom_of
from gradscope.memory import Later

SAMPLES, BIAS, SPREAD = 30, 0.5, 0.2


@dataclass(frozen=True)
class Statistic:
    """Base class of layer statistics.  The keywords of a class header set the attributes of a `gradscope.Measure`.

    A statistic has two parts, so that the device is waited for once for all statistics of all layers:
    ``parts(values)`` computes tensors and reads none of them, and ``estimate(*arrays)`` makes the result of their
    copies on the CPU.  The result may be another statistic, which must then be computed from the same values.
    """

    quantity: ClassVar[str]
    of: ClassVar[str]
    signed: ClassVar[bool]

    def __init_subclass__(cls, quantity: str = "", of: str = "", signed: bool | None = None) -> None:
        if quantity:
            cls.quantity, cls.of, cls.signed = quantity, of, bool(signed)

    def __call__(self, values: Any, /) -> Estimate:
        """Return the statistic of one layer alone.  Cost: one device synchronization."""
        tensors = values if self.of == "responses" and isinstance(values, tuple) else (values,)
        dense = [isinstance(tensor, Tensor) and tensor.layout is torch.strided for tensor in tensors]
        if self.of != "gradients" and dense != [True] * (1 + (self.of == "responses")):
            raise TypeError(f"values must be a dense tensor, or for responses a pair of them, got {shown(values)}.")
        found = self.estimated(Later(self.parts(values)).arrays)
        return found(values) if isinstance(found, Statistic) else found

    def estimated(self, arrays: Sequence[Any], layer: str = "") -> Estimate | Statistic:
        """Return the result of ``estimate``.  Raises ValueError if it is NaN; the message names the layer."""
        try:
            with quiet():
                return self.estimate(*arrays)
        except ArgumentError as error:
            where = f" of layer {layer!r}" if layer else ""
            raise ValueError(
                f"{self.quantity!r}{where} is NaN, because the values hold NaN or Inf or because numbers overflow: "
                "gs.first_nonfinite(model, data) names the first layer that makes them."
            ) from error

    def parts(self, values: Any, /) -> Sequence[Tensor]:
        """Compute from a layer's values, on their device, the tensors that ``estimate`` takes as arguments."""
        raise NotImplementedError

    def estimate(self, *arrays: Any, **_: Any) -> Estimate | Statistic:
        """Return the statistic, computed in float64 from the results of ``parts``."""
        raise NotImplementedError


def quiet() -> np.errstate:
    """Context without warnings of NaN and Inf, which the estimates then hold."""
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


def jackknifed(
    value: float, left_out: npt.ArrayLike, *, signed: bool = False, bias: float | None = None,
    samples: int | None = None, length: bool = False,
) -> Estimate:  # fmt: skip
    """``value`` with its standard error from ``left_out``, the values without one sample (or group) at a time.

    Arguments:
        signed: The value can be negative, so that errors are not on a log scale.
        bias: The bias, where the jackknife does not see it.
        samples: Number of samples, if ``left_out`` leaves out groups of equal size.
        length: The value is the length of a mean of vectors, or a function of it.
    """
    values, whole = np.asarray(left_out, dtype=np.float64), value
    num = len(values)
    if not signed:
        if not values.min() > 0:
            return Estimate(value, None)
        values, whole = np.log(values), math.log(value) if value > 0 else -math.inf
    mean = float(values.sum()) / num
    if not math.isfinite(mean):
        return Estimate(value, None)
    deviations = values - mean
    variance = (num - 1) / num * float(np.dot(deviations, deviations))
    bias = (num - 1) * (mean - whole) if bias is None else bias
    spread, most = math.sqrt(max(variance, 0.0)), BIAS / 2 if length else BIAS
    known = 0 < spread < (SPREAD if length else math.inf) and abs(bias) <= most * spread
    if not known or (samples or num) < SAMPLES:
        return Estimate(value, None)
    freedom = freedom_of(deviations) if samples is None else num - 1.0
    factor = float(special.stdtrit(freedom, UPPER) / special.ndtri(UPPER))
    error = factor * spread + abs(bias) / special.ndtri(UPPER) if length else factor * math.hypot(spread, bias)
    return Estimate(value, error if signed else error * value)


def sample_mean(per_sample: Tensor | FloatArray, *, signed: bool = False) -> Estimate:
    """The mean of ``per_sample`` (B,), one number per sample, with its standard error."""
    if isinstance(per_sample, Tensor):
        with quiet():
            return sample_mean(Later([per_sample]).arrays[0], signed=signed)
    total, num = float(per_sample.sum()), len(per_sample)
    return jackknifed(total / num, (total - per_sample) / (num - 1), signed=signed)


def without_one(squares: Any) -> Any:
    """Sums of squared deviations without one sample at a time; ``squares`` (B,) hold those from the mean of all B."""
    num = len(squares)
    return squares.sum() - squares * (num / (num - 1))


def sums_of_units(unit_sums: Iterable[Tensor], groups: Tensor) -> tuple[Tensor, Tensor]:
    """|sum u|^2 over all unit vectors u, and (G,) the same without one group at a time, for `mean_cosine`.

    The sums over the groups come in blocks (G, some coordinates).  ``groups``: any tensor (G,).
    """
    whole, squares = torch.zeros_like(groups[0]), torch.zeros_like(groups)
    for block in unit_sums:
        total = block.sum(dim=0)
        whole += total.square().sum()
        # |total - part|^2, without the matrix of all differences
        squares += total.square().sum() - 2 * block @ total + block.square().sum(dim=1)
    return whole, squares


def mean_cosine(whole: FloatArray, squares: FloatArray, members: FloatArray) -> Estimate:
    """Mean cosine between two different of M unit vectors, from `sums_of_units` of groups of ``members`` (G,) each.

    The value is (|sum u|^2 - M) / (M (M - 1)), and 0 if M < 2.
    """
    count = float(members.sum())
    rest = count - members
    value = float(whole - count) / max(count * (count - 1), 1.0)
    left_out = (squares - rest) / np.maximum(rest * (rest - 1), 1.0)
    grouped = bool((members > 1).any())
    found = jackknifed(value, left_out, signed=True, samples=int(count) if grouped else None, bias=0.0)
    if found.stderr is None or value <= 0:
        return found
    # With k = z^2 v c / |mean u|^4 / 2, the solution is d = k + sqrt(k^2 + z^2 v).  Here, both are divided by z.
    square = float(whole) / count**2
    k = special.ndtri(UPPER) * (found.stderr / square) ** 2 * value / 2
    return replace(found, mantissa_stderr=k + math.hypot(k, found.stderr))
