"""Predictions for a wide network: growth of GSC per layer (squared convention), NLC, and the spread of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradscope.choices import Cosine, Nonnegative, Positive, check_choice, checked
from gradscope.meanfield.activations import Activation, ActivationLike, as_activation
from gradscope.meanfield.batch import batch_moments
from gradscope.meanfield.maps import SHORT, MeanField, mean_moment, second_moment, slope_moment
from gradscope.meanfield.quadrature import gaussian

NORMS = ("none", "layer", "batch")

# Activations with He's weight variance, sigma_w^2 = 2.  All other activations have LeCun's, which is 1.
STANDARD_VARIANCE = {"relu": 2.0, "leaky_relu": 2.0, "elu": 2.0, "gelu": 2.0, "silu": 2.0}


@checked
def gsc_rate(
    activation: ActivationLike, norm: str = "none", batch_size: float | None = None, q: Nonnegative | None = None, *,
    weight_variance: Nonnegative | None = None, bias_variance: Nonnegative = 0.0,
) -> float:  # fmt: skip
    """Growth factor of GSC per layer, toward the input, of infinitely wide networks h_l = W phi(norm(h_{l-1})) + b.

        none:   chi_1(q) q / q' with q' = sigma_w^2 E[phi^2] + sigma_b^2; without biases q E[phi'^2] / E[phi^2]
        layer:  E[phi'^2] / (E[phi^2] + sigma_b^2 / sigma_w^2) at q = 1
        batch:  `BatchMoments.rate`

    E is the expectation over pre-activations h ~ N(0, q).  phi and phi' are short for phi(h) and phi'(h).  For norm
    "none", chi_1(q) = sigma_w^2 E[phi'^2].

    Arguments:
        activation: phi: a name, a callable on arrays, or an `Activation`.
        norm: Normalization of the pre-activations, without affine parameters: none, layer or batch.
        batch_size: Batch size for norm "batch"; infinite by default.
        q: Variance of the pre-activations for norm "none"; by default the fixed point that is reached from q = 1.
        weight_variance: sigma_w^2; by default `standard_variance`.
        bias_variance: sigma_b^2.

    Raises:
        ValueError: A name is unknown, or an argument is out of its range or does not apply to ``norm``.  Or the
            variance of pre-activations has no fixed point or becomes 0, or an expectation E[f] cannot be computed to
            within 1e-8 E[|f|].

    If the activation jumps, the jump is ignored in phi', as in automatic differentiation.

    >>> round(gsc_rate("relu", "batch", 100), 4), round(gsc_rate("tanh", "layer"), 4)
    (1.4834, 1.1778)
    """
    phi = as_activation(activation)
    check_choice("norm", norm, NORMS)
    if batch_size is not None and norm != "batch":
        raise ValueError(f"batch_size applies to norm='batch' only, got norm={norm!r}.")
    if q is not None and norm != "none":
        raise ValueError(f"q applies to norm='none' only, got norm={norm!r}.")
    variance = standard_variance(phi) if weight_variance is None else weight_variance
    layer = MeanField(phi, variance, bias_variance)
    if norm == "batch":
        return batch_moments(phi, math.inf if batch_size is None else batch_size).rate
    if norm == "layer":
        bias = bias_variance / variance if bias_variance else 0.0
        square = float(second_moment(phi, 1.0)) + bias
        if square == 0:
            raise ValueError(f"{phi.name} is 0 on normalized inputs, so there is no rate.")
        return float(slope_moment(phi, 1.0)) / square
    length = layer.fixed_length() if q is None else q
    if length == 0:  # phi acts like the linear map phi'(0) h
        length = SHORT
        if float(second_moment(phi, length)) == 0:
            raise ValueError(f"Lengths vanish with {phi.name}, whose slope at 0 is 0, so there is no rate; pass q.")
    after = float(layer.length(length))
    if after == 0:
        raise ValueError(f"The next length is 0 for {phi.name} at q={length:g}, so there is no rate.")
    return float(layer.chi(length)) * length / after


@checked
def residual_rate(branch_rate: Nonnegative, dilution: float) -> float:
    """Growth factor of GSC per residual block, (k^2 + r) / (k^2 + 1), for branch rate r and k = |skip| / |branch|.

    r is the factor by which GSC grows through the branch alone.  k, called dilution, is the length of the skip's
    output divided by that of the branch's output.  It is not the weight of the skip connection.  The formula holds if
    skip and branch have orthogonal values and orthogonal Jacobians, for example if the branch ends in a random linear
    map.  Growth per block equals 1 + (r - 1) / (k^2 + 1), so a large k brings it near 1.

    Raises:
        ValueError: The rate or the dilution is negative.

    Reference: Philipp, Song and Carbonell (2018), arXiv:1712.05577.

    >>> residual_rate(branch_rate=1.5, dilution=2.0)
    1.1
    """
    if not (branch_rate >= 0 and dilution >= 0):
        raise ValueError(f"branch_rate and dilution must be >= 0, got {branch_rate!r} and {dilution!r}.")
    square = dilution * dilution  # inf where `**` raises
    return 1.0 if math.isinf(square) else (square + branch_rate) / (square + 1)


@checked
def standard_variance(activation: Activation) -> float:
    """The usual sigma_w^2 = fan_in Var(W) before an activation: 2 (He) for ReLU-like activations, else 1 (LeCun).

    ReLU-like are relu, leaky_relu, elu, gelu and silu.

    >>> standard_variance(as_activation("gelu")), standard_variance(as_activation("tanh"))
    (2.0, 1.0)
    """
    return STANDARD_VARIANCE.get(activation.name, 1.0)


@checked
def elementwise_nlc(activation: ActivationLike, q: Positive = 1.0) -> float:
    """Nonlinearity coefficient of an activation phi on independent inputs ~ N(0, q): sqrt(q E[phi'^2] / Var[phi]).

    >>> round(elementwise_nlc("relu"), 4), round(elementwise_nlc("linear"), 4)
    (1.2112, 1.0)
    """
    phi = as_activation(activation)
    mean, square = float(mean_moment(phi, q)), float(second_moment(phi, q))
    variance = float(gaussian(lambda h: np.square(phi(h) - mean), math.sqrt(q), phi.kinks))
    if variance <= 1e-20 * square:
        raise ValueError(f"{phi.name} is constant up to rounding at q={q:g}, so NLC is infinite or not known.")
    return math.sqrt(q * float(slope_moment(phi, q)) / variance)


@checked
def network_nlc(layers: Sequence[MeanField], q: Positive = 1.0, correlation: Cosine = 0.0) -> float:
    """Nonlinearity coefficient (NLC) of a wide random network, predicted by mean-field theory.

        NLC^2 = prod_l chi_1(q_l) (q_0 - cov_0) / (p_L - cov_L), with chi_1 of `MeanField.chi`

    q_0 = ``q`` is the mean square of the inputs, and cov_0 = ``correlation`` q_0 the mean product of two inputs.  q_l
    is the variance of the l-th pre-activation.  p_L is the mean square of the last activation, and cov_L the mean
    product of its values for two inputs.

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
    if p - cov <= 1e-7 * p:  # rounding leaves p - cov fewer than eight digits
        raise ValueError(f"After {len(layers)} layers all samples coincide up to rounding, so NLC is infinite.")
    return math.sqrt(product * spread / (p - cov))


@checked
def log_gradient_variance(activation: ActivationLike, width: float, q: Positive = 1.0) -> float:
    """Variance, over random weights, that one layer of finite width adds to the logarithm of a squared gradient.

    Let J be the Jacobian of a network with Gaussian weights, and v a fixed vector.  The squared gradient is |J^T v|^2.
    To first order in 1 / n, for width n, one layer adds the variance (3 E[phi'^4] / E[phi'^2]^2 - 1) / n to
    ln |J^T v|^2: 2 / n for a linear layer, and 5 / n for ReLU.  Let s be the sum of these variances over all layers.
    Then ln |J^T v|^2 is about normal, with variance s and mean ln E |J^T v|^2 - s / 2.  The norm |J|_qm^2 in GSC is an
    average over vectors v, so its logarithm varies less.

    Raises:
        ValueError: ``width`` is below 1.

    Reference: Hanin and Nica (2020), "Products of many large random matrices", arXiv:1812.05994.

    >>> round(log_gradient_variance("relu", width=100), 6)
    0.05
    """
    phi = as_activation(activation)
    if not width >= 1:
        raise ValueError(f"width must be at least 1, got {width!r}.")
    fourth, square = float(gaussian(lambda h: phi.derivative(h) ** 4, math.sqrt(q), phi.kinks)), slope_moment(phi, q)
    if square == 0:
        raise ValueError(f"{phi.name} has slope 0 almost everywhere at q={q:g}, so all gradients are 0.")
    return (3 * fourth / float(square) ** 2 - 1) / width
