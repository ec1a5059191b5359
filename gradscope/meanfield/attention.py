"""Attention with random weights at infinite width: what it does to the kernel of the tokens, and to that of gradients.

The kernel of a sequence of T tokens is the T x T matrix C of inner products, C_ts = x_t . x_s / width.  Scores of an
infinitely wide head are Gaussian, with covariance sigma^2 C_tt' C_ss' between (query t, key s) and (t', s').  sigma^2
is the score variance: that of q . k / sqrt(head width) for tokens of mean square 1.  Let A be the softmax over the
keys s <= t (causal), or over all keys.  With value and output weights of variance v,

    forward   C -> v E[A C A^T]
    backward  G -> v E[A^T G A]  (values)  + the derivative of A  (queries and keys)

where G_tt' is the covariance, per entry, of the gradients at two positions.

To first order in the scores, E[A_ts A_t's'] = (1 + a_tt' D_ss') / (t t') with a_tt' = sigma^2 C_tt', where D is C
centered over the keys of t and over those of t'.  Here a_tt' is such that E[sum_s A_ts^2] (t = t') is exact at
any sigma, if all keys have the same length and any two of them the same overlap.  The derivative of A is that of
uniform A, times a factor.  For such keys, the factor is exact if the gradients of different positions are independent.
All sums over pairs of positions are cumulative sums of T x T matrices.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import numpy as np

from gradscope.choices import Probability, Range, checked
from gradscope.meanfield.quadrature import FloatArray

LARGEST = 20.0  # standard deviation of scores; beyond, attention is a hard choice of one key
STEP, REACH = 0.25, 9.0  # trapezoidal sums: step in ln u, and end in standard deviations of a score
Scores = Annotated[float, Range("a number from 0 to 1e6", lambda number: 0 <= number <= 1e6)]
TINY = 1e-6  # variances below need no correction


class SoftmaxMoments(NamedTuple):
    """Moments of softmax weights A_s: ``square`` E[sum A^2]; ``slope`` E[sum A^2 (1 - 2 A + sum A^2)].

    ``slope`` is the sum of the squared derivatives dA_s / d score_s', averaged over the scores.
    """

    square: FloatArray
    slope: FloatArray


def softmax_moments(variance: FloatArray, keys: FloatArray) -> SoftmaxMoments:
    """The `SoftmaxMoments` (n,) over independent Gaussian scores of ``variance`` (n,), of ``keys`` (n,) keys each.

    With Z = sum exp(s) and 1 / Z^k = integral u^k exp(-u Z) d(ln u) / (k - 1)!, the scores separate: expectations are
    integrals over ln u of expectations over one score.  Both are trapezoidal sums, which converge exponentially.
    """
    found = []
    for b, n in zip(np.sqrt(variance), keys, strict=True):
        z = np.arange(-REACH, REACH, STEP / max(b, 0.5))
        density = np.exp(-np.square(z) / 2)
        density /= density.sum()
        log_u = np.arange(-REACH * b - 25.0, REACH * b + 6.0, STEP)
        w = np.exp(np.minimum(log_u[:, None] + b * z, 6.0))  # exp(-exp(6)) is 0
        f = np.exp(-w)
        none, two, three, four = (np.maximum(w**k * f @ density, 1e-300) for k in (0, 2, 3, 4))
        others, rest = none ** (n - 1), none ** max(n - 2, 0)
        square, cube = n * (two * others).sum(), n * (three * others).sum() / 2
        fourth = (n * four * others + n * (n - 1) * two**2 * rest).sum() / 6  # E (sum A^2)^2
        found.append((square * STEP, (square - 2 * cube + fourth) * STEP))
    return SoftmaxMoments(*np.array(found).T)


class RandomAttention(NamedTuple):
    """Mean square and overlap (cosine) of outputs of attention over random tokens; returned by `random_attention`.

    >>> random_attention(0.5, beta=0)  # without scores, every output is the mean of all values
    RandomAttention(mean_square=0.5, overlap=1.0)
    """

    mean_square: float
    """Mean square of the output, divided by that of the values."""
    overlap: float
    """Overlap (cosine) of two outputs."""


@checked
def critical_score(overlap: Probability) -> float:
    """Value of beta, sqrt(2 / (1 - overlap)), above which attention to infinitely many keys concentrates on a few.

    Scores have variance beta^2 ln(keys).  ``overlap`` is the cosine of any two tokens.

    >>> critical_score(0.5)
    2.0
    """
    return math.sqrt(2 / (1 - overlap)) if overlap < 1 else math.inf


@checked
def random_attention(overlap: Probability, beta: Scores, keys: float = math.inf) -> RandomAttention:
    """Mean square and cosine of the outputs of attention, for tokens with equal lengths and equal pairwise cosines.

    The cosine of two vectors is called overlap.  Any two tokens have the overlap p = ``overlap``.  Scores have variance
    beta^2 ln(keys), so scores of variance 1 have beta = 1 / sqrt(ln(keys)).  Let A be the attention weights of one
    query, and A' those of another query.  Let Y = E[sum A^2] and Y' = E[sum A A'], with sums over the keys.
    The outputs of attention then have:

        mean square   p + (1 - p) Y, if the values have mean square 1
        overlap       (p + (1 - p) Y') / (p + (1 - p) Y)

    For infinitely many keys, Y = max(0, 1 - beta_c / beta) with beta_c = `critical_score`, and Y' = 0 (random energy
    model).  For finitely many keys, Y is exact.  Y' is approximately e^(x p) / (keys - 1 + e^(x p)), where x solves
    Y = e^x / (keys - 1 + e^x).

    Raises:
        ValueError: There is less than one key, or scores have a standard deviation above 20.

    Reference: Giorlandino and Goldt (2025), "Two failure modes of deep transformers", arXiv:2505.24333.

    >>> random_attention(0.5, beta=4.0)
    RandomAttention(mean_square=0.75, overlap=0.6666666666666666)
    >>> round(random_attention(0.5, beta=4.0, keys=1000).mean_square, 3)
    0.787
    """
    if not keys >= 1:
        raise ValueError(f"keys must be at least 1, got {keys!r}.")
    if keys == math.inf:
        critical = critical_score(overlap)
        square = overlap + (1 - overlap) * (1 - critical / beta if beta > critical else 0.0)
        return RandomAttention(square, overlap / square if square else 0.0)
    variance = beta**2 * math.log(keys) * (1 - overlap)
    _, exponent = _moments(np.array([variance]), np.array([float(keys)]))
    weights = np.exp(exponent * np.array([1.0, overlap]))
    own, other = overlap + (1 - overlap) * weights / (keys - 1 + weights)
    return RandomAttention(float(own), float(other / own))


def _moments(variance: FloatArray, keys: FloatArray) -> tuple[SoftmaxMoments, FloatArray]:
    """The moments (n,), and x (n,) such that E[sum A^2] = e^x / (keys - 1 + e^x); x is ``variance`` if that is tiny."""
    if (worst := math.sqrt(variance.max())) > LARGEST:
        raise ValueError(
            f"Scores have standard deviation {worst:.3g}; beyond {LARGEST:g} attention picks single keys, which this "
            "theory does not cover. Lower score_variance or beta, or normalize what attention receives."
        )
    moments = softmax_moments(variance, keys)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.log(moments.square * (keys - 1) / (1 - moments.square))
    return moments, np.where((keys > 1) & (variance > TINY), exponent, variance)


class Attention:
    """Attention with random weights on tokens of a kernel C (T, T); value and output weights have variance 1.

    ``output``: the kernel (T, T) of what attention writes.

    Cost: some twenty cumulative sums over (T, T), and the softmax moments of T positions.
    """

    def __init__(self, kernel: FloatArray, score_variance: float, *, causal: bool) -> None:
        self.kernel, self.causal = kernel, causal
        keys = self._sum(np.ones(len(kernel)))
        self.keys, self.pairs = keys, np.outer(keys, keys)
        self.mean = self._both(kernel) / self.pairs
        half = self._sum(self._sum(kernel, axis=1) ** 2) / keys
        # The mean over s and s' of C_ss' D_ss', for each pair of queries.
        self.centered = (self._both(kernel**2) - half - half.T) / self.pairs + self.mean**2

        lengths, others = np.diag(kernel), np.maximum(keys - 1, 1)
        spread = np.maximum(self._sum(lengths) / keys - np.diag(self.mean), 0) * keys / others
        variance = score_variance * lengths * spread
        moments, exponent = _moments(variance, keys)
        correlation = kernel / np.sqrt(np.outer(lengths, lengths))
        alone = keys == 1  # the softmax of one score is constant
        slope = np.where(alone, 1, moments.slope * keys**2 / others)
        self.slopes = score_variance * np.sqrt(np.outer(slope, slope)) ** correlation
        x, b = (correlation * np.sqrt(np.outer(v, v)) for v in (exponent, variance))
        num, small = np.sqrt(self.pairs), np.abs(b) < TINY
        grown = num * np.expm1(x) / (num + np.expm1(x))
        self.weights = score_variance * kernel * np.where(small, 1, grown) / np.where(small, 1, b)
        self.output = self.mean + self.weights * self.centered

    def backward(self, gradient: FloatArray) -> FloatArray:
        """The kernel (T, T) of gradients at the tokens, for that of gradients at the output."""
        gradient = (gradient + gradient.T) / 2  # an antisymmetric rounding error would grow from block to block
        queries = self.slopes * self.centered * gradient
        gradient = gradient / self.pairs
        values_and_keys = self._spread((self.weights + self.slopes * self.kernel) * gradient)
        return self._both(gradient, adjoint=True) + values_and_keys + queries

    def _spread(self, weights: FloatArray) -> FloatArray:
        """sum over t and t' of weights_tt' D_ss', for each pair of keys."""
        means = self._sum(self.kernel) / self.keys[:, None]  # over the keys of t, (t, s')
        side = self._sum(means * self._sum(weights, axis=1, adjoint=True), adjoint=True)
        both = self._both(weights, adjoint=True)
        return self.kernel * both - side - side.T + self._both(weights * self.mean, adjoint=True)

    def _sum(self, values: FloatArray, axis: int = 0, *, adjoint: bool = False) -> FloatArray:
        """Sums over the keys of each query; with ``adjoint`` over the queries of each key."""
        if not self.causal:
            return np.broadcast_to(values.sum(axis, keepdims=True), values.shape)
        return np.flip(np.flip(values, axis).cumsum(axis), axis) if adjoint else values.cumsum(axis)

    def _both(self, values: FloatArray, *, adjoint: bool = False) -> FloatArray:
        return self._sum(self._sum(values, 0, adjoint=adjoint), 1, adjoint=adjoint)
