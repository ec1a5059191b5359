"""Batch normalization at finite batch size B in a wide network: exact expectations over a sphere.

The pre-activations of one neuron over the batch are an exchangeable Gaussian vector of length B.  Normalization maps
this vector to y = sqrt(B) e.  Whatever the variance and the correlation were, e is uniform on the unit sphere of the
(B - 1)-dimensional space of vectors with sum zero.  Let G be the centering matrix, D = diag phi'(y) and P = G - e e^T.
A squared gradient then grows backward through the layer by the factor

    sigma_w^2 B / (s^2 (B - 3) (B - 1)) E Tr[P D G D]    if gradients sum to zero over the batch,
    sigma_w^2 / (s^2 (B - 3)) E Tr[P D^2]                if gradients are independent (in the last layer).

s^2 is the variance of a pre-activation minus its covariance between samples.  B - 3 is 1 / E[1 / chi^2_{B-1}].
See Yang et al. (2019), "A mean field theory of batch normalization", arXiv:1902.08129.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradscope.choices import checked
from gradscope.meanfield.activations import Activation, ActivationLike, as_activation
from gradscope.meanfield.maps import mean_moment, second_moment, slope_moment
from gradscope.meanfield.quadrature import ACCURACY, FloatArray, sphere_pair


@dataclass(frozen=True)
class BatchMoments:
    """Expectations of an activation phi after batch normalization with batch size B; made by `batch_moments`.

    y is the vector (B,) of normalized pre-activations of one neuron.  Expectations are over wide random networks.

    - ``square``: E[phi(y_b)^2] for one sample b.  ``product``: E[phi(y_b) phi(y_c)] for two samples b and c.
    - ``centred``: E Tr[P D G D] / (B - 1).  ``independent``: E Tr[P D^2] / B.  D = diag phi'(y), G is the centering
      matrix, P = G - y y^T / B.  Growth of gradients needs ``independent`` in the last layer, ``centred`` in others.
    - ``inflation``: B / (B - 3).

    >>> round(batch_moments("linear", 5).rate, 4), batch_moments("linear", 5).inflation
    (1.5, 2.5)
    """

    square: float
    product: float
    centred: float
    independent: float
    inflation: float

    @property
    def varies(self) -> bool:
        """Whether the variance of activations, square - product, is more than rounding error."""
        return self.square - self.product > ACCURACY * self.square

    @property
    def rate(self) -> float:
        """Growth factor of GSC per layer, deep inside a network without biases; the weight variance does not matter."""
        return self.inflation * self.centred / (self.square - self.product)


@checked
def batch_moments(activation: ActivationLike, batch_size: float) -> BatchMoments:
    """Return expectations of an activation after batch normalization with ``batch_size``, which may be ``math.inf``.

    Raises:
        ValueError: ``batch_size`` is below 4 (infinite mean squared gradient), the activation is constant, or an
            expectation E[f] cannot be computed to within 1e-8 E[|f|].

    >>> moments = batch_moments("relu", 100)
    >>> round(moments.square, 4), round(moments.rate, 4)
    (0.5, 1.4834)
    """
    phi = as_activation(activation)
    if not (batch_size == math.inf or (4 <= batch_size < 2**63 and float(batch_size).is_integer())):
        raise ValueError(
            f"With norm='batch', batch_size must be a whole number >= 4 or infinite, got {batch_size!r}: with fewer "
            "samples the mean squared gradient is infinite."
        )
    square, mean, slope = (float(m(phi, 1.0)) for m in (second_moment, mean_moment, slope_moment))
    wide = BatchMoments(square, mean**2, slope, slope, 1.0)
    try:
        moments = _finite(phi, int(batch_size)) if batch_size != math.inf and wide.varies else wide
    except ValueError as reason:
        raise ValueError(f"With batch_size={batch_size:g}: {reason}") from reason
    if not moments.varies:
        raise ValueError(
            f"activation {phi.name!r} is constant up to rounding on normalized inputs: the next norm divides by zero."
        )
    return moments


@lru_cache(maxsize=64)
def _finite(phi: Activation, B: int) -> BatchMoments:
    # y_b = sqrt(B) e_b = sqrt(B - 1) s, where s is a coordinate of a random point on the unit sphere of R^(B-1).
    scale = math.sqrt(B - 1)

    def products(s: FloatArray, t: FloatArray) -> FloatArray:
        y1, y2 = scale * s[..., :1], scale * t  # s is the same at all nodes of a panel
        phi1, phi2, d1, d2 = phi(y1), phi(y2), phi.derivative(y1), phi.derivative(y2)
        e1, e2 = y1 / math.sqrt(B), y2 / math.sqrt(B)
        parts = (phi1**2, phi1 * phi2, d1**2, d1 * d2, e1**2 * d1**2, e1 * e2 * d1 * d2)
        return np.stack(np.broadcast_arrays(*parts))

    means = sphere_pair(products, B - 1, [kink / scale for kink in phi.kinks], -1 / (B - 1))
    square, product, slope, slope_pair, along, along_pair = map(float, means)
    # Tr[P D G D] = sum_b P_bb d_b^2 - (1/B) d^T P d.
    diagonal = B * ((1 - 1 / B) * slope - along)
    total = B * slope + B * (B - 1) * slope_pair  # E (sum d)^2
    quadratic = B * slope - total / B - (B * along + B * (B - 1) * along_pair)
    return BatchMoments(square, product, (diagonal - quadratic / B) / (B - 1), diagonal / B, B / (B - 3))
