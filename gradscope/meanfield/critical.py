"""Initializations at which gradients neither grow nor vanish, and the gain for any wished growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from gradscope.meanfield.activations import Activation, Function, as_activation
from gradscope.meanfield.maps import second_moment, slope_moment

FloatArray = npt.NDArray[np.float64]

LEAST, MOST = 1e-10, 1e4


@dataclass(frozen=True)
class CriticalPoint:
    """sigma_w^2, sigma_b^2 and the fixed point q* of the length at which chi_1 is as asked."""

    weight_variance: float
    bias_variance: float
    length: float


def critical_point(
    activation: str | Function | Activation, bias_variance: float = 0.0, chi: float = 1.0
) -> CriticalPoint:
    """The weight variance at which chi_1 = sigma_w^2 E[phi'(sqrt q* z)^2] is ``chi``, for a bias variance.

    Without a bias a homogeneous activation (ReLU, linear) is critical at any length, q* = 1 here; others only in the
    limit q* -> 0, where sigma_w^2 = chi / phi'(0)^2 (length 0).  Along q* the line of critical points is
    sigma_w^2 = chi / E[phi'^2], sigma_b^2 = q* - sigma_w^2 E[phi^2] (Schoenholz et al. 2017, arXiv:1611.01232).

    Raises:
        ValueError: A negative bias variance, or no fixed point with that slope.
    """
    phi = as_activation(activation)
    if not (math.isfinite(bias_variance) and bias_variance >= 0):
        raise ValueError(f"bias_variance must be a finite number >= 0, got {bias_variance!r}.")
    if not (math.isfinite(chi) and chi > 0):
        raise ValueError(f"chi must be a positive number, got {chi!r}.")

    def bias(log_q: float) -> float:
        """Bias variance that belongs to a length, relative to it."""
        q = math.exp(log_q)
        return 1 - chi / float(slope_moment(phi, q)) * float(second_moment(phi, q)) / q

    grid = np.linspace(math.log(LEAST), math.log(MOST), 141)
    values = np.array([bias(x) for x in grid])
    if bias_variance == 0:
        if np.abs(values).max() < 1e-9:
            return CriticalPoint(chi / float(slope_moment(phi, 1.0)), 0.0, 1.0)
        at_zero = float(slope_moment(phi, 1e-16))
        if abs(values[0]) < 1e-6 and at_zero > 0:
            return CriticalPoint(chi / at_zero, 0.0, 0.0)

    def excess(log_q: float) -> float:
        return math.exp(log_q) * bias(log_q) - bias_variance

    found = np.array([excess(x) for x in grid])
    crossings = [n for n in range(len(grid) - 1) if found[n] < 0 <= found[n + 1] or found[n] > 0 >= found[n + 1]]
    if not crossings:
        raise ValueError(
            f"No weight variance gives {phi.name} chi_1 = {chi:g} at bias_variance={bias_variance:g}: its "
            "slopes are too small or lengths have no fixed point there. Try another bias variance."
        )
    q = math.exp(brentq(excess, grid[crossings[0]], grid[crossings[0] + 1], xtol=1e-14))
    return CriticalPoint(chi / float(slope_moment(phi, q)), bias_variance, q)


def critical_line(
    activation: str | Function | Activation, lengths: Sequence[float] | FloatArray | None = None
) -> list[CriticalPoint]:
    """Points with chi_1 = 1, one for each length q* (default 60, 1e-4 to 10), where the bias variance is >= 0."""
    phi = as_activation(activation)
    points = []
    for q in np.logspace(-4, 1, 60) if lengths is None else lengths:
        weight = 1 / float(slope_moment(phi, q))
        bias = float(q) - weight * float(second_moment(phi, q))
        if bias >= -1e-12 * q:
            points.append(CriticalPoint(weight, max(bias, 0.0), float(q)))
    if not points:
        raise ValueError(f"{phi.name} is critical at none of these lengths with a bias variance >= 0.")
    return points


def weight_gain(activation: str | Function | Activation, rate: float = 1.0, bias_variance: float = 0.0) -> float:
    """Gain g, weights of standard deviation g / sqrt(fan_in), at which squared gradients grow by ``rate`` a layer."""
    return math.sqrt(critical_point(activation, bias_variance, rate).weight_variance)


@dataclass(frozen=True)
class PhaseDiagram:
    """chi_1 at the fixed point on a grid: ``chi_1[i, j]`` at ``weight_variances[i]``, ``bias_variances[j]``.

    ``length``, ``correlations`` (xi_c) likewise; NaN where lengths grow without bound.
    """

    activation: str
    weight_variances: FloatArray
    bias_variances: FloatArray
    chi_1: FloatArray
    length: FloatArray


def phase_diagram(
    activation: str | Function | Activation, weight_variances: npt.ArrayLike, bias_variances: npt.ArrayLike
) -> PhaseDiagram:
    """chi_1 and q* over all pairs of variances; above 1 gradients explode (chaos), below they vanish (order).

    Cost: some hundred vectorized evaluations of the length map.

    Raises:
        ValueError: A variance that is negative or not finite.
    """
    phi = as_activation(activation)
    weights, biases = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (weight_variances, bias_variances))
    for name, values in (("weight_variances", weights), ("bias_variances", biases)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} must be finite and >= 0.")
    w, b = np.meshgrid(weights, biases, indexing="ij")
    # The stable fixed point reached from 1, by bisection on log q in which the sign of q' - q says where it lies.
    start = np.ones_like(w)
    growing = w * second_moment(phi, start) + b >= start
    low = np.where(growing, 0.0, math.log(1e-12))
    high = np.where(growing, math.log(1e8), 0.0)
    for _ in range(60):
        middle = (low + high) / 2
        q = np.exp(middle)
        above = w * second_moment(phi, q) + b >= q
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    q = np.exp((low + high) / 2)
    unbounded = q > 0.99e8
    with np.errstate(over="ignore"):
        chi = np.where(unbounded, np.nan, w * slope_moment(phi, np.where(unbounded, 1.0, q)))
    return PhaseDiagram(phi.name, weights, biases, chi, np.where(unbounded, np.nan, np.where(q < 1e-11, 0.0, q)))
