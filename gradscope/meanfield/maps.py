"""Maps of lengths, correlations and gradients from layer to layer of a wide random network without normalization.

Pre-activations are h = W phi(h') + b.  Weights have variance ``weight_variance`` / fan_in and biases have variance
``bias_variance``.  At infinite width h is Gaussian with variance q, and has correlation c between two samples (Poole
et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from gradscope.choices import Cosine, Lengths, Nonnegative, Share, checked
from gradscope.meanfield.activations import Activation, ActivationLike, as_activation
from gradscope.meanfield.quadrature import ACCURACY, FloatArray, Integral, exact, expectation, gaussian, gaussian_pair

SHORT = 1e-16  # this length stands for the limit of vanishing lengths


@checked
@dataclass(frozen=True)
class MeanField:
    """Mean-field theory of one infinitely wide layer h -> W phi(h) + b: variances, correlations and gradients.

    Here phi is the activation, and W and b are random.  q is the variance of the pre-activations h of a sample, and c
    the correlation between the pre-activations of two samples.  z is a standard normal variable.  Every method raises
    ValueError if it cannot compute an expectation E[f] to within 1e-8 E[|f|].

    Arguments:
        activation: A name, a callable on arrays, or an `Activation`.
        weight_variance: sigma_w^2; a weight has variance sigma_w^2 / fan_in.
        bias_variance: sigma_b^2.
        keep: Probability that dropout keeps an activation, which is then divided by ``keep``.

    Raises:
        ValueError: A variance is negative or not finite, ``keep`` is outside (0, 1], or the activation is invalid.

    >>> layer = MeanField("relu", weight_variance=2.0)
    >>> float(layer.length(3.0).round(6)), float(layer.chi(3.0).round(6)), round(layer.correlation(3.0, 0.0), 6)
    (3.0, 1.0, 0.31831)
    """

    activation: Activation
    weight_variance: float
    bias_variance: float
    keep: float

    def __init__(
        self,
        activation: ActivationLike,
        weight_variance: Nonnegative,
        bias_variance: Nonnegative = 0.0,
        keep: Share = 1.0,
    ) -> None:
        self.__dict__.update(
            activation=as_activation(activation), weight_variance=float(weight_variance),
            bias_variance=float(bias_variance), keep=float(keep),
        )  # fmt: skip

    def mean_square(self, q: Lengths) -> FloatArray:
        """Mean square of activations after dropout, E[phi(sqrt(q) z)^2] / keep, for pre-activations of variance q."""
        return second_moment(self.activation, q) / self.keep

    def length(self, q: Lengths) -> FloatArray:
        """Variance of the next layer's pre-activations, sigma_w^2 E[phi^2] / keep + sigma_b^2 (the length map)."""
        return self.weight_variance * self.mean_square(q) + self.bias_variance

    def covariance(self, q: Nonnegative, c: Cosine) -> float:
        """Covariance between the next layer's pre-activations of two samples, with independent dropout masks."""
        phi = self.activation
        product = gaussian_pair(phi.function, phi.function, math.sqrt(q), c, phi.kinks)
        return self.weight_variance * product + self.bias_variance

    def correlation(self, q: Nonnegative, c: Cosine) -> float:
        """Correlation between the next layer's pre-activations of two samples (the correlation map)."""
        return self.covariance(q, c) / float(self.length(q))

    def chi(self, q: Lengths) -> FloatArray:
        """Growth factor of squared gradients through the layer, chi_1(q) = sigma_w^2 E[phi'(sqrt(q) z)^2] / keep."""
        return self.weight_variance * slope_moment(self.activation, q) / self.keep

    def chi_c(self, q: Nonnegative, c: Cosine) -> float:
        """Slope of the `correlation` map at c: the growth factor of a small difference between two correlations.

        It is sigma_w^2 E[phi'(u) phi'(v)] q / q', where u and v have variance q and correlation c, and q' is the next
        layer's variance.

        Raises:
            ValueError: The activation jumps; its derivative phi' then does not give the whole slope.
        """
        phi = self.activation
        if phi.jumps:
            raise ValueError(
                f"{phi.name} jumps at {phi.jumps[0]:.6g}, so the slope of its correlation map is not an expectation of "
                "derivatives. Use differences of `correlation` instead."
            )
        slope = gaussian_pair(phi.derivative, phi.derivative, math.sqrt(q), c, phi.kinks)
        return self.weight_variance * slope * q / float(self.length(q))

    def fixed_length(self, start: Nonnegative = 1.0) -> float:
        """The fixed point q* that the variance of pre-activations reaches over many layers from ``start``.

        The result is 0 if the variance shrinks to 0 over the layers.  It is ``start`` if every variance is a fixed
        point, as for ReLU with sigma_w^2 = 2 and no biases.

        Raises:
            ValueError: The variance grows without bound.

        >>> round(MeanField("tanh", 2.0).fixed_length(), 4)
        0.618
        """

        (length,) = fixed_lengths(
            self.activation, np.array([self.weight_variance / self.keep]), np.array([self.bias_variance]), start
        )
        if length == math.inf:
            raise ValueError(
                f"Lengths grow without bound for {self.activation.name} at weight_variance={self.weight_variance:g} "
                f"and bias_variance={self.bias_variance:g}, so there is no fixed point. Lower the variances."
            )
        return float(length)

    def fixed_correlation(self, q: Nonnegative | None = None) -> float:
        """The correlation c* of two samples after many layers at variance ``q`` (default: `fixed_length`)."""
        q = self.fixed_length() if q is None else q
        smooth = not self.activation.jumps  # a jump makes the slope at c = 1 infinite
        if q == 0 or (smooth and self.keep == 1 and float(self.chi(q)) * q / float(self.length(q)) <= 1):
            return 1.0

        def excess(c: float) -> float:
            return self.correlation(q, c) - c

        if excess(0.0) <= ACCURACY:
            return 0.0
        high = next((c for c in (0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-8) if excess(c) < 0), None)
        return 1.0 if high is None else float(scipy.optimize.brentq(excess, 0.0, high, xtol=1e-14))

    def depth_scales(self) -> DepthScales:
        """Return the `DepthScales`: fixed points, and depths over which gradients and distances change e-fold."""
        q = self.fixed_length()
        c = self.fixed_correlation(q)
        if q == 0:
            rate = float(self.chi(SHORT))
            return DepthScales(q, c, rate, rate, _scale(rate), _scale(rate), _scale(rate))
        chi_1 = float(self.chi(q))
        chi_c = chi_1 if c == 1 else self.chi_c(q, c)
        # The derivative of a Gaussian expectation by its variance is an expectation, also if phi jumps.
        slope = gaussian(lambda h: np.square(self.activation(h)) * (h**2 / q - 1), math.sqrt(q), self.activation.kinks)
        slope *= self.weight_variance / self.keep / (2 * q)
        return DepthScales(q, c, chi_1, chi_c, _scale(chi_1), _scale(chi_c), _scale(float(slope)))


