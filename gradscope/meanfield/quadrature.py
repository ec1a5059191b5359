"""Expectations over Gaussians and spheres by adaptive quadrature; each knows its error, and is refused beyond 1e-8.

Panels end at the known kinks.  A panel with 16 Gauss-Legendre nodes is halved until its error is negligible.  The error
of a panel is estimated from the polynomial through its nodes.  The last four coefficients of its Legendre series decay
fast where the integrand is smooth, and slowly where it is not.  Its values at the ends of the panel are compared with
the integrand, which reveals a kink between the outermost node and the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from gradscope.choices import Cosine, Finite, FiniteNumbers, Lengths, Nonnegative, checked, shown

FloatArray = npt.NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]
ACCURACY = 1e-8  # largest error that is accepted, relative to the expectation of the absolute value
# Gaussians are cut off at this many standard deviations, which leaves out less than 1e-22 of their mass.
REACH = 10.0
FAR = 37.0  # the same for functions that grow so fast that they need it; beyond, densities leave the range of float64
# Panels end at the points EVERY (in standard deviations) and BENDS (arguments at which activations bend).
EVERY = (-7.5, -6.0, -4.5, -3.0, -1.5, 1.5, 3.0, 4.5, 6.0, 7.5)
BENDS = (-16.0, -8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
PANELS, NESTED = 2**14, 2**7  # largest number of panels of an integral, and of each of two nested integrals
AIM = 1e-9  # panels are halved until the error is below this
BLOCK = 4096  # panels that are evaluated together
DENSITY = 1 / np.sqrt(2 * np.pi)

_GAUSS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_SERIES = (np.polynomial.legendre.legvander(_GAUSS, 15) * (np.arange(16) + 0.5) * _WEIGHTS[:, None]).T
_ENDS = np.array([-1.0, 1.0]) * (1 - 1e-9)  # not the very ends, where the integrand may jump
_NODES = np.append(_GAUSS, _ENDS)
# Errors from values at all nodes: the last coefficients (times 2, the width), and mismatches (times the width beyond).
_ERRORS = np.zeros((18, 6))
_ERRORS[:16, :4] = 2 * _SERIES[12:].T
_ERRORS[:16, 4:] = -(1 + _GAUSS[0]) * (np.polynomial.legendre.legvander(_ENDS, 15) @ _SERIES).T
_ERRORS[16:, 4:] = (1 + _GAUSS[0]) * np.eye(2)


class Integral(NamedTuple):
    """Integrals with error estimates, and the integrals of the absolute values; arrays of one shape."""

    value: FloatArray
    error: FloatArray
    size: FloatArray

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Whether the error is at most 1e-8 of the integral of the absolute value."""
        return np.asarray(self.error <= ACCURACY * self.size)

    def checked(self, what: str) -> FloatArray:
        """The values.  Raises ValueError if one of them is not known to 1e-8."""
        if not self.known.all():
            lost = np.isinf(self.error).any()
            with np.errstate(all="ignore"):
                worst = np.nanmax(np.where(self.known, 0.0, self.error / self.size))
            raise ValueError(
                f"{what} is not known: the function is not finite there."
                if lost
                else f"{what} is known to {worst:.1g} only, not to {ACCURACY:g}: the function grows or oscillates too "
                "fast, is rounded, or has singular points. Compute in float64, name kinks, or choose other lengths."
            )
        return self.value


# Values, errors and absolute values (c, panels, nodes) of c integrands at the nodes of some panels; see `integrate`.
Integrand = Callable[[FloatArray, npt.NDArray[np.int64]], Integral]


def exact(values: FloatArray) -> Integral:
    """Values without errors."""
    return Integral(values, np.zeros_like(values), np.abs(values))


def integrate(function: Integrand, edges: FloatArray, most: int = PANELS) -> Integral:
    """The integrals (c, n) of c functions over n ranges, whose first panels end at ``edges`` (n, k), sorted.

    ``function(x, owner)`` gets nodes (p, 18) of p panels and the ranges (p,) that they belong to.  It returns values,
    errors and absolute values (c, p, 18).  An integral has the error infinity if it meets a value that is not finite.
    ``most`` bounds the number of panels per range.
    """
    num = len(edges)
    left, right = edges[:, :-1].ravel(), edges[:, 1:].ravel()
    owner = np.repeat(np.arange(num), edges.shape[1] - 1)
    wide = right > left
    left, right, owner = left[wide], right[wide], owner[wide]
    total, used = None, np.zeros(num, dtype=np.int64)
    while True:
        parts = [
            _panels(function, left[n : n + BLOCK], right[n : n + BLOCK], owner[n : n + BLOCK])
            for n in range(0, max(len(left), 1), BLOCK)
        ]
        found = np.concatenate(parts, axis=2)  # value, error, size of each panel
        total = np.zeros((*found.shape[:2], num)) if total is None else total
        sums = np.stack([[np.bincount(owner, row, num) for row in rows] for rows in found])
        used += np.bincount(owner, minlength=num)
        size = (total + sums)[2][:, owner]
        middle = (left + right) / 2
        narrow = (right - left) <= 1e-15 * np.maximum(np.abs(left), np.abs(right))
        split = (found[1] * np.maximum(used[owner], 32) > AIM * size).any(axis=0) & ~narrow & (used[owner] < most)
        split &= np.isfinite(found[1]).all(axis=0)
        kept = np.where(split, 0.0, found)
        total += np.stack([[np.bincount(owner, row, num) for row in rows] for rows in kept])
        if not split.any():
            return Integral(*total)
        left, right, owner = left[split], right[split], owner[split]
        middle = middle[split]
        left, right, owner = np.append(left, middle), np.append(middle, right), np.append(owner, owner)


