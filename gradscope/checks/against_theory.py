"""``compare(model, x)``: a network beside the theory of its initialization, layer by layer, and the first culprit."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from gradscope.backward.cotangents import Probes
from gradscope.checks.reading import Reading, read
from gradscope.coefficients.gsc import gsc
from gradscope.coefficients.profiles import Profile
from gradscope.forward.inputs import Forward
from gradscope.meanfield import Prediction, predict, standard_variance
from gradscope.meanfield.activations import NAMED, Activation

FloatArray = npt.NDArray[np.float64]

# |z| beyond which a layer deviates.  For lengths and weights, whose errors are known, 1 in 30,000 by chance; for
# growth, whose scale is estimated from the increments themselves, more, because their tails are heavier.
THRESHOLD, GROWTH_THRESHOLD = 4.2, 6.5

MEASURED = "measured"


@dataclass(frozen=True)
class Comparison:
    """What was measured, what theory predicts, and z-scores a layer.

    ``profile``: measured coefficients.  ``prediction``: theory of the network as it should be initialized.
    ``layers``: names, in order.  ``weight_variances``, ``nominal``: sigma_w^2 measured on each weight and nominal.
    ``z_length``: of ln of the mean square of each pre-activation against what the *measured* layer before predicts, so
    that one wrong layer does not blame those after it.  ``z_growth``: of the increment of ln GSC across each layer
    against theory at the measured length, in robust standard deviations of all increments.  ``z_weight``: of ln of the
    weight variance.  NaN where a test does not apply.
    """

    profile: Profile
    prediction: Prediction
    reading: Reading
    layers: tuple[str, ...]
    weight_variances: FloatArray
    nominal: FloatArray
    log10_gsc: FloatArray
    z_length: FloatArray
    z_growth: FloatArray
    z_weight: FloatArray

    @property
    def first_deviation(self) -> str | None:
        """Name of the first layer whose length or gradient deviates from theory; None where none does."""
        return self._first(np.fmax(np.abs(self.z_length), np.abs(self.z_growth) * THRESHOLD / GROWTH_THRESHOLD))

    @property
    def first_weight_outlier(self) -> str | None:
        """Name of the first layer whose weights have not the nominal variance.

        The only trace of a wrong gain where GSC does not see it: a normalization divides it away, and a homogeneous
        activation such as ReLU passes it through to lengths and gradients alike.
        """
        return self._first(np.abs(self.z_weight))

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: measured and predicted log10 GSC, weight variances and z-scores."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "log10_gsc": self.log10_gsc[1:],
                "log10_gsc_theory": self.prediction.log10_gsc[1:],
                "weight_variance": self.weight_variances,
                "weight_variance_nominal": self.nominal,
                "z_length": self.z_length,
                "z_growth": self.z_growth,
                "z_weight": self.z_weight,
            }
        )

    def __str__(self) -> str:
        theory = 10 ** float(-np.diff(self.prediction.log10_gsc)[len(self.layers) // 2 :].mean())
        lines = [f"theory: rate {theory:.4f} a layer over the upper half"]
        try:
            lines.append(f"measured: {self.profile.growth()}")
        except ValueError as reason:
            lines.append(f"measured: no rate ({reason})")
        deviation, outlier = self.first_deviation, self.first_weight_outlier
        if deviation is not None:
            at = self.layers.index(deviation)
            lines.append(
                f"first layer that deviates: {deviation} (length z = {self.z_length[at]:.1f}, growth z = "
                f"{self.z_growth[at]:.1f})"
            )
        if outlier is not None:
            at = self.layers.index(outlier)
            lines.append(
                f"first layer with weights of another variance: {outlier} ({self.weight_variances[at]:.3g}, nominal "
                f"{self.nominal[at]:.3g}, z = {self.z_weight[at]:.1f})"
            )
        if deviation is None and outlier is None:
            lines.append("no layer deviates from theory")
        return "\n".join(lines)

    def _first(self, z: FloatArray) -> str | None:
        beyond = np.flatnonzero(np.nan_to_num(z) > THRESHOLD)
        return self.layers[beyond[0]] if len(beyond) else None


def compare(
    model: nn.Module,
    data: Any,
    *,
    nominal: str | float = "standard",
    forward: Forward | None = None,
    probes: Probes = "auto",
    generator: torch.Generator | None = None,
) -> Comparison:
    """Measure a perceptron and hold it against mean-field theory of its nominal initialization.

    Arguments:
        model, data, forward: As for `gradscope.gsc`, one batch.  What can be read: see `gradscope.checks.reading.read`.
        nominal: sigma_w^2 = fan_in Var(W) that all weights before a nonlinearity should have: a number; "standard", 2
            for relatives of ReLU and 1 else; or "measured", that of each weight itself, and then only what weights do
            not explain deviates.
        probes, generator: As for `gradscope.gsc`.

    z-scores use standard errors to first order in 1 / width.  A mean square over n neurons and correlated samples has
    relative variance 2 o / n, o the mean squared cosine between samples.  With batch normalization and B near or above
    the width theory does not hold, and a warning says so.

    Raises:
        gradscope.checks.reading.UnreadableError: The network is none that theory can predict.
        ValueError: ``nominal`` is none of these.
    """
    reading = read(model, data, forward=forward)
    specs = reading.specs
    for layer in reading.layers:
        if layer.spec.norm == "batch" and reading.batch_size > layer.width / 2:
            warnings.warn(
                f"Batch normalization of {reading.batch_size} samples at width {layer.width}: the batch is limited in "
                "rank, and theory, which takes the width for infinite, predicts too large a rate.",
                stacklevel=2,
            )
            break
    measured = np.array([spec.weight_variance for spec in specs])
    nominal_variances = np.array(
        [_nominal(nominal, spec.activation, own) for spec, own in zip(specs, measured, strict=True)]
    )
    biases = [spec.bias_variance for spec in specs]
    expected = reading.with_variances(list(nominal_variances), biases)
    prediction = predict(
        expected.specs, batch_size=reading.batch_size, mean_square=reading.mean_square, correlation=reading.correlation
    )
    rows = [layer.name for layer in reading.layers]
    profile = gsc(
        model, data, forward=forward, layers=list(dict.fromkeys([reading.source, *rows])), probes=probes,
        generator=generator,
    )  # fmt: skip
    log10_gsc = np.array([profile.log10_values[profile.layers.index(name), 0] for name in (reading.source, *rows)])
    entries = np.array([layer.fan_in * layer.width for layer in reading.layers])
    z_weight = np.log(measured / nominal_variances) / np.sqrt(2 / entries)
    return Comparison(
        profile, prediction, reading, tuple(rows), measured, nominal_variances, log10_gsc,
        _z_length(expected), _z_growth(expected, prediction, log10_gsc), z_weight,
    )  # fmt: skip


def _nominal(nominal: str | float, activation: Activation, own: float) -> float:
    if nominal == MEASURED:
        return own
    if nominal == "standard":
        alias = activation.name.lower().replace("leakyrelu", "leaky_relu")
        return standard_variance(NAMED[alias]) if alias in NAMED else 1.0
    if isinstance(nominal, (int, float)) and math.isfinite(nominal) and nominal > 0:
        return float(nominal)
    raise ValueError(f'nominal must be "standard", "measured" or a positive number, got {nominal!r}.')


def _z_length(reading: Reading) -> FloatArray:
    """z of ln q of every layer against sigma_w^2 p + sigma_b^2, p the measured mean square of the layer before."""
    z, p = [], reading.mean_square
    for layer in reading.layers:
        expected = layer.spec.weight_variance * p + layer.spec.bias_variance
        error = math.sqrt(2 * layer.overlap / layer.width)
        z.append(math.log(layer.received / expected) / error if expected > 0 and layer.received > 0 else math.nan)
        p = layer.square
    return np.array(z)


def _z_growth(reading: Reading, prediction: Prediction, log10_gsc: FloatArray) -> FloatArray:
    """z of the increments of ln GSC against theory at the measured lengths; NaN for fewer than eight layers."""
    if len(reading.layers) < 8:
        return np.full(len(reading.layers), np.nan)
    predicted, p = -np.diff(prediction.log10_gsc), reading.mean_square
    for number, layer in enumerate(reading.layers):
        if layer.spec.norm == "none":  # elsewhere no length carries over from layer to layer
            one = predict([layer.spec, layer.spec], batch_size=reading.batch_size, mean_square=p)
            predicted[number] = one.log10_gsc[0] - one.log10_gsc[1]
        p = layer.square
    residual = -np.diff(log10_gsc) - predicted
    centre = np.median(residual)
    scale = 1.4826 * np.median(np.abs(residual - centre))
    # The increment of the top layer is that of independent cotangents, which one layer of theory does not describe.
    z = (residual - centre) / max(scale, 1e-12)
    z[-1] = np.nan
    return z