@checked
@dataclass(frozen=True)
class DepthScales:
    """Numbers of layers after which a squared gradient, or a distance from a fixed point, has changed e-fold.

    Made by `MeanField.depth_scales`.

    - ``length``, ``correlation``: the fixed points q* of the variance of pre-activations, and c* of the correlation
      between the pre-activations of two inputs.
    - ``chi_1``: growth factor of squared gradients per layer, at the fixed point.
    - ``chi_c``: each layer multiplies the distance of the correlation from c* by this factor.  It is the slope at c* of
      the map from the correlation in one layer to that in the next.
    - ``gradient``: -1 / ln chi_1, negative if gradients explode, infinite if chi_1 = 1.
    - ``correlations``: xi_c = -1 / ln chi_c, the depth over which the distance of the correlation from c* shrinks by a
      factor of e.  Over this depth, two inputs stay distinguishable.
    - ``lengths``: the depth over which the distance of the variance of pre-activations from q* shrinks by a factor
      of e.

    >>> scales = MeanField("tanh", 1.69, bias_variance=0.09).depth_scales()
    >>> round(scales.length, 3), round(scales.chi_1, 3), round(scales.gradient, 1), round(scales.trainable_depth())
    (0.607, 0.94, 16.1, 97)
    """

    length: float
    correlation: float
    chi_1: float
    chi_c: float
    gradient: float
    correlations: float
    lengths: float

    def trainable_depth(self, multiple: Nonnegative = 6.0) -> float:
        """Estimate of the largest trainable depth: ``multiple`` times xi_c, the depth ``correlations``.

        Schoenholz et al. (2017) found a multiple of about 6.
        """
        return multiple * self.correlations


