"""Maps of the kernel of n tokens through an activation: E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for all pairs at once.

With Hermite coefficients a_k(q) = E[phi(sqrt(q) z) h_k(z)] for orthonormal Hermite polynomials h_k (Mehler's formula),

    E[phi(u) phi(v)] = sum_k a_k(q_u) a_k(q_v) c^k,   c the correlation of u and v.

The a_k of phi' are those of phi, as E[phi'(sqrt(q) z) h_k] = sqrt((k + 1) / q) a_{k+1}.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gradscope.meanfield.activations import Activation
from gradscope.meanfield.quadrature import DENSITY, FloatArray, Integral, exact, integrate, normal_edges

TERMS = 48  # Hermite coefficients; the rest is taken as one term c^TERMS, which is exact at c = 1
NODES = 9  # lengths at which coefficients are computed; others are interpolated in ln q


def correlations(kernel: FloatArray) -> FloatArray:
    """The correlations (n, n) of tokens with a kernel (n, n)."""
    length = np.sqrt(np.diag(kernel))
    return np.clip(kernel / np.outer(length, length), -1, 1)


def mean_square(kernel: FloatArray) -> float:
    """The mean square of an entry of the tokens: the mean of the diagonal."""
    return float(np.diag(kernel).mean())


def log10_mean_square(kernel: FloatArray) -> float:
    """log10 of `mean_square`; -inf for a zero kernel, such as that of a branch of weight 0."""
    with np.errstate(divide="ignore"):
        return float(np.log10(mean_square(kernel)))


def mean_overlap(kernel: FloatArray) -> float:
    """The mean correlation of two positions; NaN for one position or a zero kernel."""
    num = len(kernel)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((correlations(kernel).sum() - num) / (num * (num - 1))) if num > 1 else math.nan


def activation_kernels(activation: Activation, kernel: FloatArray) -> tuple[FloatArray, FloatArray]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)], each (n, n), for pre-activations with a kernel (n, n).

    The diagonals are accurate to 1e-8.  Where phi has a kink, other entries of the first are accurate to about 1e-4
    and those of the second to about 1e-2.
    """
    q, c = np.diag(kernel), correlations(kernel)
    low, high = math.log(q.min()), math.log(q.max())
    num = NODES if high - low > 1e-4 else 1
    x = np.cos((np.arange(num) + 0.5) * np.pi / num)
    nodes = (low + high) / 2 + (high - low) / 2 * x
    at_nodes = np.stack([_coefficients(activation, round(math.exp(node), 12)) for node in nodes])  # (nodes, TERMS + 3)
    place = (np.log(q) - (low + high) / 2) / max((high - low) / 2, 1e-300) if num > 1 else np.zeros_like(q)
    chebyshev = np.polynomial.chebyshev.chebvander
    found = (chebyshev(place, num - 1) @ np.linalg.solve(chebyshev(x, num - 1), at_nodes)).T
    a, square, slope = found[:-2], found[-2], found[-1]
    return _series(a, square, c), _series(np.sqrt(np.arange(1, TERMS + 1))[:, None] * a[1:] / np.sqrt(q), slope, c)


def _series(a: FloatArray, square: FloatArray, c: FloatArray) -> FloatArray:
    """sum_k a_k a_k c^k, with what is missing in ``square`` at c = 1 as the last term."""
    rest = np.sqrt(np.maximum(square - (a**2).sum(axis=0), 0))
    found = np.outer(rest, rest)
    for row in a[::-1]:
        found = found * c + np.outer(row, row)
    return found


@lru_cache(maxsize=4096)
def _coefficients(activation: Activation, q: float) -> FloatArray:
    """The Hermite coefficients a_0 .. a_TERMS, E[phi^2] and E[phi'^2] at length q."""
    scale = math.sqrt(q)

    def products(z: FloatArray, _: npt.NDArray[np.int64]) -> Integral:
        h = [np.ones_like(z), z]
        for k in range(1, TERMS):
            h.append((z * h[k] - math.sqrt(k) * h[k - 1]) / math.sqrt(k + 1))
        value, slope = activation(scale * z), activation.derivative(scale * z)
        rows = np.concatenate([np.stack(h) * value, value[None] ** 2, slope[None] ** 2])
        return exact(rows * DENSITY * np.exp(-np.square(z) / 2))

    edges = normal_edges([np.array([kink / scale]) for kink in (0.0, *activation.kinks)], (1,))
    found = integrate(products, edges)
    return found.checked(f"A Hermite coefficient of {activation.name} at length {q:.4g}")[:, 0]
