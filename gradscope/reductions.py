"""From squared lengths of pulled-back cotangents to coefficients with error bars; pure NumPy, log-native, mergeable.

Notation for samples b: a_b = |J_b|_F^2, p_b = |f_k,b|^2, q_b = |f_l,b|^2, n_b = d_k entries of f_k.

    "batch"      (sum a) (sum p) / ((sum n) (sum q))
    "mean"       mean over b of a_b p_b / (n_b q_b)
    "geometric"  geometric mean over b of the same

Where samples are coupled, or a layer's leading dimension is not the batch, b counts batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gradscope.estimates import LOG10_2

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LN10 = math.log(10)


@dataclass(frozen=True)
class Length:
    """|f|^2 of each sample (N, B), or of the whole batch (N, 1), of N layers, as ``squares * 4**exponent[:, None]``."""

    squares: FloatArray
    exponent: IntArray


@dataclass(frozen=True)
class Gain:
    """Estimated a_b = ``value * 4**exponent`` of N pairs of layers, and the variance of each estimate.

    ``value`` (N, B) and ``variance`` (N, B), B = 1 where only the total is known; ``exponent`` (N,).  ``variance`` is 0
    where exact and NaN where unknown (one probe, coupled samples); from one probe and uncoupled samples it is an upper
    bound.  ``fixed`` (N, B): the part of the value that is known without error.
    """

    value: FloatArray
    variance: FloatArray
    fixed: FloatArray
    exponent: IntArray

    @classmethod
    def of(cls, norms: FloatArray, exponents: IntArray, *, num_fixed: int, coupled: bool) -> Gain:
        """From lengths of P cotangents a pair: ``norms`` (N, P, B), ``exponents`` (N, P).

        The squares of the first ``num_fixed`` add up (rows of the Jacobian, or of its product with a subspace), and
        each of the others is an unbiased estimate of the rest.
        """
        common = exponents.max(axis=1)
        a = np.square(np.ldexp(norms, (exponents - common[:, None])[..., None]))
        if coupled:  # a cotangent's share of one sample means nothing by itself
            a = a.sum(axis=2, keepdims=True)
        fixed, random = a[:, :num_fixed].sum(axis=1), a[:, num_fixed:]
        num = random.shape[1]
        if num == 0:
            return cls(fixed, np.zeros_like(fixed), fixed, common)
        if num > 1:
            return cls(fixed + random.mean(axis=1), random.var(axis=1, ddof=1) / num, fixed, common)
        # One probe: Var[x] <= 2 E[x]^2 for a quadratic form in random signs, hence Var[x] <= (2/3) E[x^2],
        # with equality at rank one, which deep Jacobians approach.
        bound = np.full_like(fixed, np.nan) if coupled else 2 / 3 * np.square(random[:, 0])
        return cls(fixed + random[:, 0], bound, fixed, common)


@dataclass(frozen=True)
class Tally:
    """What samples so far say of N pairs: count, means and co-moments of C quantities, mergeable in any grouping.

    For the reduction "batch" the quantities are (a, p, q, n), for the others the coefficient of a sample, or its
    logarithm to base 10.  ``mean`` (N, C) and ``moment`` (N, C, C), the sum of products of deviations, are on the
    scales ``2**exponent`` (N, C).  ``probe`` (N,): sum of the variances that are due to probes, of the first quantity.
    ``fixed`` (N,): mean of the part of the first quantity that is free of probe noise.
    """

    reduction: str
    count: int
    mean: FloatArray
    moment: FloatArray
    probe: FloatArray
    fixed: FloatArray
    exponent: IntArray

    @classmethod
    def of(
        cls, gain: Gain, source: Length, target: Length, *, sizes: npt.ArrayLike, reduction: str, batch_size: int
    ) -> Tally:
        """Of one batch.  ``sizes`` (N,): entries of f_k in the whole batch, B d_k."""
        p, q = source.squares, target.squares
        entries = np.asarray(sizes, dtype=np.float64)[:, None] / batch_size
        e_a, e_p, e_q = 2 * gain.exponent, 2 * source.exponent, 2 * target.exponent
        if reduction == "batch":
            if len({p.shape[1], q.shape[1], gain.value.shape[1], batch_size}) > 1:
                totals = (x.sum(axis=1, keepdims=True) for x in (gain.value, gain.variance, gain.fixed))
                gain = Gain(*totals, gain.exponent)
                p, q = p.sum(axis=1, keepdims=True), q.sum(axis=1, keepdims=True)
                entries = entries * batch_size
            values = np.stack(np.broadcast_arrays(gain.value, p, q, entries), axis=2)
            exponent = np.stack(np.broadcast_arrays(e_a, e_p, e_q, 0), axis=1)
            return cls._of(reduction, values, exponent, gain.variance, gain.fixed)
        weight = p / (q * entries)
        values, exponent = weight * gain.value, (e_a + e_p - e_q)[:, None]
        if reduction == "geometric":
            with np.errstate(divide="ignore"):
                values = np.log10(values) + exponent * LOG10_2
            return cls._of(reduction, values[..., None], np.zeros_like(exponent), np.zeros_like(values), values)
        variance, fixed = np.square(weight) * gain.variance, weight * gain.fixed
        return cls._of(reduction, values[..., None], exponent, variance, fixed)

    @classmethod
    def _of(
        cls, reduction: str, values: FloatArray, exponent: IntArray, variance: FloatArray, fixed: FloatArray
    ) -> Tally:
        mean = values.mean(axis=1)
        deviations = values - mean[:, None]
        moment = np.swapaxes(deviations, 1, 2) @ deviations
        return cls(reduction, values.shape[1], mean, moment, variance.sum(axis=1), fixed.mean(axis=1), exponent)

    def merge(self, other: Tally) -> Tally:
        """Both together, by the pairwise formula of Chan, Golub and LeVeque (1979)."""
        exponent = np.maximum(self.exponent, other.exponent)
        a, b = self._at(exponent), other._at(exponent)
        count = a.count + b.count
        delta = b.mean - a.mean
        return Tally(
            self.reduction,
            count,
            a.mean + delta * (b.count / count),
            a.moment + b.moment + delta[:, :, None] * delta[:, None, :] * (a.count * b.count / count),
            a.probe + b.probe,
            a.fixed + (b.fixed - a.fixed) * (b.count / count),
            exponent,
        )

    def _at(self, exponent: IntArray) -> Tally:
        shift = self.exponent - exponent
        return replace(
            self,
            mean=np.ldexp(self.mean, shift),
            moment=np.ldexp(self.moment, shift[:, :, None] + shift[:, None, :]),
            probe=np.ldexp(self.probe, 2 * shift[:, 0]),
            fixed=np.ldexp(self.fixed, shift[:, 0]),
            exponent=exponent,
        )

    def take(self, order: IntArray) -> Tally:
        """Some of its pairs, in that order."""
        return replace(self, **{name: getattr(self, name)[order] for name in _OF_PAIRS})

    @classmethod
    def concatenate(cls, tallies: Sequence[Tally]) -> Tally:
        """Of all their pairs; the counts must agree."""
        return replace(tallies[0], **{name: np.concatenate([getattr(t, name) for t in tallies]) for name in _OF_PAIRS})

    @property
    def log10_values(self) -> FloatArray:
        """log10 GSC (N,)."""
        if self.reduction == "geometric":
            return self.mean[:, 0]
        with np.errstate(divide="ignore"):
            logs = np.log10(self.mean) + self.exponent * LOG10_2
        return logs @ np.array([1.0, 1.0, -1.0, -1.0]) if self.reduction == "batch" else logs[:, 0]

    @property
    def log10_stderr_probe(self) -> FloatArray:
        """Standard error of log10 GSC that is due to probes, to first order; NaN where unknown, 0 where exact."""
        if self.reduction == "geometric":
            return self.probe
        return np.sqrt(self.probe) / (self.count * _or_one(self.mean[:, 0])) / LN10

    @property
    def log10_stderr_sample(self) -> FloatArray:
        """Standard error of log10 GSC that is due to the choice of samples, to first order; NaN where unknown.

        The spread between samples, by the delta method with the covariance of the sums, less the share of the probes;
        so the two in quadrature are the whole.  From one probe the share of the probes is an upper bound, and this a
        lower one.  First order is right for light tails; per-sample coefficients of deep networks are heavy-tailed, and
        then it is too small (by 40 % for tanh with layer normalization at depth 50 and B = 100).
        """
        if self.count < 2:
            return np.full(len(self.mean), np.nan)
        if self.reduction == "geometric":
            with np.errstate(invalid="ignore"):
                return np.sqrt(self.moment[:, 0, 0] / (self.count * (self.count - 1)))
        slope = 1 / _or_one(self.mean)
        if self.reduction == "batch":
            slope = slope * np.array([1.0, 1.0, -1.0, -1.0])
        spread = np.einsum("ni,nij,nj->n", slope, self.moment, slope) / (self.count * (self.count - 1))
        of_probes = self.probe / np.square(self.count * _or_one(self.mean[:, 0]))
        return np.sqrt(np.maximum(spread - of_probes, 0.0)) / LN10


_OF_PAIRS = ("mean", "moment", "probe", "fixed", "exponent")


def _or_one(values: FloatArray) -> FloatArray:
    """The values, with 1 for zeros: a mean of zero has no spread either."""
    return np.where(values > 0, values, 1.0)
