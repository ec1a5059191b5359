"""The whole profile of a wide network, layer by layer from the first, instead of the asymptote alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from gradscope.meanfield.activations import Activation, Function, as_activation
from gradscope.meanfield.batch import batch_moments
from gradscope.meanfield.maps import MeanField
from gradscope.meanfield.quadrature import gaussian
from gradscope.meanfield.rates import check_norm

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerSpec:
    """f_l = phi(norm(W f_{l-1} + b)), or with ``branch_variance`` a block skip f_{l-1} + V phi(norm(W f_{l-1} + b)).

    Variances are those of a weight times its fan_in: ``weight_variance`` of W, ``branch_variance`` of V.  A block with
    pre-activation, skip f_{l-1} + V phi(norm(f_{l-1})), has the second moments of one with ``weight_variance`` 1.
    Dropout changes no coefficient without biases, and correlations only (`MeanField`).
    """

    activation: Activation
    weight_variance: float
    bias_variance: float = 0.0
    norm: str = "none"
    branch_variance: float | None = None
    skip_weight: float = 1.0

    @classmethod
    def of(
        cls, activation: str | Function | Activation, weight_variance: float, bias_variance: float = 0.0,
        norm: str = "none", branch_variance: float | None = None, skip_weight: float = 1.0,
    ) -> LayerSpec:  # fmt: skip
        """The same, from an activation's name or a callable, with checks."""
        check_norm(norm)
        mean_field = MeanField(activation, weight_variance, bias_variance)
        if branch_variance is not None and not (math.isfinite(branch_variance) and branch_variance >= 0):
            raise ValueError(f"branch_variance must be a finite number >= 0, got {branch_variance!r}.")
        phi = mean_field.activation
        return cls(phi, float(weight_variance), float(bias_variance), norm, branch_variance, float(skip_weight))


@dataclass(frozen=True)
class Prediction:
    """What mean-field theory says of a network of L layers.

    ``log10_gsc`` (L + 1,): of the input and of every layer to the last one, reduction "batch"; 0 for the last.
    ``mean_square`` (L + 1,): of an entry of the input and of every layer.  ``correlation`` (L + 1,): between samples.
    ``preactivation_variance`` (L,): q of W f + b, before any norm.  ``preactivation_std``, ``sign_diversity`` (L,): of
    what the nonlinearity receives, at batch size B, as `gradscope.measures` defines them.
    """

    log10_gsc: FloatArray
    mean_square: FloatArray
    correlation: FloatArray
    preactivation_variance: FloatArray
    preactivation_std: FloatArray
    sign_diversity: FloatArray


