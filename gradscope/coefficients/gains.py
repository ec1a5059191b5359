"""Squared lengths of layers and of pulled-back cotangents, sample by sample; in the notation of `reductions`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.estimates import Moments

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Length:
    """|f|^2 of N layers, per sample (N, B) or for the whole batch (N, 1), as ``squares * 4**exponent[:, None]``."""

    squares: FloatArray
    exponent: IntArray


@dataclass(frozen=True)
class Gain:
    """Estimated a_b = |J_b|_F^2 of N pairs of layers: an exact part ``fixed``, plus a mean over random ``probes``.

    Both parts are (N, B), or (N, 1) if only the total is known, in units of ``4**exponent`` (N,).
    """

    fixed: FloatArray
    probes: Moments
    exponent: IntArray
    coupled: bool

    @classmethod
    def of(cls, norms: FloatArray, exponents: IntArray, *, num_fixed: int, coupled: bool) -> Gain:
        """Return the gain from the lengths of P cotangents per pair: ``norms`` (N, P, B), ``exponents`` (N, P).

        The squares of the first ``num_fixed`` are summed (rows of the Jacobian, or of its product with a subspace).
        Each of the other squares is an unbiased estimate of the rest.
        """
        common = exponents.max(axis=1)
        shift = exponents - common[:, None]
        a = np.square(np.ldexp(norms, shift[..., None]) if shift.any() else norms)
        if coupled:  # only the sum over samples is defined
            a = a.sum(axis=2, keepdims=True)
        fixed, random = a[:, :num_fixed].sum(axis=1), a[:, num_fixed:]
        num = random.shape[1]
        mean = random.mean(axis=1) if num else np.zeros_like(fixed)
        m2 = np.square(random - mean[:, None]).sum(axis=1)
        return cls(fixed, Moments(num, mean, m2, 2 * common[:, None]), common, coupled)

    def merge(self, other: Gain) -> Gain:
        """Combine with further cotangents of the same pairs and samples."""
        probes, exponent = self.probes.merge(other.probes), np.maximum(self.exponent, other.exponent)
        fixed = [np.ldexp(gain.fixed, 2 * (gain.exponent - exponent)[:, None]) for gain in (self, other)]
        return Gain(fixed[0] + fixed[1], probes, exponent, self.coupled)

    @property
    def num(self) -> int:
        """Number of random probes."""
        return self.probes.count

    @property
    def value(self) -> FloatArray:
        """The estimate of a_b."""
        return self.fixed + self.probes.mean

    @property
    def variance(self) -> FloatArray:
        """Variance of the estimate: 0 if exact, NaN if unknown; an upper bound with a single probe per sample."""
        if self.num > 1:
            return self.probes.mean_variance
        if self.num == 0:
            return np.zeros_like(self.fixed)
        # One probe: Var[x] <= 2 E[x]^2 for a quadratic form in random signs, hence Var[x] <= (2/3) E[x^2],
        # with equality at rank one, which deep Jacobians approach.
        mean = self.probes.mean
        return np.full_like(mean, np.nan) if self.coupled else 2 / 3 * np.square(mean)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of each variance."""
        return max(1, self.num - 1)