def _panels(function: Integrand, left: FloatArray, right: FloatArray, owner: npt.NDArray[np.int64]) -> FloatArray:
    """Value, error and size (3, c, p) of the integrals over single panels."""
    half, middle = (right - left) / 2, (right + left) / 2
    with np.errstate(all="ignore"):
        f = function(middle[:, None] + half[:, None] * _NODES, owner)
        rows = np.stack([part[..., :16] @ _WEIGHTS for part in f])
        rows[1] += np.sqrt(np.square(f.value @ _ERRORS).sum(axis=-1))
        rows *= half
    finite = np.isfinite(rows).all(axis=0)
    return np.where(finite, rows, np.array([0.0, np.inf, 0.0])[:, None, None])


def normal_edges(breaks: Sequence[FloatArray], shape: tuple[int, ...], reach: float = REACH) -> FloatArray:
    """Ends of panels (*shape, k) for E[f(z)] over standard normal z; also at ``breaks``, arrays of shape ``shape``."""
    every = (-reach, -REACH, *EVERY, REACH, reach)
    return np.sort(
        np.stack([np.full(shape, end) for end in every] + [np.clip(b, -reach, reach) for b in breaks], axis=-1), axis=-1
    )


def expectation(
    function: Callable[[FloatArray], Integral], scale: npt.ArrayLike = 1.0,
    kinks: Sequence[float] = (), shift: npt.ArrayLike = 0.0, most: int = PANELS,
) -> Integral:  # fmt: skip
    """`gaussian` with its error estimate, and without a refusal, for a function with errors."""
    s, m = np.broadcast_arrays(np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64))
    shape, s, m = s.shape, s.ravel(), m.ravel()
    breaks = [(bend - m) / np.maximum(s, 1e-300) for bend in {*BENDS, *kinks}]

    def over(reach: float, chosen: npt.NDArray[np.int64]) -> tuple[Integral, npt.NDArray[np.bool_]]:
        def weighted(z: FloatArray, owner: npt.NDArray[np.int64]) -> Integral:
            f = function(m[chosen][owner, None] + s[chosen][owner, None] * z)
            density = DENSITY * np.exp(-np.square(z) / 2)
            return Integral(*((part * density)[None] for part in f))

        found = integrate(weighted, normal_edges([b[chosen] for b in breaks], chosen.shape, reach), most)
        # The tails left out: |f| at the ends times the mass beyond, of which exponential growth makes a few times more.
        with np.errstate(all="ignore"):
            ends = np.stack([m[chosen] - reach * s[chosen], m[chosen] + reach * s[chosen]], axis=-1)
            tails = function(ends).size.sum(axis=-1) * DENSITY * np.exp(-(reach**2) / 2)
            error = found.error[0] + np.where(np.isfinite(tails), tails, np.inf)
            return Integral(found.value[0], error, found.size[0]), tails > 1e-12 * found.size[0]

    found, heavy = over(REACH, np.arange(s.size))
    if heavy.any():
        for mine, further in zip(found, over(FAR, np.flatnonzero(heavy))[0], strict=True):
            mine[heavy] = further
    return Integral(*(part.reshape(shape) for part in found))


def _check_function(name: str, function: Function) -> None:
    """Raise ValueError if the function does not map an array to an array of numbers of the same shape."""
    try:
        found = np.asarray(function(np.array([-1.0, 0.3, 1.1])))
        right = found.shape == (3,) and found.dtype.kind in "biuf"
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} does not take an array of float64: {error}") from error
    if not right:
        raise ValueError(f"{name} must map 3 numbers to 3 numbers, got {shown(found)}.")


@checked
def gaussian(
    function: Function, scale: Lengths = 1.0, kinks: Sequence[Finite] = (), shift: FiniteNumbers = 0.0
) -> FloatArray:
    """Return the expectation E[function(shift + scale z)] over z ~ N(0, 1), for each entry of ``scale`` and ``shift``.

    ``kinks`` are known points where the function is not smooth.  Other kinks are found by bisection.  Kinks that are
    closer together than about ``scale`` / 20 must be given.  Cost: about 250 evaluations of a smooth function.

    Raises:
        ValueError: The estimated error exceeds 1e-8 E|function|.

    >>> gaussian(np.cos, [0.0, 1.0]).round(6)  # exp(-scale^2 / 2)
    array([1.      , 0.606531])
    """
    _check_function("function", function)
    found = expectation(lambda h: exact(function(h)), scale, kinks, shift)
    where = f"standard deviation {np.max(scale):.4g} and shift {np.max(shift):.4g}"
    return found.checked(f"A Gaussian expectation at {where}")


