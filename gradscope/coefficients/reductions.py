"""Coefficients with error bars from lengths of pulled-back cotangents, in pure NumPy; results of batches merge.

Notation for samples b: a_b = |J_b|_F^2, p_b = |f_k,b|^2, q_b = |f_l,b|^2, n_b = d_k entries of f_k.

    "batch"      (sum a) (sum p) / ((sum n) (sum q))
    "mean"       mean over b of a_b p_b / (n_b q_b)
    "geometric"  geometric mean over b of the same

If samples are coupled, or the leading dimension of a layer is not the batch, b stands for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from gradscope.coefficients.gains import Gain, Length
from gradscope.estimates import LOG10_2, UPPER, Moments, lognormal_error, satterthwaite

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LN10 = math.log(10)
# The logarithm of a coefficient is the sum of those of the means of its quantities, with these signs.
SIGNS = {"batch": np.array([1.0, 1.0, -1.0, -1.0]), "mean": np.array([1.0, -1.0]), "geometric": np.array([1.0])}
_BLOCK = 1 << 14  # numbers
_LARGEST = 1000  # exponents whose powers of two and their inverses are normal numbers
FEWEST = 10  # samples (or batches, if b stands for a batch) of an interval


@dataclass(frozen=True)
class Tally:
    """Statistics of N pairs over the samples so far: count, means and co-moments of C quantities; mergeable.

    The quantities are (a, p, q, n) for the reduction "batch", the coefficient of a sample and 1 for "mean", and the
    log10 of the coefficient for "geometric".  ``moments``: mean (N, C) and sums of products of deviations (N, C, C),
    with exponents (N, C).  ``fourth`` (N, P, P): sums of products of four quantities, by the P = C (C + 1) / 2
    products of two.
    The other fields, each (N,), describe the first quantity.  ``probe``: sum over samples of the variance due to
    probes.  ``doubt``: sum of the squares of these variances, each divided by its degrees of freedom.  ``fixed``: mean
    of the part that is free of probe noise.  ``square``: sum of the squares of the noisy part.  ``ratio``: sum of the
    variances, each divided by the square of the noisy part.  ``noise``: sum of the variances, each divided by the
    square of the quantity.  ``logs``: moments of the natural logarithm of the quantity.
    """

    reduction: str
    moments: Moments
    logs: Moments
    fourth: FloatArray
    probe: FloatArray
    doubt: FloatArray
    fixed: FloatArray
    square: FloatArray
    ratio: FloatArray
    noise: FloatArray

    @property
    def count(self) -> int:
        """Number of samples, or of batches if b stands for a batch."""
        return self.moments.count

    @property
    def mean(self) -> FloatArray:
        """Means (N, C) on the scales ``2**exponent``."""
        return self.moments.mean

    @classmethod
    def of(
        cls, gain: Gain, source: Length, target: Length, *, sizes: npt.ArrayLike, reduction: str, batch_size: int
    ) -> Tally:
        """The tally of one batch.  ``sizes`` (N,): entries of f_k in the whole batch, B d_k."""
        p, q = source.squares, target.squares
        entries = np.asarray(sizes, dtype=np.float64)[:, None] / batch_size
        e_a, e_p, e_q = 2 * gain.exponent, 2 * source.exponent, 2 * target.exponent
        if reduction == "batch":
            value, variance, fixed = gain.value, gain.variance, gain.fixed
            if len({p.shape[1], q.shape[1], value.shape[1], batch_size}) > 1:
                value, variance, fixed, p, q = (x.sum(axis=1, keepdims=True) for x in (value, variance, fixed, p, q))
                entries = entries * batch_size
            values = np.stack(np.broadcast_arrays(value, p, q, entries))
            exponent = np.stack(np.broadcast_arrays(e_a, e_p, e_q, 0), axis=1)
            return cls._of(reduction, values, exponent, variance, fixed, gain.freedom)
        weight = p / (q * entries)
        values, exponent = weight * gain.value, (e_a + e_p - e_q)[:, None]
        if reduction == "geometric":
            with np.errstate(divide="ignore"):
                values = np.log10(values) + exponent * LOG10_2
            return cls._of(reduction, values[None], np.zeros_like(exponent), np.zeros_like(values), values, 1)
        variance, fixed = np.square(weight) * gain.variance, weight * gain.fixed
        values, exponent = np.stack([values, np.ones_like(values)]), exponent * np.array([1, 0])
        return cls._of(reduction, values, exponent, variance, fixed, gain.freedom)

    @classmethod
    def _of(
        cls,
        reduction: str,
        values: FloatArray,
        exponent: IntArray,
        variance: FloatArray,
        fixed: FloatArray,
        freedom: int,
    ) -> Tally:
        # values (C, N, B) are overwritten.  The samples are contiguous, which makes the sums several times faster.
        if reduction != "geometric":  # scale each quantity to about one, because fourth powers follow; none is negative
            shift = np.frexp(values.max(axis=2))[1]
            values, exponent = _scaled(values, -shift[:, :, None], out=values), exponent + shift.T
            fixed, variance = _scaled(fixed, -shift[0][:, None]), _scaled(variance, -2 * shift[0][:, None])
        probe, doubt = variance.sum(axis=1), np.square(variance).sum(axis=1) / freedom
        random = np.square(values[0] - fixed)
        ratio, noise = (
            np.divide(variance, square, out=np.zeros_like(variance), where=square > 0).sum(axis=1)
            for square in (random, np.square(values[0]))
        )
        fixed, square = fixed.mean(axis=1), random.sum(axis=1)
        fourth = _fourth(values)
        with np.errstate(invalid="ignore"):  # the logarithm of a zero coefficient has no spread: NaN
            logs = np.log(np.where(values[0] > 0, values[0], np.nan))
            mean = values.mean(axis=2)
            values -= mean[:, :, None]
            moment = values.swapaxes(0, 1) @ values.transpose(1, 2, 0)
        moments = Moments(values.shape[2], mean.T, moment, exponent)
        ln = Moments(moments.count, logs.mean(axis=1), logs.var(axis=1) * moments.count, np.zeros(len(logs), int))
        ln = replace(ln, mean=ln.mean + exponent[:, 0] * math.log(2))
        return cls(reduction, moments, ln, fourth, probe, doubt, fixed, square, ratio, noise)

    def merge(self, other: Tally) -> Tally:
        """The statistics of both together."""
        moments = self.moments.merge(other.moments)
        a, b = self._at(moments.exponent), other._at(moments.exponent)
        return Tally(
            self.reduction,
            moments,
            self.logs.merge(other.logs),
            a.fourth + b.fourth,
            a.probe + b.probe,
            a.doubt + b.doubt,
            a.fixed + (b.fixed - a.fixed) * (b.count / moments.count),
            a.square + b.square,
            a.ratio + b.ratio,
            a.noise + b.noise,
        )

    def _at(self, exponent: int | IntArray) -> Tally:
        """The same sums, rescaled to another exponent."""
        shifts = np.asarray(self.moments.exponent) - exponent
        i, j = np.triu_indices(shifts.shape[1])
        shift, twice = shifts[:, 0], shifts[:, i] + shifts[:, j]
        return replace(
            self,
            fourth=np.ldexp(self.fourth, twice[:, :, None] + twice[:, None, :]),
            probe=np.ldexp(self.probe, 2 * shift),
            doubt=np.ldexp(self.doubt, 4 * shift),
            fixed=np.ldexp(self.fixed, shift),
            square=np.ldexp(self.square, 2 * shift),
        )

    def take(self, order: IntArray) -> Tally:
        """The pairs with the numbers in ``order``, in this order."""
        return self._each(lambda arrays: arrays[0][order], [self])

    @classmethod
    def concatenate(cls, tallies: Sequence[Tally]) -> Tally:
        """The statistics of the pairs of all ``tallies``; the counts must agree."""
        return tallies[0]._each(np.concatenate, tallies)

    def _each(self, combine: Callable[[list[Any]], Any], tallies: Sequence[Tally]) -> Tally:
        """A copy in which each array over pairs is ``combine`` of the list of this array from all ``tallies``."""
        parts: dict[str, Any] = {
            name: replace(
                getattr(self, name),
                **{n: combine([getattr(getattr(t, name), n) for t in tallies]) for n in ("mean", "m2", "exponent")},
            )
            for name in ("moments", "logs")
        }
        sums = ("fourth", "probe", "doubt", "fixed", "square", "ratio", "noise")
        return replace(self, **parts, **{n: combine([getattr(t, n) for t in tallies]) for n in sums})

    @property
    def log10_values(self) -> FloatArray:
        """log10 GSC (N,)."""
        if self.reduction == "geometric":
            return self.mean[:, 0]
        with np.errstate(divide="ignore"):
            logs = np.log10(self.mean) + self.moments.exponent * LOG10_2
        values: FloatArray = logs @ SIGNS[self.reduction]
        return values

    @property
    def log10_stderr_probe(self) -> FloatArray:
        """Standard error of log10 GSC due to probes, to first order; NaN if unknown, 0 if exact."""
        return np.sqrt(self.probe) / (self.count * _or_one(self.mean[:, 0])) / LN10

    @property
    def log10_stderr_cautious(self) -> FloatArray:
        """The larger of `log10_stderr_probe` and the error if all samples had the same relative noise.

        With few probes, the sum of the variances of the samples is often too small if a few samples dominate.
        The mean relative variance of the samples fluctuates much less.
        """
        if self.reduction == "geometric":
            return self.probe
        variance = np.maximum(self.probe, self.ratio / self.count * self.square)
        return np.sqrt(variance) / (self.count * _or_one(self.mean[:, 0])) / LN10

    @property
    def fixed_share(self) -> FloatArray:
        """The part of each value that is free of probe noise, 0 to 1."""
        return np.where(self.mean[:, 0] > 0, self.fixed / _or_one(self.mean[:, 0]), 1.0)

    @property
    def probe_freedom(self) -> FloatArray:
        """Degrees of freedom of the variance due to probes, by Satterthwaite's formula; inf if exact."""
        return np.where(
            self.doubt > 0, np.square(self.probe) / _or_one(self.doubt), np.where(self.probe > 0, 1.0, np.inf)
        )

    @property
    def log10_stderr_sample(self) -> FloatArray:
        """Standard error of log10 GSC due to the choice of samples; NaN if unknown.

        There are two candidates, and the result is the one whose 95 % interval is wider:

        - The spread between samples (delta method) minus the part due to probes.  The degrees of freedom are those of
          `gradscope.estimates.freedom_of`.  With one probe, this error is a lower bound.
        - The error if a is lognormal over samples (`gradscope.estimates.lognormal_error`), as in deep networks.  A few
          samples dominate such a sum, and the spread between samples is too small if the batch contains none of them.
          This error has n - 1 degrees of freedom.
        """
        return self._sample_error[0] / LN10

    @property
    def sample_freedom(self) -> FloatArray:
        """Degrees of freedom of `log10_stderr_sample`; NaN below `FEWEST` samples: too few to show a heavy tail."""
        return self._sample_error[1] if self.count >= FEWEST else np.full(len(self.mean), np.nan)

    @cached_property
    def _sample_error(self) -> tuple[FloatArray, FloatArray]:
        """Standard error of ln GSC due to samples, and its degrees of freedom."""
        num = self.count
        if num < 2:
            return np.full(len(self.mean), np.nan), np.full(len(self.mean), np.nan)
        every = np.full(len(self.mean), num - 1.0)
        if self.reduction == "geometric":
            with np.errstate(invalid="ignore"):
                return np.sqrt(self.moments.m2[:, 0, 0] / (num * (num - 1))) * LN10, every
        slope = SIGNS[self.reduction] / _or_one(self.mean)
        i, j = np.triu_indices(slope.shape[1])
        pairs = slope[:, i] * slope[:, j] * np.where(i == j, 1, 2)
        second = np.einsum("ni,nij,nj->n", slope, self.moments.m2, slope)
        # The deviations from the first-order terms' mean, which is 0: fourth powers need no centering.
        fourth = np.einsum("ni,nij,nj->n", pairs, self.fourth, pairs)
        of_probes = self.probe / np.square(num * _or_one(self.mean[:, 0]))
        spread, freedom = np.maximum(second / (num * (num - 1)) - of_probes, 0.0), satterthwaite(second, fourth, num)
        # Of gamma-distributed estimates of relative variance r, the mean of variance / value^2 is r / (1 + r).
        with np.errstate(divide="ignore"):
            lognormal = np.square(lognormal_error(self.logs.m2 / (num - 1), num / self.noise - 1, num))
        wider = special.stdtrit(num - 1, UPPER) * np.sqrt(lognormal + of_probes)
        heavy = wider > special.stdtrit(freedom, UPPER) * np.sqrt(spread + of_probes)
        return np.sqrt(np.where(heavy, lognormal, spread)), np.where(heavy, every, freedom)


