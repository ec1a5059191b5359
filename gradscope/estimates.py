"""Values with standard errors, on a scale that neither overflows nor underflows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import special

from gradscope.choices import Finite, Known, Level, checked

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LOG10_2 = math.log10(2.0)
UPPER = 0.975  # quantile at the upper end of a 95 % interval


@checked
@dataclass(frozen=True)
class Estimate:
    """An estimated number ``mantissa * 2**exponent`` with its standard error, ``mantissa_stderr * 2**exponent``.

    ``mantissa_stderr`` is None if the error is unknown, for example with a single probe.  ``num_probes`` is the number
    of random probes, and 0 for an exact number.  ``freedom`` is the number of degrees of freedom of the standard error.

    >>> import gradscope as gs
    >>> print(gs.Estimate(1.5, 0.15, num_probes=8))
    1.5 +- 0.15
    >>> print(gs.Estimate(1.5, 0.15, exponent=4000))
    10^(1204.2961 +- 0.043)
    """

    mantissa: Known
    mantissa_stderr: float | None
    exponent: int = 0
    num_probes: int = 0
    freedom: Known = math.inf

    @property
    def value(self) -> float:
        """The number in float64; ``inf`` or ``0`` beyond its range."""
        return _ldexp(self.mantissa, self.exponent)

    @property
    def stderr(self) -> float | None:
        """Standard error of ``value``; None if unknown."""
        return None if self.mantissa_stderr is None else _ldexp(self.mantissa_stderr, self.exponent)

    @property
    def log10_value(self) -> float:
        """log10 of the number, finite at every scale; ``-inf`` for zero, NaN for negative numbers."""
        if self.mantissa <= 0:
            return -math.inf if self.mantissa == 0 else math.nan
        return math.log10(self.mantissa) + self.exponent * LOG10_2

    @property
    def log10_stderr(self) -> float | None:
        """Standard error of ``log10_value`` to first order: stderr / (value ln 10); None if unknown or value <= 0."""
        if self.mantissa_stderr is None or (self.mantissa_stderr and self.mantissa <= 0):
            return None
        return self.mantissa_stderr / (self.mantissa * math.log(10)) if self.mantissa_stderr else 0.0

    def interval(self, level: Level = 0.95) -> tuple[float, float]:
        """Return log10 of both ends of an interval that contains the true value with the probability ``level``.

        The interval is log10_value -+ t log10_stderr.  Here t is the quantile of Student's distribution with
        ``freedom`` degrees of freedom, or of the normal distribution if ``freedom`` was not given.
        For an exact number both ends are equal.  If the error is unknown, both ends are NaN.

        >>> low, high = Estimate(2.0, 0.1).interval()
        >>> round(10**low, 3), round(10**high, 3)
        (1.813, 2.206)
        """
        error = math.nan if self.log10_stderr is None else self.log10_stderr
        margin = float(special.stdtrit(self.freedom, 0.5 + level / 2)) * error
        return self.log10_value - margin, self.log10_value + margin

    @classmethod
    def exact(cls, value: float, exponent: int = 0) -> Self:
        """Return an `Estimate` of ``value * 2**exponent``, known without error."""
        return cls(value, 0.0, exponent, 0)

    def scaled(self, factor: Finite) -> Estimate:
        """Return an `Estimate` whose number and error are multiplied by a known positive factor."""
        error = None if self.mantissa_stderr is None else self.mantissa_stderr * factor
        return replace(self, mantissa=self.mantissa * factor, mantissa_stderr=error)

    def sqrt(self) -> Estimate:
        """Return an `Estimate` of the square root, with its error to first order: stderr / (2 sqrt(value))."""
        odd = self.exponent % 2
        root = math.sqrt(math.ldexp(self.mantissa, odd))
        error = self.mantissa_stderr and math.ldexp(self.mantissa_stderr, odd) / (2 * root)
        return replace(self, mantissa=root, mantissa_stderr=error, exponent=(self.exponent - odd) // 2)

    def __str__(self) -> str:
        """Return value and error, with two digits of the error: ``1.47 +- 0.01``."""
        if not 1e-4 <= abs(self.value) < 1e6:
            error = "?" if self.log10_stderr is None else f"{self.log10_stderr:.2g}"
            return f"10^({self.log10_value:.4f} +- {error})"
        return f"{self.value:.6g} +- " + ("?" if self.stderr is None else f"{self.stderr:.2g}")


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 (sum of squared deviations) of a stream of arrays, stored with a power of two.

    The mean is ``mean * 2**exponent`` and M2 is ``m2 * 4**exponent``, so numbers of any size can be merged by the
    pairwise formula of Chan, Golub and LeVeque (1979), in any order and grouping.  ``exponent`` is a number, or an
    array that broadcasts against the mean.  If M2 has one more axis than the mean, it holds sums of products of the
    deviations of two quantities along the last axis.  ``exponent`` then has the mean's shape.
    """

    count: int
    mean: FloatArray
    m2: FloatArray
    exponent: int | IntArray = 0

    @classmethod
    def of(cls, values: npt.ArrayLike, exponents: npt.ArrayLike = 0) -> Self:
        """Return moments over the first axis of ``values * 2**exponents`` (broadcast against each other)."""
        mantissas, powers = np.asarray(values, dtype=np.float64), np.asarray(exponents, dtype=np.int64)
        if mantissas.ndim == 0 or mantissas.shape[0] == 0:
            raise ValueError("Moments.of needs at least one value along the first axis.")
        # The exponent of a zero says nothing: a large one would make all other values underflow.
        common = int(np.where(mantissas != 0, powers, _LEAST).max()) if mantissas.any() else 0
        scaled: FloatArray = np.ldexp(mantissas, np.where(mantissas == 0, 0, powers - common))
        mean = scaled.mean(axis=0)
        return cls(len(scaled), mean, np.square(scaled - mean).sum(axis=0), common)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both streams together, at the larger of the two exponents."""
        exponent = np.maximum(self.exponent, other.exponent)
        a, b = self.at(exponent), other.at(exponent)
        count = max(a.count + b.count, 1)
        delta = b.mean - a.mean
        crossed = a.m2.ndim > a.mean.ndim
        products = (delta[..., None] * delta[..., None, :] if crossed else np.square(delta)) * (
            a.count * b.count / count
        )
        return Moments(a.count + b.count, a.mean + delta * (b.count / count), a.m2 + b.m2 + products, exponent)

    def at(self, exponent: int | IntArray) -> Moments:
        """Return the same moments, rescaled to another exponent."""
        shift = np.asarray(self.exponent - exponent)
        twice = shift[..., None] + shift[..., None, :] if self.m2.ndim > self.mean.ndim else 2 * shift
        return Moments(self.count, np.ldexp(self.mean, shift), np.ldexp(self.m2, twice), exponent)

    @property
    def mean_variance(self) -> FloatArray:
        """Variance of the mean, M2 / (n (n - 1)), on the scale ``4**exponent``; NaN for a single value."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.m2 / (self.count * (self.count - 1))

    def estimate(self) -> Estimate:
        """Return the mean of a scalar stream and its standard error, which is None if there is only one value."""
        stderr = None if self.count < 2 else math.sqrt(float(self.mean_variance))
        return Estimate(float(self.mean), stderr, int(self.exponent), self.count, max(1, self.count - 1))


