"""Mean-field predictions for each single layer of a wide network; `gsc_rate` gives only the asymptotic rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import special

from gradscope.choices import Cosine, Depth, Finite, Nonnegative, Positive, check_choice, checked
from gradscope.meanfield.activations import Activation, ActivationLike
from gradscope.meanfield.batch import batch_moments
from gradscope.meanfield.maps import MeanField
from gradscope.meanfield.quadrature import FloatArray, gaussian
from gradscope.meanfield.rates import NORMS

MOST_SAMPLES = 100_000  # of a batch, because sign diversity is a sum over the batch


@checked
@dataclass(frozen=True)
class LayerSpec:
    """Description of a layer f_l = phi(norm(W f_{l-1} + b)) or of a residual block, as input of `predict`.

    With ``branch_variance``, the spec describes the block f_l = ``skip_weight`` f_{l-1} + V phi(norm(W f_{l-1} + b)).
    The weights of W have variance ``weight_variance`` / fan_in, those of V ``branch_variance`` / fan_in.  If V acts on
    phi(norm(f_{l-1})), without W, set ``weight_variance`` to 1.  Prefer `LayerSpec.of` to the constructor:
    `LayerSpec.of` also accepts names of activations.

    >>> LayerSpec.of("relu", 2.0, norm="batch").activation.name
    'relu'
    """

    activation: Activation
    weight_variance: Nonnegative
    bias_variance: Nonnegative = 0.0
    norm: str = "none"
    branch_variance: Nonnegative | None = None
    skip_weight: Finite = 1.0

    @classmethod
    @checked
    def of(
        cls, activation: ActivationLike, weight_variance: Nonnegative, bias_variance: Nonnegative = 0.0,
        norm: str = "none", branch_variance: Nonnegative | None = None, skip_weight: Finite = 1.0,
    ) -> LayerSpec:  # fmt: skip
        """Return a checked `LayerSpec`; ``activation`` is a name, a callable on arrays, or an `Activation`."""
        check_choice("norm", norm, NORMS)
        mean_field = MeanField(activation, weight_variance, bias_variance)
        phi = mean_field.activation
        return cls(phi, float(weight_variance), float(bias_variance), norm, branch_variance, float(skip_weight))


@dataclass(frozen=True)
class Prediction:
    """Mean-field predictions for the input and the L layers of a network, as `predict` returns them.

    - ``log10_gsc`` (L + 1,): log10 GSC of the input and of each layer with respect to the last layer, for
      ``reduction="batch"`` of `gradscope.gsc`.
    - ``mean_square``, ``correlation`` (L + 1,): for the input and each layer, the mean square of an entry, and the
      correlation between two samples.
    - ``preactivation_variance`` (L,): variance q of W f + b, before any normalization.
    - ``preactivation_std``, ``sign_diversity`` (L,): statistics of the input of the nonlinearity; see
      `gradscope.measures.PreactivationStd` and `gradscope.measures.SignDiversity`.

    >>> predict_mlp("tanh", 2, batch_size=50).sign_diversity.round(3)
    array([0.444, 0.444])
    """

    log10_gsc: FloatArray
    mean_square: FloatArray
    correlation: FloatArray
    preactivation_variance: FloatArray
    preactivation_std: FloatArray
    sign_diversity: FloatArray


@checked
def predict(
    layers: Sequence[LayerSpec], *, batch_size: int, mean_square: Positive = 1.0, correlation: Cosine = 0.0
) -> Prediction:
    """Return mean-field predictions of GSC, mean squares and correlations for a network of infinitely wide ``layers``.

    Arguments:
        layers: A `LayerSpec` for each layer, from the first to the last.
        batch_size: Number of samples.  With batch normalization, gradients depend on it, and it must be much smaller
            than the width.  Without batch normalization, only ``preactivation_std`` and ``sign_diversity`` depend on
            it.
        mean_square: Mean square of an entry of the input.
        correlation: Correlation between two inputs, in [-1, 1].

    Cost: a few milliseconds per layer.

    Raises:
        ValueError: There are no layers, an argument is out of its range (``batch_size`` must be at least 2, or 4 with
            batch normalization), or mean squares leave the range of float64.

    >>> block = LayerSpec.of("relu", 2.0, norm="batch", branch_variance=1.0)
    >>> predict([block] * 3, batch_size=50).log10_gsc.round(3)
    array([0.04 , 0.034, 0.018, 0.   ])
    """
    if not layers:
        raise ValueError("predict needs at least one layer.")
    if not 2 <= batch_size <= MOST_SAMPLES:
        raise ValueError(f"batch_size must be a whole number >= 2, at most {MOST_SAMPLES:,}, got {batch_size!r}.")
    steps = [_Step(mean_square, mean_square * correlation)]
    for number, layer in enumerate(layers, start=1):
        step = _step(layer, steps[-1].mean_square, steps[-1].covariance, batch_size, top=number == len(layers))
        if not (math.isfinite(step.mean_square) and step.mean_square > 0):
            raise ValueError(
                f"Layer {number} has mean square {step.mean_square:g}: lengths vanish or overflow there. "
                "Change its weight variance."
            )
        steps.append(step)
    p, cov, q, std, diversity, _ = np.array(steps).T
    backward = [math.log10(step.backward) if step.backward > 0 else -math.inf for step in steps[1:]]
    lengths = np.log10(p)
    log10_gsc = np.append(np.cumsum(backward[::-1])[::-1], 0.0) + lengths - lengths[-1]
    return Prediction(log10_gsc, p, cov / p, q[1:], std[1:], diversity[1:])


class _Step(NamedTuple):
    """Predictions for one layer: mean square, covariance, pre-activation, backward growth of a squared gradient."""

    mean_square: float
    covariance: float
    q: float = 0.0
    std: float = 0.0
    diversity: float = 0.0
    backward: float = 0.0


@lru_cache(maxsize=4096)
def _step(layer: LayerSpec, p: float, cov: float, batch_size: int, *, top: bool) -> _Step:
    phi, unit = layer.activation, MeanField(layer.activation, 1.0)
    q = layer.weight_variance * p + layer.bias_variance
    q_cov = layer.weight_variance * cov + layer.bias_variance
    if q <= 0:
        return _Step(0.0, 0.0, q)
    if layer.norm == "batch":
        moments = batch_moments(phi, batch_size)
        spread = q - q_cov
        if spread <= 0:
            return _Step(0.0, 0.0, q)
        # Gradients sum to zero over the batch, except in the last layer, whose cotangents are independent.
        share = moments.independent if top else moments.centred
        square, product = moments.square, moments.product
        backward = layer.weight_variance * share * moments.inflation / spread
        std, diversity = 1.0, _centred_sign_diversity(batch_size)
    else:
        received, received_cov = (1.0, q_cov / q) if layer.norm == "layer" else (q, q_cov)
        square = float(unit.mean_square(received))
        product = unit.covariance(received, max(-1.0, min(1.0, received_cov / received)))
        backward = layer.weight_variance * float(unit.chi(received)) / (q if layer.norm == "layer" else 1.0)
        std = math.sqrt(max(received - received_cov, 0.0) * (1 - 1 / batch_size))
        shared = max(received_cov, 0.0)
        diversity = _sign_diversity(shared, received - shared, batch_size)
    if layer.branch_variance is None:
        return _Step(square, product, q, std, diversity, backward)
    skip = layer.skip_weight**2
    added, added_cov, grown = (layer.branch_variance * value for value in (square, product, backward))
    return _Step(skip * p + added, skip * cov + added_cov, q, std, diversity, skip + grown)


def _sign_diversity(shared: float, own: float, batch_size: int) -> float:
    """E min(P, B - P) / B if P of B samples N(m, own) are positive, m from N(0, shared); given m, P is binomial."""
    if own <= 0:
        return 0.0
    counts = np.arange(batch_size + 1)
    minority = np.minimum(counts, batch_size - counts) / batch_size
    log_choose = (
        special.gammaln(batch_size + 1) - special.gammaln(counts + 1) - special.gammaln(batch_size - counts + 1)
    )

    def given(m: FloatArray) -> FloatArray:
        log_p, log_n = special.log_ndtr(m / math.sqrt(own)), special.log_ndtr(-m / math.sqrt(own))
        log_mass = log_choose + counts * log_p[..., None] + (batch_size - counts) * log_n[..., None]
        return np.asarray((np.exp(log_mass) * minority).sum(axis=-1))

    if shared <= 0:
        return float(given(np.zeros(())))
    # As a function of m the expectation falls off within about sqrt(own).
    width = math.sqrt(own)
    return float(gaussian(given, math.sqrt(shared), [far * width for far in (-8.0, -2.0, 0.0, 2.0, 8.0)]))


def _centred_sign_diversity(batch_size: int) -> float:
    """E min(P, B - P) / B for B samples that sum to zero, to first order in 1 / B; P is treated as normal.

    Signs have correlation (2 / pi) arcsin(-1 / (B - 1)), and E min(P, B - P) = B / 2 - sqrt(2 Var[P] / pi).
    """
    signs = 2 / math.pi * math.asin(-1 / (batch_size - 1))
    variance = batch_size / 4 * (1 + (batch_size - 1) * signs)
    return 0.5 - math.sqrt(2 * variance / math.pi) / batch_size


@checked
def predict_mlp(
    activation: ActivationLike, depth: Depth, *, batch_size: int, norm: str = "none",
    weight_variance: Nonnegative = 1.0, bias_variance: Nonnegative = 0.0, mean_square: Positive = 1.0,
    correlation: Cosine = 0.0,
) -> Prediction:  # fmt: skip
    """Return mean-field predictions for ``depth`` equal layers; the arguments are those of `LayerSpec` and `predict`.

    >>> predict_mlp("tanh", 3, batch_size=50).log10_gsc.round(4)
    array([0.1103, 0.0392, 0.0133, 0.    ])
    """
    layer = LayerSpec.of(activation, weight_variance, bias_variance, norm)
    return predict([layer] * depth, batch_size=batch_size, mean_square=mean_square, correlation=correlation)
