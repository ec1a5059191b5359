"""From squared lengths of pulled-back cotangents to coefficients with error bars; pure NumPy, log-native.

Notation for a batch of B samples: a_b = |J_b|_F^2, p_b = |f_k,b|^2, q_b = |f_l,b|^2, d_k entries of f_k a sample.

    "batch"      (sum a / (B d_k)) * (sum p) / (sum q)
    "mean"       mean over b of a_b p_b / (d_k q_b)
    "geometric"  geometric mean over b of the same
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.estimates import LOG10_2

FloatArray = npt.NDArray[np.float64]
LN10 = math.log(10)


@dataclass(frozen=True)
class Length:
    """|f|^2 of each sample (B,), or of the whole batch (1,), as ``squares * 4**exponent``."""

    squares: FloatArray
    exponent: int

    @property
    def log10_total(self) -> float:
        """log10 of |F|^2 over the batch; -inf for a layer of zeros."""
        with np.errstate(divide="ignore"):
            return float(np.log10(self.squares.sum())) + 2 * self.exponent * LOG10_2


@dataclass(frozen=True)
class Gain:
    """Estimated a_b = ``value * 4**exponent`` of one source for T targets, and the variance of each estimate.

    ``value`` (T, B) and ``variance`` (T, B), B = 1 where only the total is known; ``exponent`` (T,).  ``variance`` is 0
    where exact and NaN where unknown (one probe, coupled samples).  ``bound``: one probe, so it is an upper bound.
    """

    value: FloatArray
    variance: FloatArray
    exponent: npt.NDArray[np.int64]
    bound: bool

    @classmethod
    def of(cls, squares: FloatArray, exponents: npt.NDArray[np.int64], *, exact: bool, coupled: bool) -> Gain:
        """From readings of P cotangents a target: ``squares`` (T, P, B), ``exponents`` (T, P)."""
        common = exponents.max(axis=1)
        a = np.ldexp(squares, 2 * (exponents - common[:, None])[..., None])
        if coupled:  # a cotangent's share of one sample means nothing by itself
            a = a.sum(axis=2, keepdims=True)
        num = a.shape[1]
        if exact:
            return cls(a.sum(axis=1), np.zeros_like(a[:, 0]), common, False)
        if num > 1:
            return cls(a.mean(axis=1), a.var(axis=1, ddof=1) / num, common, False)
        if coupled:
            return cls(a[:, 0], np.full_like(a[:, 0], np.nan), common, True)
        # One probe: Var[x] <= 2 E[x]^2 for a quadratic form in random signs, hence Var[x] <= (2/3) E[x^2],
        # with equality at rank one, which deep Jacobians approach.
        return cls(a[:, 0], 2 / 3 * np.square(a[:, 0]), common, True)


def reduce(
    gain: Gain, source: Length, targets: list[Length], *, size: int, reduction: str, batch_size: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """log10 GSC of one source to T targets, its standard error from probes, and from the spread over samples.

    ``size``: B d_k.  Errors are standard errors of log10 GSC to first order, NaN where unknown; each of the two leaves
    the other out.  Over samples, "batch" is a ratio of three correlated sums, so its error goes by influences
    a_b/mean(a) + p_b/mean(p) - q_b/mean(q) - 1 (delta method).  That is first order: where the GSC of single samples is
    heavy-tailed, as in deep networks, it comes out too small (by 40 % for tanh with layer normalization at depth 50 and
    B = 100).
    """
    p = source.squares
    per_sample = all(len(s) == batch_size for s in (p, gain.value[0], *(target.squares for target in targets)))
    q = np.stack([target.squares for target in targets]) if per_sample else np.empty(0)
    exponents = np.array([target.exponent for target in targets])
    if reduction == "batch":
        weight = np.ones_like(gain.value)
        offset = source.log10_total - np.array([target.log10_total for target in targets])
    else:
        weight = p / q
        offset = 2 * LOG10_2 * (source.exponent - exponents)
    offset = offset + 2 * LOG10_2 * gain.exponent - math.log10(size)

    share = weight * gain.value
    total = share.sum(axis=1)
    if reduction == "geometric":
        with np.errstate(divide="ignore"):
            logs = np.log10(share * batch_size)
        spread = logs.std(axis=1, ddof=1) / math.sqrt(batch_size) if batch_size > 1 else np.full(len(total), np.nan)
        return logs.mean(axis=1) + offset, np.zeros_like(total), spread

    safe = np.where(total > 0, total, 1.0)
    probe_variance = (np.square(weight) * gain.variance).sum(axis=1) / np.square(safe)
    with np.errstate(divide="ignore"):
        log10_values = np.log10(total) + offset
    sample = np.full_like(total, np.nan)
    if per_sample and batch_size > 1 and not gain.bound:
        influence = share * batch_size / safe[:, None] - 1
        if reduction == "batch":
            influence = influence + p / (p.mean() or 1.0) - q / q.mean(axis=1, keepdims=True)
        variance = np.square(influence).sum(axis=1) / (batch_size * (batch_size - 1))
        sample = np.sqrt(np.maximum(variance - probe_variance, 0.0)) / LN10
    return log10_values, np.sqrt(probe_variance) / LN10, sample
