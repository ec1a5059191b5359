"""Batch normalization at finite batch size, in a wide network: exact expectations over a sphere.

The pre-activations of one neuron over the batch are an exchangeable Gaussian B-vector.  Centring and dividing by the
standard deviation leaves y = sqrt(B) e with e uniform on the unit sphere of the B - 1 dimensions that sum to zero,
whatever their variance and correlation were.  Hence, with D = diag phi'(y) and P = G - e e^T, G centring:

    backward, for gradients that sum to zero:  Tr factor  sigma_w^2 B / (s^2 (B - 3) (B - 1)) E Tr[P D G D]
    and for independent ones (the top layer):  sigma_w^2 / (s^2 (B - 3)) E Tr[P D^2]

where s^2 is the variance of a pre-activation less its covariance between samples, and E[1 / chi^2_{B-1}] = 1 / (B - 3)
(derived as in Yang et al. 2019, "A mean field theory of batch normalization", arXiv:1902.08129).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradscope.meanfield.activations import Activation
from gradscope.meanfield.maps import mean_moment, second_moment, slope_moment
from gradscope.meanfield.quadrature import sphere_pair_nodes


@dataclass(frozen=True)
class BatchMoments:
    """What a batch-normalized layer needs, per sample.

    ``square``: E[phi(y)^2].  ``product``: E[phi(y_1) phi(y_2)] of two samples.  ``centred``: E Tr[P D G D] / (B - 1).
    ``independent``: E Tr[P D^2] / B.  ``inflation``: B / (B - 3).
    """

    square: float
    product: float
    centred: float
    independent: float
    inflation: float

    @property
    def rate(self) -> float:
        """GSC a layer deep inside the network, bias-free: it does not depend on the weight variance."""
        return self.inflation * self.centred / (self.square - self.product)


def batch_moments(activation: Activation, batch_size: float) -> BatchMoments:
    """Moments for batch size B, or ``math.inf``.

    Raises:
        ValueError: B < 4, where the variance of a gradient is infinite; or an activation that is constant.
    """
    if not (batch_size == math.inf or (batch_size >= 4 and float(batch_size).is_integer())):
        raise ValueError(
            f"batch_size must be a whole number >= 4 or infinite for batch normalization, got {batch_size!r}: with "
            "fewer samples the mean squared gradient is infinite."
        )
    if batch_size == math.inf:
        square, mean, slope = (float(m(activation, 1.0)) for m in (second_moment, mean_moment, slope_moment))
        moments = BatchMoments(square, mean**2, slope, slope, 1.0)
    else:
        moments = _finite(activation, int(batch_size))
    if moments.square - moments.product <= 1e-14 * moments.square:
        raise ValueError(
            f"activation {activation.name!r} is constant on normalized inputs: nothing is left to normalize."
        )
    return moments


def _finite(activation: Activation, B: int) -> BatchMoments:
    # Coordinates of e: y_b = sqrt(B) e_b = sqrt(B - 1) s, s a coordinate of a uniform point on the sphere of R^(B-1).
    scale = math.sqrt(B - 1)
    s, t, w = sphere_pair_nodes(B - 1, [kink / scale for kink in activation.kinks], -1 / (B - 1))
    y1, y2 = scale * s, scale * t
    phi1, phi2, d1, d2 = activation(y1), activation(y2), activation.derivative(y1), activation.derivative(y2)
    e1, e2 = y1 / math.sqrt(B), y2 / math.sqrt(B)

    def mean(values: np.ndarray) -> float:
        return float((w * values).sum())

    slope, slope_pair = mean(d1**2), mean(d1 * d2)
    along, along_pair = mean(e1**2 * d1**2), mean(e1 * e2 * d1 * d2)
    # Tr[P D G D] = sum_b P_bb d_b^2 - (1/B) d^T P d.
    diagonal = B * ((1 - 1 / B) * slope - along)
    total = B * slope + B * (B - 1) * slope_pair  # E (sum d)^2
    quadratic = B * slope - total / B - (B * along + B * (B - 1) * along_pair)
    return BatchMoments(
        mean(phi1**2), mean(phi1 * phi2), (diagonal - quadratic / B) / (B - 1), diagonal / B, B / (B - 3)
    )
