"""The nonlinearity coefficient (NLC), and the spread of gradients between networks of finite width."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradscope.meanfield.activations import ActivationLike, as_activation
from gradscope.meanfield.maps import MeanField, mean_moment, second_moment, slope_moment
from gradscope.meanfield.quadrature import gaussian


def elementwise_nlc(activation: ActivationLike, q: float = 1.0) -> float:
    """The NLC of an activation applied to independent entries N(0, q): sqrt(q E[phi'^2] / Var[phi]).

    >>> round(elementwise_nlc("relu"), 4), round(elementwise_nlc("linear"), 4)
    (1.2112, 1.0)
    """
    phi = as_activation(activation)
    return math.sqrt(q * float(slope_moment(phi, q)) / float(second_moment(phi, q) - mean_moment(phi, q) ** 2))


def network_nlc(layers: Sequence[MeanField], q: float = 1.0, correlation: float = 0.0) -> float:
    """The NLC of a wide network on inputs of mean square ``q`` and ``correlation`` between samples.

        NLC^2 = prod_l chi_1(q_l) (q_0 - cov_0) / (p_L - cov_L)

    q_l is the variance of the l-th pre-activation.  p_L is the mean square of the last activation, and cov_L its
    covariance between samples.

    Raises:
        ValueError: All samples have the same output up to rounding, so NLC is infinite.

    >>> round(network_nlc([MeanField("relu", 2.0)] * 10), 3)
    2.79
    """
    spread, product = q * (1 - correlation), 1.0
    p, cov = q, q * correlation
    for layer in layers:
        h = layer.weight_variance * p + layer.bias_variance
        h_cov = layer.weight_variance * cov + layer.bias_variance
        product *= layer.weight_variance * float(slope_moment(layer.activation, h)) / layer.keep
        p = float(layer.mean_square(h))
        cov = MeanField(layer.activation, 1.0).covariance(h, min(h_cov / h, 1.0))
    if p - cov <= 1e-13 * p:
        raise ValueError(f"After {len(layers)} layers all samples coincide up to rounding, so NLC is infinite.")
    return math.sqrt(product * spread / (p - cov))


def log_gradient_variance(activation: ActivationLike, width: float, q: float = 1.0) -> float:
    """The variance that one layer of width n adds to ln |J^T v|^2, over Gaussian weights, for a fixed cotangent v.

    To first order in 1 / n it is (3 E[phi'^4] / E[phi'^2]^2 - 1) / n: 2 / n for a linear layer, 5 / n for ReLU.  The
    variances of all layers add up.  ln |J^T v|^2 is then normal, with a mean that is lower by half of their sum.  It
    bounds the variance of ln GSC, which averages over directions and samples.

    Raises:
        ValueError: ``width`` is below 1.

    Reference: Hanin and Nica (2020), "Products of many large random matrices", arXiv:1812.05994.

    >>> round(log_gradient_variance("relu", width=100), 6)
    0.05
    """
    phi = as_activation(activation)
    if not width >= 1:
        raise ValueError(f"width must be at least 1, got {width!r}.")
    fourth = float(gaussian(lambda h: phi.derivative(h) ** 4, math.sqrt(q), phi.kinks))
    return (3 * fourth / float(slope_moment(phi, q)) ** 2 - 1) / width