def predict(
    layers: Sequence[LayerSpec], *, batch_size: int, mean_square: float = 1.0, correlation: float = 0.0
) -> Prediction:
    """Predict a network of ``layers`` on a batch of B inputs of that mean square and correlation, at infinite width.

    With batch normalization B matters for gradients (`gradscope.meanfield.batch`), and must be much less than the
    width; else only for the statistics of the batch.  Cost: some milliseconds a layer that differs from the one before.

    Raises:
        ValueError: No layers, B < 2 (4 with batch normalization), a mean square that is not positive, a correlation
            beyond 1, or lengths that leave the range of float64.
    """
    if not layers:
        raise ValueError("predict needs at least one layer.")
    if batch_size < 2 or not float(batch_size).is_integer():
        raise ValueError(f"batch_size must be a whole number >= 2, got {batch_size!r}.")
    if not (math.isfinite(mean_square) and mean_square > 0 and -1 <= correlation <= 1):
        raise ValueError(
            f"mean_square must be positive and correlation in [-1, 1], got {mean_square!r} and {correlation!r}."
        )
    p, cov = [mean_square], [mean_square * correlation]
    q, std, diversity, steps = [], [], [], []
    for number, layer in enumerate(layers):
        found = _step(layer, p[-1], cov[-1], batch_size, top=number == len(layers) - 1)
        if not (math.isfinite(found.mean_square) and found.mean_square > 0):
            raise ValueError(
                f"Layer {number + 1} has a mean square of {found.mean_square:g}: lengths vanish or grow without bound, "
                "so there is no prediction beyond it."
            )
        p.append(found.mean_square)
        cov.append(found.covariance)
        q.append(found.q)
        std.append(found.std)
        diversity.append(found.diversity)
        steps.append(math.log10(found.backward) if found.backward > 0 else -math.inf)
    back = np.concatenate([np.cumsum(np.array(steps)[::-1])[::-1], [0.0]])
    lengths = np.log10(np.array(p))
    return Prediction(
        back + lengths - lengths[-1], np.array(p), np.array(cov) / np.array(p), np.array(q), np.array(std),
        np.array(diversity),
    )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One layer: its mean square and covariance, the pre-activation, and the growth of a squared gradient backward."""

    mean_square: float
    covariance: float
    q: float
    std: float
    diversity: float
    backward: float


def _step(layer: LayerSpec, p: float, cov: float, batch_size: int, *, top: bool) -> _Step:
    phi, unit = layer.activation, MeanField(layer.activation, 1.0)
    q = layer.weight_variance * p + layer.bias_variance
    q_cov = layer.weight_variance * cov + layer.bias_variance
    if q <= 0:
        return _Step(0.0, 0.0, q, 0.0, 0.0, 0.0)
    if layer.norm == "batch":
        moments = batch_moments(phi, batch_size)
        spread = q - q_cov
        if spread <= 0:
            return _Step(0.0, 0.0, q, 0.0, 0.0, 0.0)
        # Gradients that sum to zero over the batch, but for the top layer, whose cotangents are independent.
        share = moments.independent if top else moments.centred
        inflation = batch_size / (batch_size - 3)
        received, received_cov = 1.0, -1 / (batch_size - 1)
        square, product = moments.square, moments.product
        backward = layer.weight_variance * share * inflation / spread
        std = 1.0
    else:
        received, received_cov = (1.0, q_cov / q) if layer.norm == "layer" else (q, q_cov)
        square = float(unit.mean_square(received))
        product = unit.covariance(received, max(-1.0, min(1.0, received_cov / received)))
        backward = layer.weight_variance * float(unit.chi(received)) / (q if layer.norm == "layer" else 1.0)
        std = math.sqrt(max(received - received_cov, 0.0) * (1 - 1 / batch_size))
    if layer.norm == "batch":
        diversity = _centred_sign_diversity(batch_size)
    else:
        shared = max(received_cov, 0.0)
        diversity = _sign_diversity(shared, received - shared, batch_size)
    if layer.branch_variance is None:
        return _Step(square, product, q, std, diversity, backward)
    skip = layer.skip_weight**2
    return _Step(
        skip * p + layer.branch_variance * square,
        skip * cov + layer.branch_variance * product,
        q, std, diversity, skip + layer.branch_variance * backward,
    )  # fmt: skip


def _sign_diversity(shared: float, own: float, batch_size: int) -> float:
    """E min(P, N) / B of a neuron whose samples are N(m, own), m ~ N(0, shared).

    Given m, P is binomial: E min(P, B - P) = B min(p, 1 - p) less what it folds over, exactly by its distribution.
    """
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
    # As a function of m it falls off within sqrt(own).
    width = math.sqrt(own)
    return float(gaussian(given, math.sqrt(shared), [far * width for far in (-8.0, -2.0, 0.0, 2.0, 8.0)]))


def _centred_sign_diversity(batch_size: int) -> float:
    """The same for samples that sum to zero, whose signs have the correlation (2 / pi) arcsin(-1 / (B - 1)).

    P is nearly normal with the variance that follows, so E min(P, N) = B / 2 - sqrt(2 Var / pi); right to 1 / B.
    """
    signs = 2 / math.pi * math.asin(-1 / (batch_size - 1))
    variance = batch_size / 4 * (1 + (batch_size - 1) * signs)
    return 0.5 - math.sqrt(2 * variance / math.pi) / batch_size


def predict_mlp(
    activation: str | Function | Activation,
    depth: int,
    *,
    batch_size: int,
    norm: str = "none",
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    mean_square: float = 1.0,
    correlation: float = 0.0,
) -> Prediction:
    """`predict` for ``depth`` equal layers."""
    layer = LayerSpec.of(as_activation(activation), weight_variance, bias_variance, norm)
    return predict([layer] * depth, batch_size=batch_size, mean_square=mean_square, correlation=correlation)
