"""Critical initializations, at which gradients neither explode nor vanish, and the gain for a requested growth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from gradscope.choices import Nonnegative, Positive, Row, checked
from gradscope.meanfield.activations import Activation, ActivationLike, as_activation
from gradscope.meanfield.maps import (
    SHORT,
    fixed_lengths,
    second_integral,
    second_moment,
    slope_integral,
    slope_moment,
)
from gradscope.meanfield.quadrature import FloatArray


@dataclass(frozen=True)
class CriticalPoint:
    """Weight and bias variance at which squared gradients grow by a given factor per layer; made by `critical_point`.

    ``weight_variance``: sigma_w^2.  ``bias_variance``: sigma_b^2.  ``length``: q*, the mean square of pre-activations
    in deep layers.

    >>> critical_point("linear")
    CriticalPoint(weight_variance=1.0, bias_variance=0.0, length=1.0)
    """

    weight_variance: float
    bias_variance: float
    length: float


@checked
def critical_point(activation: ActivationLike, bias_variance: Nonnegative = 0.0, chi: Positive = 1.0) -> CriticalPoint:
    """Return the `CriticalPoint` whose weight variance makes squared gradients grow by the factor ``chi`` per layer.

    The growth factor is chi_1 = sigma_w^2 E[phi'(sqrt(q*) z)^2] for z ~ N(0, 1), at the fixed point q* of the variance
    of pre-activations.  So sigma_w^2 = chi / E[phi'^2] and sigma_b^2 = q* - sigma_w^2 E[phi^2].

    A homogeneous activation (ReLU, linear) without biases has a solution only for ``chi`` = 1.  Then every q* is a
    solution, and the one with q* = 1 is returned.  Most other activations without biases have, for ``chi`` = 1, a
    solution in the limit q* -> 0, which is returned.  Then sigma_w^2 is 1 / phi'(0)^2, and ``length`` is 0.

    Raises:
        ValueError: ``bias_variance`` is negative, ``chi`` is not positive, phi' is 0 almost everywhere, or no q* gives
            this ``bias_variance``.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv:1611.01232.

    >>> point = critical_point("tanh", bias_variance=0.1)
    >>> round(point.weight_variance, 3), round(point.length, 3)
    (1.986, 0.806)
    """
    phi = as_activation(activation)

    def bias(log_q: npt.ArrayLike) -> FloatArray:
        """sigma_b^2 / q, for the bias variance sigma_b^2 that makes q = exp(log_q) a fixed point; NaN if not known."""
        q = np.exp(log_q)
        slopes, squares = slope_integral(phi, q), second_integral(phi, q)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(slopes.known & squares.known, 1 - chi / slopes.value * squares.value / q, np.nan)

    _steep(phi, 1.0)
    grid = np.linspace(math.log(1e-10), math.log(1e4), 141)
    values = bias(grid)
    if bias_variance == 0:
        if np.abs(values).max() < 1e-9:
            return CriticalPoint(chi / float(slope_moment(phi, 1.0)), 0.0, 1.0)
        if abs(values[0]) < 1e-6 and float(slope_moment(phi, SHORT)) > 0:
            return CriticalPoint(chi / float(slope_moment(phi, SHORT)), 0.0, 0.0)

    def excess(log_q: float) -> float:
        return math.exp(log_q) * float(bias(log_q)) - bias_variance

    found = np.exp(grid) * values - bias_variance
    crossings = [n for n in range(len(grid) - 1) if found[n] < 0 <= found[n + 1] or found[n] > 0 >= found[n + 1]]
    if not crossings:
        unknown = np.exp(grid[np.isnan(values)])
        where = f"with the rate chi_1 = {chi:g} for {phi.name} at bias_variance={bias_variance:g}"
        if not len(unknown):
            raise ValueError(f"There is no weight variance {where}. Try another bias variance.")
        raise ValueError(
            f"No weight variance was found {where}. Lengths from {unknown[0]:.3g} to {unknown[-1]:.3g} were left out: "
            "moments there are not known to 1e-8."
        )
    q = math.exp(scipy.optimize.brentq(excess, grid[crossings[0]], grid[crossings[0] + 1], xtol=1e-14))
    return CriticalPoint(chi / float(slope_moment(phi, q)), bias_variance, q)


def _steep(phi: Activation, q: float) -> float:
    """E[phi'^2].  Raises ValueError if it is 0, so that no gradient passes."""
    slope = float(slope_moment(phi, q))
    if slope == 0:
        raise ValueError(f"{phi.name} has slope 0 almost everywhere, so gradients vanish at every weight variance.")
    return slope


@checked
def critical_line(activation: ActivationLike, lengths: Row | None = None) -> list[CriticalPoint]:
    """Return critical points: pairs (weight variance, bias variance) at which gradients neither grow nor shrink.

    ``lengths`` are values of q*, the fixed point of the variance of pre-activations; by default 60 values from 1e-4 to
    10.  Each of them determines one critical point, where the growth factor chi_1 is 1.  Points with negative
    bias variance are left out.

    Raises:
        ValueError: No length has a critical point.

    >>> [(round(p.weight_variance, 3), round(p.bias_variance, 3)) for p in critical_line("tanh", [0.01, 1.0])]
    [(1.02, 0.0), (2.153, 0.151)]
    """
    phi = as_activation(activation)
    points = []
    for q in np.logspace(-4, 1, 60) if lengths is None else np.atleast_1d(lengths):
        weight = 1 / _steep(phi, q)
        bias = float(q) - weight * float(second_moment(phi, q))
        if bias >= -1e-12 * q:
            points.append(CriticalPoint(weight, max(bias, 0.0), float(q)))
    if not points:
        raise ValueError(f"{phi.name} has no critical point with bias variance >= 0 at any of the given lengths.")
    return points


@checked
def weight_gain(activation: ActivationLike, rate: Positive = 1.0, bias_variance: Nonnegative = 0.0) -> float:
    """Return the gain g of the weights at which squared gradients grow by the factor ``rate`` per layer.

    Weights with this gain have variance g^2 / fan_in.  So g^2 is sigma_w^2, the ``weight_variance`` of
    `critical_point`.  ValueError is raised for the same arguments as there: no such gain exists for them.

    >>> round(weight_gain("relu"), 4), round(weight_gain("tanh", rate=1.05, bias_variance=0.05), 4)
    (1.4142, 1.4186)
    """
    return math.sqrt(critical_point(activation, bias_variance, rate).weight_variance)


@dataclass(frozen=True)
class PhaseDiagram:
    """Growth factors of squared gradients, and variances of pre-activations, on a grid of weight and bias variances.

    Made by `phase_diagram`.

    ``chi_1``: growth factor of a squared gradient per layer.  ``length``: fixed point q* of the variance of
    pre-activations.  Entry ``[i, j]`` of each array belongs to ``weight_variances[i]`` and ``bias_variances[j]``.
    An entry is NaN if the variance of pre-activations grows without bound.

    >>> phase_diagram("tanh", [1.0, 2.0], [0.1]).length.round(3).tolist()
    [[0.295], [0.815]]
    """

    activation: str
    weight_variances: FloatArray
    bias_variances: FloatArray
    chi_1: FloatArray
    length: FloatArray


@checked
def phase_diagram(activation: ActivationLike, weight_variances: Row, bias_variances: Row) -> PhaseDiagram:
    """Return the growth factor chi_1 of squared gradients per layer, for each weight variance and each bias variance.

    Gradients explode if chi_1 > 1 (chaos) and vanish if chi_1 < 1 (order).  chi_1 is computed at q*, the fixed point
    of the variance of pre-activations.  The result also holds q*, as ``length``.

    Cost: about 25 evaluations of `MeanField.length` on the whole grid.

    Raises:
        ValueError: A variance is negative or not finite, or an expectation E[f] cannot be computed to within
            1e-8 E[|f|].

    >>> phase_diagram("tanh", [0.5, 1.0, 2.0], [0.0, 0.1]).chi_1.round(3)
    array([[0.5  , 0.393],
           [1.   , 0.689],
           [1.106, 1.003]])
    """
    phi = as_activation(activation)
    weights, biases = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (weight_variances, bias_variances))
    w, b = np.meshgrid(weights, biases, indexing="ij")
    q = fixed_lengths(phi, w.ravel(), b.ravel()).reshape(w.shape)
    unbounded = np.isinf(q)
    chi = np.where(unbounded, np.nan, w * slope_moment(phi, np.where(unbounded, 1.0, np.maximum(q, SHORT))))
    return PhaseDiagram(phi.name, weights, biases, chi, np.where(unbounded, np.nan, q))
