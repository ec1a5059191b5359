"""The nonlinearity coefficient, and how much the gradient of one network of finite width differs from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradscope.meanfield.activations import Activation, Function, as_activation
from gradscope.meanfield.maps import MeanField, mean_moment, second_moment, slope_moment
from gradscope.meanfield.quadrature import gaussian


def elementwise_nlc(activation: str | Function | Activation, q: float = 1.0) -> float:
    """NLC of phi applied to independent entries N(0, q): sqrt(q E[phi'^2] / Var[phi])."""
    phi = as_activation(activation)
    return math.sqrt(q * float(slope_moment(phi, q)) / float(second_moment(phi, q) - mean_moment(phi, q) ** 2))


def network_nlc(layers: Sequence[MeanField], q: float = 1.0, correlation: float = 0.0) -> float:
    """NLC of a wide network on inputs of mean square ``q`` and ``correlation`` between samples.

    NLC^2 = prod chi_1(q_l) (q_0 - cov_0) / (p_L - cov_L), q_l the variance of the l-th pre-activation, p_L the mean
    square of the last activation and cov_L its covariance between samples.  For ReLU after He at correlation 0 that is
    1 / (1 - c_L).
    """
    spread, product = q * (1 - correlation), 1.0
    p, cov = q, q * correlation
    for layer in layers:
        h = layer.weight_variance * p + layer.bias_variance
        h_cov = layer.weight_variance * cov + layer.bias_variance
        product *= layer.weight_variance * float(slope_moment(layer.activation, h)) / layer.keep
        p = float(layer.mean_square(h))
        unit = MeanField(layer.activation, 1.0)
        cov = unit.covariance(h, min(h_cov / h, 1.0))
    if p - cov <= 1e-13 * p:
        raise ValueError("The domain collapses: targets of all samples coincide to rounding, so NLC is infinite.")
    return math.sqrt(product * spread / (p - cov))


def log_gradient_variance(activation: str | Function | Activation, width: float, q: float = 1.0) -> float:
    """Variance of ln |J^T v|^2 that one layer of finite width adds, v a fixed cotangent, over Gaussian weights.

    (3 E[phi'^4] / E[phi'^2]^2 - 1) / n: for a linear layer 2 / n, for ReLU 5 / n.  Over L layers variances add up, and
    ln |J^T v|^2 is then normal with a mean lower by half of the sum (Hanin and Nica 2020, arXiv:1812.05994).  First
    order in 1 / n.  log GSC, an average over all directions and over samples, varies less: this bounds it.
    """
    phi = as_activation(activation)
    if not width >= 1:
        raise ValueError(f"width must be at least 1, got {width!r}.")
    fourth = float(gaussian(lambda h: phi.derivative(h) ** 4, math.sqrt(q), phi.kinks))
    return (3 * fourth / float(slope_moment(phi, q)) ** 2 - 1) / width