def freedom_of(deviations: npt.ArrayLike) -> float:
    """Degrees of freedom of a variance that is the mean of the squares of ``deviations`` (n,), from 2 to n - 1."""
    squares = np.square(np.asarray(deviations, dtype=np.float64))
    num, second = len(squares), float(squares.sum())
    square = second * second
    most = max(num - 1.0, 1.0)  # as in `satterthwaite`, but without its many operations on arrays of one number
    concentration = float(np.dot(squares, squares)) / square - 1 / num if 0 < square < math.inf else 1.0
    return min(max(1 / max(concentration, 1e-9) - 1, min(2.0, most)), most)


def satterthwaite(second: npt.ArrayLike, fourth: npt.ArrayLike, num: int) -> FloatArray:
    """Degrees of freedom of a variance, from the sums of the second and fourth powers of ``num`` deviations.

    Satterthwaite's f is 2 / (sum d^4 / (sum d^2)^2 - 1 / n).  The result is f / 2 - 1, because a few values show too
    little of a heavy tail.  It is at most n - 1 and at least 2, because one degree of freedom would make intervals
    several times too wide.  It is 2 if the deviations are all 0 or not finite.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        concentration = np.asarray(fourth) / np.square(second) - 1 / num
    freedom = 1 / np.clip(np.nan_to_num(concentration, nan=1.0), 1e-9, None) - 1
    most = max(num - 1.0, 1.0)
    return np.clip(freedom, min(2.0, most), most)


def lognormal_error(variance: npt.ArrayLike, shape: npt.ArrayLike, num: int) -> FloatArray:
    """Standard error of ln(mean of x), if x is lognormal, from the variance of ln x over ``num`` samples.

    Let s^2 be this variance.  The error is the smaller of two approximations:

    - The logarithm of the mean has about the variance w = ln(1 + (exp(s^2) - 1) / n) and the bias -w / 2 (Fenton 1960),
      so the error is sqrt(w + w^2 / 4).  This is right for s <= 1, and three times too large for s = 3.
    - The n samples are expected to lie below the quantile 1 - 1 / n, z standard deviations above the mean of ln x.  The
      part of the distribution below this quantile lacks the share 1 - Phi(z - s) of the mean.  So the bias is
      ln Phi(z - s).  In w, exp(s^2) becomes exp(s^2) Phi(z - 2 s) / Phi(z - s)^2.

    A few samples suffice to estimate s^2, unlike the spread of x itself.  ``shape``: if x is the mean of random probes,
    1 / its relative variance; inf if x is exact.  Such noise adds the variance trigamma(shape) to ln x, which is
    subtracted.  If this variance is 1 or more, the result is 0.

    >>> print(f"{lognormal_error(4.0, math.inf, 40):.2f}")  # the first-order error of the mean is 1.16
    0.79
    """
    noise = special.polygamma(1, np.asarray(shape, dtype=np.float64))
    with np.errstate(invalid="ignore"):
        s2 = np.where(noise < 1, np.clip(np.asarray(variance) - noise, 0.0, 100.0), 0.0)
    s, z = np.sqrt(s2), special.ndtri(1 - 1 / num)
    w, bias = np.log1p(np.expm1(s2) / num), special.log_ndtr(z - s)
    below = np.log1p(np.expm1(s2 + special.log_ndtr(z - 2 * s) - 2 * bias) / num)
    error: FloatArray = np.sqrt(np.minimum(w + np.square(w) / 4, below + np.square(bias)))
    return error


_LEAST = -(1 << 62)


def _ldexp(mantissa: float, exponent: int) -> float:
    """``math.ldexp`` that returns ``inf`` instead of raising OverflowError."""
    if not exponent:  # the usual case; setting what numpy warns of takes longer
        return float(mantissa)
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(mantissa, exponent))
