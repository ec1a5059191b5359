"""GSC a layer deep inside a wide network, in the squared convention."""

from __future__ import annotations

import math
from difflib import get_close_matches

from gradscope.meanfield.activations import Activation, Function, as_activation
from gradscope.meanfield.batch import batch_moments
from gradscope.meanfield.maps import MeanField, second_moment, slope_moment

NORMS = ("none", "layer", "batch")

# E[phi^2] of one layer is kept at 1 by these weight variances, as He's and LeCun's initializations do.
STANDARD_VARIANCE = {"relu": 2.0, "leaky_relu": 2.0, "elu": 2.0, "gelu": 2.0, "silu": 2.0}


def gsc_rate(
    activation: str | Function | Activation,
    norm: str = "none",
    batch_size: float | None = None,
    q: float | None = None,
    *,
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
) -> float:
    """Growth of GSC a layer, away from the target, of h_l = W phi(norm(h_{l-1})) + b at infinite width.

    none: chi_1(q) q / q', q' = sigma_w^2 E[phi^2] + sigma_b^2 (without bias q E[phi'^2] / E[phi^2], whatever sigma_w).
    layer: E[phi'^2] / (E[phi^2] + sigma_b^2 / sigma_w^2) at q = 1.  batch: `gradscope.meanfield.batch`.

    Arguments:
        activation: A name, a callable on arrays, or an `Activation`.
        norm: none, layer or batch, of the pre-activation, without affine map.
        batch_size: B of batch normalization; default infinite.
        q: Variance of a pre-activation, without a norm.  Default: the fixed point that lengths reach from 1.
        weight_variance, bias_variance: sigma_w^2 and sigma_b^2.  Default sigma_w^2: that of the usual initialization,
            2 for relatives of ReLU, else 1.

    Raises:
        ValueError: An unknown name, no fixed point, lengths that vanish so fast that no rate exists, or bad numbers.
    """
    phi = as_activation(activation)
    check_norm(norm)
    if batch_size is not None and norm != "batch":
        raise ValueError(f"batch_size belongs to norm='batch', got norm={norm!r}.")
    if q is not None and norm != "none":
        raise ValueError(f"q is free only without a norm, got norm={norm!r}.")
    variance = standard_variance(phi) if weight_variance is None else weight_variance
    layer = MeanField(phi, variance, bias_variance)
    if norm == "batch":
        return batch_moments(phi, math.inf if batch_size is None else batch_size).rate
    if norm == "layer":
        bias = bias_variance / variance if bias_variance else 0.0
        return float(slope_moment(phi, 1.0) / (second_moment(phi, 1.0) + bias))
    length = layer.fixed_length() if q is None else q
    if not (math.isfinite(length) and length >= 0):
        raise ValueError(f"q must be a finite number > 0, got {q!r}.")
    if length == 0:  # in the limit phi is its slope at 0
        length = 1e-16
        if float(second_moment(phi, length)) == 0:
            raise ValueError(f"Lengths vanish with {phi.name}, and so does the activation at 0: no rate exists.")
    return float(layer.chi(length) * length / layer.length(length))


def residual_rate(branch_rate: float, dilution: float) -> float:
    """(k^2 + r) / (k^2 + 1): GSC a residual block whose branch has rate r, diluted by k = |skip| / |branch|.

    k is a ratio of lengths, not the weight of the skip connection.  Holds where skip and branch are orthogonal in value
    and in Jacobian, as when the branch ends in a linear map; the excess over 1 shrinks by k^2 + 1 (Philipp, Song and
    Carbonell 2018, arXiv:1712.05577).

    Raises:
        ValueError: A rate or a dilution that is negative.
    """
    if not (branch_rate >= 0 and dilution >= 0):
        raise ValueError(f"branch_rate and dilution must be >= 0, got {branch_rate!r} and {dilution!r}.")
    if math.isinf(dilution):
        return 1.0
    return (dilution**2 + branch_rate) / (dilution**2 + 1)


def standard_variance(activation: Activation) -> float:
    """sigma_w^2 of the initialization that is usual with an activation: He's 2 for relatives of ReLU, else 1."""
    return STANDARD_VARIANCE.get(activation.name, 1.0)


def check_norm(norm: str) -> None:
    """Raise ValueError for an unknown norm; the nearest is offered."""
    if norm not in NORMS:
        close = get_close_matches(str(norm), NORMS, n=1)
        raise ValueError(
            f"norm must be one of {', '.join(NORMS)}; got {norm!r}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
        )
