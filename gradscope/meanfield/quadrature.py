"""Expectations over Gaussians and spheres, for functions with kinks; no quadrature panel reaches across a kink."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]

# Gaussians are cut off at this many standard deviations, which leaves out less than 1e-22 of their mass.
REACH = 10.0
# Panels end at the points EVERY (in standard deviations) and BENDS (arguments at which activations bend).
EVERY, BENDS = (-6.0, -3.0, 3.0, 6.0), (-16.0, -8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
QUARTERS = tuple(k / 4 for k in range(-3, 4))
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def panels(breaks: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gauss-Legendre nodes and weights (..., 32 (k - 1)): two panels between neighboring breaks (..., k), sorted."""
    left, right = breaks[..., :-1, None], breaks[..., 1:, None]
    edges = left + (right - left) * np.array([0, 0.5, 1])
    half = (edges[..., 1:] - edges[..., :-1]) / 2
    middle = (edges[..., 1:] + edges[..., :-1]) / 2
    flat = (*breaks.shape[:-1], -1)
    return (middle[..., None] + half[..., None] * _NODES).reshape(flat), (half[..., None] * _WEIGHTS).reshape(flat)


def gaussian(
    function: Function, scale: npt.ArrayLike = 1.0, kinks: Sequence[float] = (), shift: npt.ArrayLike = 0.0
) -> FloatArray:
    """The expectation E[function(shift + scale z)] over standard normal z, for each entry of ``scale`` and ``shift``.

    ``kinks`` are the points where the function is not smooth.  The relative error is about 1e-12 for functions that
    grow moderately.  Cost: 512 evaluations, plus 32 per kink.

    >>> gaussian(np.cos, [0.0, 1.0]).round(6)  # exp(-scale^2 / 2)
    array([1.      , 0.606531])
    """
    s, m = np.broadcast_arrays(np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64))
    z, w = normal_nodes([(bend - m) / np.maximum(s, 1e-300) for bend in {*BENDS, *kinks}], s.shape)
    return np.asarray((w * function(m[..., None] + s[..., None] * z)).sum(axis=-1))


def normal_nodes(breaks: Sequence[FloatArray], shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights for E[f(z)] over standard normal z; panels end at ``breaks``, arrays of shape ``shape``."""
    ends = [np.full(shape, end) for end in (-REACH, *EVERY, REACH)] + [np.clip(b, -REACH, REACH) for b in breaks]
    z, w = panels(np.sort(np.stack(ends, axis=-1), axis=-1))
    return z, w * np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)


def gaussian_pair(
    first: Function, second: Function, scale: float, correlation: float, kinks: Sequence[float] = ()
) -> float:
    """E[first(u) second(v)] for normal u and v with standard deviation ``scale`` and correlation ``correlation``.

    The relative error is about 1e-10.

    >>> round(gaussian_pair(np.sign, np.sign, 1.0, 0.5, kinks=(0.0,)), 6)  # (2 / pi) arcsin(correlation)
    0.333333
    """
    if abs(correlation) >= 1:
        sign = np.sign(correlation)
        return float(gaussian(lambda h: first(h) * second(sign * h), scale, (*kinks, *(-k for k in kinks))))
    spread = np.sqrt((1 - correlation) * (1 + correlation))
    breaks = [bend / scale for bend in {*BENDS, *kinks}]
    if correlation:
        # As a function of u, the integral over v bends near each kink, within about sqrt(1 - correlation^2).
        width = spread / abs(correlation)
        breaks += [kink / scale / correlation + width * far for kink in kinks for far in (-8.0, -2.0, 0.0, 2.0, 8.0)]
    u, w = normal_nodes([np.array(b) for b in breaks], ())
    inner = gaussian(second, scale * spread, kinks, scale * correlation * u)
    return float((w * first(scale * u) * inner).sum())


def sphere_pair_nodes(
    dimension: int, first_kinks: Sequence[float], correlation: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes (s, t) and weights for two coordinates of a uniformly random point on the unit sphere of R^dimension.

    t = correlation s + sqrt(1 - correlation^2) s', where s' is a coordinate orthogonal to s.  Angles parametrize s and
    s'.  Panels end where s or t meets a kink.  ``dimension`` is at least 3.
    """

    def split(cosines: FloatArray) -> FloatArray:
        return np.arcsin(np.clip(cosines, -1, 1))

    # Densities fall off within about 1 / sqrt(dimension), so the angles need only a range of this order.
    reach = min(np.pi / 2, REACH / np.sqrt(max(dimension - 2, 1)))
    theta = np.arcsin(correlation)
    ends = [-reach, reach, *(fraction * reach for fraction in QUARTERS)]
    for kink in first_kinks:
        # At the first of these angles s meets the kink; at the other four the kink leaves the range of t.
        away = np.arccos(np.clip([kink, -kink], -1, 1))
        ends += [split(np.array(kink)), theta - away[0], theta + away[0], -theta - away[1], -theta + away[1]]
    alpha, w = panels(np.sort(np.clip(np.array(ends), -reach, reach)))
    w = w * np.cos(alpha) ** (dimension - 2)
    s = np.sin(alpha)
    radius = np.cos(alpha) * np.sqrt(1 - correlation**2)
    inner = [np.full(s.shape, fraction * reach) for fraction in (-1.0, *QUARTERS)]
    for kink in first_kinks:
        inner.append(np.clip(split((kink - correlation * s) / np.maximum(radius, 1e-300)), -reach, reach))
    beta, v = panels(np.sort(np.stack([*inner, np.full(s.shape, reach)], axis=-1), axis=-1))
    v = v * np.cos(beta) ** (dimension - 3)
    weights = w[:, None] * v / v.sum(axis=1, keepdims=True) / w.sum()
    t = correlation * s[:, None] + radius[:, None] * np.sin(beta)
    return np.broadcast_to(s[:, None], t.shape), t, weights