def _fourth(values: FloatArray) -> FloatArray:
    """Sums over samples of products of four quantities: (C, N, B) -> (N, P, P).  Small blocks stay in the cache."""
    num_quantities, num_pairs, num_samples = values.shape
    num = num_quantities * (num_quantities + 1) // 2
    found, step = np.empty((num_pairs, num, num)), max(1, _BLOCK // (num * num_samples))
    buffer = np.empty((min(step, num_pairs), num, num_samples))
    for first in range(0, num_pairs, step):
        block, last = values[:, first : first + step].swapaxes(0, 1), 0
        products = buffer[: len(block)]
        for i in range(num_quantities):  # in the order of np.triu_indices
            start, last = last, last + num_quantities - i
            np.multiply(block[:, i : i + 1], block[:, i:], out=products[:, start:last])
        np.matmul(products, products.mT, out=found[first : first + step])
    return found


def _scaled(values: FloatArray, exponents: IntArray, out: FloatArray | None = None) -> FloatArray:
    """``values * 2**exponents``; several times faster than `np.ldexp`, unless a power overflows."""
    if np.abs(exponents).max(initial=0) < _LARGEST:
        return np.multiply(values, np.ldexp(1.0, exponents), out=out)
    return np.ldexp(values, exponents, out=out)


def _or_one(values: FloatArray) -> FloatArray:
    """The values, with 1 in place of zeros: a mean of zero has no spread."""
    return np.where(values > 0, values, 1.0)
