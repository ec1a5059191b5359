"""Derivatives and singular points of functions that are given by their values only."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradscope.meanfield.quadrature import FloatArray, Function

RANGES = (16.0, 512.0)  # callables are searched for kinks on [-r, r], at 2^16 points each
MOST = 64  # kinks that are kept per range, those nearest to 0
STEPS = tuple(0.01 / 4**k for k in range(9))
TINY = 1e-280  # slopes below do not matter
EPS = float(np.finfo(np.float64).eps)


def _weights(points: npt.NDArray[np.int64]) -> FloatArray:
    """Weights of the values at ``points`` in the derivative at 0 of the polynomial through them."""
    powers = np.vander(points.astype(np.float64), increasing=True).T
    return np.linalg.solve(powers, np.eye(len(points))[1])


# The derivative at one of seven equidistant points, and its error: the change without the point farthest away.
_SLOPES = np.stack([_weights(np.arange(7) - k) for k in range(7)])
_ERRORS = _SLOPES - np.stack(
    [np.insert(_weights(np.delete(np.arange(7), far) - k), far, 0) for k, far in enumerate([6, 6, 6, 6, 0, 0, 0])]
)


def derivative_of(name: str, function: Function, kinks: tuple[float, ...]) -> Function:
    """The derivative by differences of sixth order that reach across no kink.

    Steps shrink from 0.01 to 1e-7 until the error, estimated from differences of fifth order, is about 1e-10.
    """
    ends = np.array([-np.inf, *kinks, np.inf])

    def derivative(h: FloatArray) -> FloatArray:
        x = np.ravel(np.asarray(h, dtype=np.float64))
        place = np.searchsorted(ends, x, side="right")
        low, high = ends[place - 1], ends[place]
        best, error, good = np.zeros(x.shape), np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
        todo = np.arange(len(x))
        for step in STEPS:
            at = x[todo]
            stride = np.minimum(step, (high - low)[todo] / 8)
            # Points on the side of a kink; the margin keeps them off the kink itself, where the function may jump.
            before = np.clip(np.floor((at - low[todo]) / stride - 1e-6), 0, 6)
            after = np.clip(np.floor((high[todo] - at) / stride - 1e-6), 0, 6)
            left = np.where(after < 3, 6 - after, np.minimum(before, 3)).astype(np.int64)
            f = function(at[:, None] + stride[:, None] * (np.arange(7) - left[:, None]))
            rounding = 64 * EPS * np.abs(f).max(axis=1) / stride
            f = f - f[np.arange(len(f)), left, None]  # the slope of a constant is exactly 0
            slope, own = ((f * w[left]).sum(axis=1) / stride for w in (_SLOPES, _ERRORS))
            own, scale = np.abs(own) + rounding, np.abs(slope) + np.ptp(f, axis=1) / (6 * stride)
            done = own <= 1e-10 * scale + 2 * rounding
            better = done | (own < error[todo])
            best[todo[better]], error[todo[better]] = slope[better], own[better]
            good[todo] |= own <= 1e-6 * scale + 4 * rounding + TINY
            lost = ~np.isfinite(own)  # the function is not finite here, which quadrature refuses where it matters
            best[todo[lost]], good[todo[lost]] = np.nan, True
            todo = todo[~(done | lost)]
            if not len(todo):
                break
        if not good.all():
            raise ValueError(
                f"The derivative of activation {name!r} is not known near {x[~good][0]:.6g}. Name the points where it "
                "is not smooth as `kinks`, compute it in float64, or pass an `Activation` with its derivative."
            )
        return best.reshape(np.shape(h))

    return derivative


def find_kinks(function: Function) -> tuple[float, ...]:
    """Points on [-512, 512] where a function, its derivative or its second derivative seems to jump.

    Fourth differences are negligible where a function is smooth.  Ends of ranges in which they are not, such as narrow
    peaks, are returned too.
    """
    found: list[float] = []
    for inner, reach in zip((0.0, *RANGES), RANGES, strict=False):
        grid = np.linspace(-reach, reach, 2**16 + 1)[:-1]
        with np.errstate(all="ignore"):
            y = np.asarray(function(grid), dtype=np.float64)
            size = np.repeat(np.abs(y).reshape(-1, 64).max(axis=1), 64)[2:-2]
            rough = np.abs(np.diff(y, 4)) > 1e-9 * size
        edges = np.flatnonzero(np.diff(np.concatenate([[0], rough.astype(np.int8), [0]])))
        runs = [(grid[start], grid[end + 3]) for start, end in edges.reshape(-1, 2)]
        runs = [(a, b) for a, b in runs if max(abs(a), abs(b)) > inner]
        step = grid[1] - grid[0]
        for a, b in sorted(runs, key=lambda run: min(abs(run[0]), abs(run[1])))[:MOST]:
            found += [_locate(function, a, b)] if b - a < 12 * step else [float(a), _locate(function, a, b), float(b)]
    ordered = sorted(x for x in found if abs(x) < RANGES[-1])
    return tuple(x for n, x in enumerate(ordered) if n == 0 or x - ordered[n - 1] > 1e-9 * max(1.0, abs(x)))


def _locate(function: Function, low: float, high: float) -> float:
    """The point of [low, high] with the largest fourth difference on ever finer grids."""
    for _ in range(16):
        grid = np.linspace(low, high, 65)
        with np.errstate(all="ignore"):
            y = np.asarray(function(grid), dtype=np.float64)
        rough = np.abs(np.diff(y, 4))
        n = int(np.argmax(np.nan_to_num(rough)))
        if not rough[n] > 64 * EPS * np.abs(y[n : n + 5]).max() or high - low <= 8 * EPS * max(abs(low), abs(high)):
            break
        low, high = float(grid[n]), float(grid[n + 4])
    middle = (low + high) / 2
    near = round(middle, 6) + 0.0  # kinks are mostly named by short numbers; -0 becomes 0
    return near if abs(middle - near) <= max((high - low) / 2, 1e-13) else middle


def jumps_at(function: Function, kink: float) -> bool:
    """Whether a function jumps at a kink."""
    step = 1e-9 * max(1.0, abs(kink))
    with np.errstate(all="ignore"):
        y = function(kink + step * np.array([-1e3, -1.0, 1.0, 1e3]))
    return bool(math.isfinite(y[2] - y[1]) and abs(y[2] - y[1]) > 0.1 * np.ptp(y) > 1e-7 * np.abs(y).max())