@checked
def gaussian_pair(
    first: Function, second: Function, scale: Nonnegative, correlation: Cosine, kinks: Sequence[Finite] = ()
) -> float:
    """Return E[first(u) second(v)] over normal u and v with standard deviation ``scale`` and the given ``correlation``.

    Raises:
        ValueError: The estimated error exceeds 1e-8 E|first(u) second(v)|.

    >>> round(gaussian_pair(np.sign, np.sign, 1.0, 0.5, kinks=(0.0,)), 6)  # (2 / pi) arcsin(correlation)
    0.333333
    """
    _check_function("first", first)
    _check_function("second", second)
    if abs(correlation) >= 1:
        sign = np.sign(correlation)
        return float(gaussian(lambda h: first(h) * second(sign * h), scale, (*kinks, *(-k for k in kinks))))
    spread = np.sqrt((1 - correlation) * (1 + correlation))
    bends = list(kinks)
    if correlation:
        # As a function of u, the integral over v bends near each kink, within about sqrt(1 - correlation^2).
        width = scale * spread / abs(correlation)
        bends += [kink / correlation + width * far for kink in kinks for far in (-8.0, -2.0, 0.0, 2.0, 8.0)]

    def over_v(u: FloatArray) -> Integral:
        value, error, size = expectation(lambda h: exact(second(h)), scale * spread, kinks, correlation * u, NESTED)
        f = first(u)
        return Integral(f * value, np.abs(f) * error, np.abs(f) * size)

    found = expectation(over_v, scale, bends, most=NESTED)
    return float(found.checked(f"An expectation over pairs of correlation {correlation:.6g}"))


def sphere_pair(
    function: Callable[[FloatArray, FloatArray], FloatArray], dimension: int, kinks: Sequence[float], correlation: float
) -> FloatArray:
    """Means (c,) of c functions of two coordinates (s, t) of a uniformly random point on the unit sphere.

    ``function`` returns an array (c, \\*shape) for s and t of one shape.  t = correlation s + sqrt(1 - correlation^2)
    s', where s' is a coordinate orthogonal to s.  Angles parametrize s and s'.  Panels end where s or t meets a kink.
    The sphere lies in R^dimension, with ``dimension`` at least 3.

    Raises:
        ValueError: The estimated error exceeds 1e-8 of the mean absolute value.
    """

    def split(cosines: FloatArray) -> FloatArray:
        return np.arcsin(np.clip(cosines, -1, 1))

    # Densities fall off within about 1 / sqrt(dimension), so the angles need only a range of this order.
    reach = min(np.pi / 2, REACH / np.sqrt(max(dimension - 2, 1)))
    every = np.array([-REACH, *EVERY, 0.0, REACH]) / REACH
    theta = np.arcsin(correlation)
    ends = [*(every * reach)]
    for kink in kinks:
        # At the first of these angles s meets the kink; at the other four the kink leaves the range of t.
        away = np.arccos(np.clip([kink, -kink], -1, 1))
        ends += [split(np.array(kink)), theta - away[0], theta + away[0], -theta - away[1], -theta + away[1]]

    def over_t(alpha: FloatArray, _: npt.NDArray[np.int64]) -> Integral:
        s = np.sin(alpha).ravel()
        radius = np.cos(alpha).ravel() * np.sqrt(1 - correlation**2)
        inner = [np.full(s.shape, fraction * reach) for fraction in every]
        for kink in kinks:
            inner.append(np.clip(split((kink - correlation * s) / np.maximum(radius, 1e-300)), -reach, reach))

        def at(beta: FloatArray, owner: npt.NDArray[np.int64]) -> Integral:
            t = correlation * s[owner, None] + radius[owner, None] * np.sin(beta)
            weight = np.cos(beta) ** (dimension - 3) / _mass(dimension - 3)
            return exact(function(np.broadcast_to(s[owner, None], t.shape), t) * weight)

        found = integrate(at, np.sort(np.stack(inner, axis=-1), axis=-1), NESTED)
        weight = np.cos(alpha) ** (dimension - 2) / _mass(dimension - 2)
        return Integral(*(part.reshape(-1, *alpha.shape) * weight for part in found))

    found = integrate(over_t, np.sort(np.clip(np.array(ends), -reach, reach))[None], NESTED)
    return found.checked(f"An expectation over a sphere of dimension {dimension - 1}")[:, 0]


def _mass(power: int) -> float:
    """The integral of cos(x)^power over [-pi / 2, pi / 2]."""
    return float(np.sqrt(np.pi) * np.exp(special.gammaln((power + 1) / 2) - special.gammaln(power / 2 + 1)))