def second_moment(activation: Activation, q: npt.ArrayLike) -> FloatArray:
    """E[phi(sqrt(q) z)^2]."""
    return second_integral(activation, q).checked(f"E[phi^2] of {activation.name} at q = {_span(q)}")


def slope_moment(activation: Activation, q: npt.ArrayLike) -> FloatArray:
    """E[phi'(sqrt(q) z)^2], where phi' is the derivative almost everywhere, as automatic differentiation has it."""
    return slope_integral(activation, q).checked(f"E[phi'^2] of {activation.name} at q = {_span(q)}")


def mean_moment(activation: Activation, q: npt.ArrayLike) -> FloatArray:
    """E[phi(sqrt(q) z)]."""
    return gaussian(activation.function, np.sqrt(q), activation.kinks)


def second_integral(activation: Activation, q: npt.ArrayLike) -> Integral:
    """E[phi(sqrt(q) z)^2] with its error."""
    return expectation(lambda h: exact(np.square(activation.function(h))), np.sqrt(q), activation.kinks)


def slope_integral(activation: Activation, q: npt.ArrayLike) -> Integral:
    """E[phi'(sqrt(q) z)^2] with its error."""
    return expectation(lambda h: exact(np.square(activation.derivative(h))), np.sqrt(q), activation.kinks)


def fixed_lengths(
    activation: Activation, weight_variance: FloatArray, bias_variance: FloatArray, start: Nonnegative = 1.0
) -> FloatArray:
    """Stable fixed points (n,) that the length maps reach from ``start``: 0 if lengths vanish, infinite if they grow.

    From ``start``, lengths are followed in the direction of the map until it changes sign; there a root is bracketed.
    """
    lengths = np.full(weight_variance.shape, float(start))
    ahead = (weight_variance * second_moment(activation, start) + bias_variance) / start - 1
    for upward in (True, False):
        rest = np.flatnonzero(ahead > 1e-12 if upward else ahead < -1e-12)
        previous = float(start)
        while len(rest) and 1e-12 < previous < 1e8:
            steps = previous * 10 ** (np.arange(17) / (8 if upward else -8))
            found = second_integral(activation, steps)
            if not np.isfinite(found.error).all() and upward:  # activations overflow
                break
            moments = found.checked(f"E[phi^2] of {activation.name} at q = {_span(steps)}")
            excess = weight_variance[rest, None] * moments + bias_variance[rest, None] - steps
            crossed = (excess[:, 1:] <= 0) if upward else (excess[:, 1:] >= 0)
            hit, first = crossed.any(axis=1), crossed.argmax(axis=1)
            ends = np.log(np.stack([steps[first[hit]], steps[first[hit] + 1]]))
            values = np.stack([excess[hit, first[hit]], excess[hit, first[hit] + 1]])
            mine = rest[hit]
            if len(mine):
                lengths[mine] = _roots(activation, weight_variance[mine], bias_variance[mine], ends, values)
            rest, previous = rest[~hit], float(steps[-1])
        lengths[rest] = math.inf if upward else 0.0
    return lengths


def _roots(
    activation: Activation, weight_variance: FloatArray, bias_variance: FloatArray, ends: FloatArray, values: FloatArray
) -> FloatArray:
    """Fixed points between two logarithms of lengths (2, n), at which length map - length has ``values`` (2, n)."""
    for step in range(24):
        middle = ends.mean(axis=0)
        if step >= 20:  # brackets are so short that the map is straight
            middle = ends[0] - (ends[1] - ends[0]) * np.divide(
                values[0], values[1] - values[0], out=np.zeros_like(middle), where=values[0] != values[1]
            )
        q = np.exp(middle)
        value = weight_variance * second_moment(activation, q) + bias_variance - q
        same = np.sign(value) == np.sign(values[0])
        ends = np.where([same, ~same], middle, ends)
        values = np.where([same, ~same], value, values)
    return np.asarray(np.exp(np.where(np.abs(values[0]) < np.abs(values[1]), ends[0], ends[1])))


def _span(q: npt.ArrayLike) -> str:
    low, high = float(np.min(q)), float(np.max(q))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _scale(slope: float) -> float:
    if slope <= 0:
        return 0.0
    return math.inf if abs(slope - 1) < 1e-12 else -1 / math.log(slope)
