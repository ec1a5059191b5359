"""`compare(model, data)`: compare a network with mean-field theory of its initialization, layer by layer."""

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
from gradscope.meanfield import LayerSpec, Prediction, predict, standard_variance
from gradscope.meanfield.activations import NAMED

FloatArray = npt.NDArray[np.float64]

# A layer deviates if its |z| is larger.  For lengths and weights, whose errors are known, this happens by chance once
# in 30,000 cases.  Growth has a larger threshold: its scale is estimated from increments, which have heavier tails.
THRESHOLD, GROWTH_THRESHOLD = 4.2, 6.5


@dataclass(frozen=True)
class Comparison:
    """Measurement, theory and z-scores per layer; made by `gradscope.compare`.

    ``profile``: measured coefficients.  ``prediction``: theory for the nominal initialization.  ``layers``:
    names, in order.  ``weight_variances``, ``nominal``: sigma_w^2 of each weight, measured and nominal.  The z-scores
    are NaN if a test does not apply:

    - ``z_length``: ln of the mean square of each pre-activation, compared with the prediction from the *measured* layer
      before.  So a wrong layer does not change the z-scores of later layers.
    - ``z_growth``: the increment of ln GSC across each layer, compared with theory at the measured length, in robust
      standard deviations of all increments.
    - ``z_weight``: ln of the weight variance, compared with the nominal variance.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=30, generator=torch.Generator().manual_seed(0))
    >>> gs.compare(model, torch.randn(8, 30, generator=torch.Generator().manual_seed(1)))
    Comparison(8 layers, no layer deviates)
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
        """Name of the first layer whose length or gradient deviates from theory, or None."""
        return self._first(np.fmax(np.abs(self.z_length), np.abs(self.z_growth) * THRESHOLD / GROWTH_THRESHOLD))

    @property
    def first_weight_outlier(self) -> str | None:
        """Name of the first layer whose weights do not have the nominal variance, or None.

        GSC does not show a wrong gain before a normalization or with a homogeneous activation such as ReLU.
        """
        return self._first(np.abs(self.z_weight))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer: measured and predicted log10 GSC, weight variances and z-scores."""
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
        lines = [f"theory: rate {theory:.4f} per layer over the upper half"]
        try:
            lines.append(f"measured: {self.profile.growth()}")
        except ValueError as reason:
            lines.append(f"measured: no rate ({reason})")
        deviation, outlier = self.first_deviation, self.first_weight_outlier
        if deviation is not None:
            at = self.layers.index(deviation)
            z = f"length z = {self.z_length[at]:.1f}, growth z = {self.z_growth[at]:.1f}"
            lines.append(f"first layer that deviates: {deviation} ({z})")
        if outlier is not None:
            at = self.layers.index(outlier)
            found = f"{self.weight_variances[at]:.3g}, nominal {self.nominal[at]:.3g}, z = {self.z_weight[at]:.1f}"
            lines.append(f"first layer with weights of another variance: {outlier} ({found})")
        if deviation is None and outlier is None:
            lines.append("no layer deviates from theory")
        return "\n".join(lines)

    def __repr__(self) -> str:
        first = self.first_deviation or self.first_weight_outlier
        return f"Comparison({len(self.layers)} layers, {f'first deviation: {first}' if first else 'no layer deviates'})"

    def _repr_html_(self) -> str:
        """Return the layers as an HTML table of at most 24 rows, for notebooks."""
        return self.to_frame().to_html(index=False, max_rows=24, float_format="{:.3f}".format, na_rep="")

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
    """Return the comparison of a perceptron with mean-field theory of its nominal initialization.

    z-scores use standard errors to first order in 1 / width: a mean square over n neurons and correlated samples has
    relative variance 2 o / n, with o the mean squared cosine between samples.  Theory does not hold for batch
    normalization with a batch larger than half the width; a warning says so.

    Arguments:
        model: A perceptron that `gradscope.checks.reading.read` can read.
        data, forward, probes, generator: As for `gradscope.gsc`; ``data`` must be one batch.
        nominal: sigma_w^2 = fan_in Var(W) of all weights before a nonlinearity: a number; "standard" (2 for ReLU and
            its relatives, else 1); or "measured" (the value of each weight, so that wrong weights do not deviate).

    Cost: that of `gradscope.gsc` and a few forward passes.

    Raises:
        UnreadableError: The theory does not cover the network; the message names the unsupported part.
        ValueError: ``nominal`` has none of these values.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv:1611.01232.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=30, generator=torch.Generator().manual_seed(0))
    >>> _ = model.layers[4].linear.weight.data.mul_(2)
    >>> x = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    >>> gs.compare(model, x).first_weight_outlier
    'layers.4'
    """
    reading = read(model, data, forward=forward)
    specs = reading.specs
    if narrow := [r.width for r in reading.layers if r.spec.norm == "batch" and reading.batch_size > r.width / 2]:
        warnings.warn(
            f"Batch normalization of {reading.batch_size} samples at width {narrow[0]}: theory assumes infinite width "
            "and predicts too large a rate for such a batch.",
            stacklevel=2,
        )
    measured = np.array([spec.weight_variance for spec in specs])
    nominal_variances = np.array([_nominal(nominal, spec) for spec in specs])
    expected = reading.with_weight_variances(list(nominal_variances))
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


def _nominal(nominal: str | float, spec: LayerSpec) -> float:
    if nominal == "measured":
        return spec.weight_variance
    if nominal == "standard":
        alias = spec.activation.name.lower().replace("leakyrelu", "leaky_relu")
        return standard_variance(NAMED[alias]) if alias in NAMED else 1.0
    if isinstance(nominal, (int, float)) and math.isfinite(nominal) and nominal > 0:
        return float(nominal)
    raise ValueError(f'nominal must be "standard", "measured" or a positive number, got {nominal!r}.')


def _z_length(reading: Reading) -> FloatArray:
    """Return z of ln q per layer; theory: q = sigma_w^2 p + sigma_b^2, p the measured mean square one layer before."""
    z, p = [], reading.mean_square
    for layer in reading.layers:
        expected = layer.spec.weight_variance * p + layer.spec.bias_variance
        error = math.sqrt(2 * layer.overlap / layer.width)
        z.append(math.log(layer.received / expected) / error if expected > 0 and layer.received > 0 else math.nan)
        p = layer.square
    return np.array(z)


def _z_growth(reading: Reading, prediction: Prediction, log10_gsc: FloatArray) -> FloatArray:
    """Return z of the increments of ln GSC, for theory at the measured lengths.  NaN for fewer than eight layers."""
    if len(reading.layers) < 8:
        return np.full(len(reading.layers), np.nan)
    predicted, p = -np.diff(prediction.log10_gsc), reading.mean_square
    for number, layer in enumerate(reading.layers):
        if layer.spec.norm == "none":  # a normalization makes the length before it irrelevant
            one = predict([layer.spec, layer.spec], batch_size=reading.batch_size, mean_square=p)
            predicted[number] = one.log10_gsc[0] - one.log10_gsc[1]
        p = layer.square
    residual = -np.diff(log10_gsc) - predicted
    center = np.median(residual)
    scale = 1.4826 * np.median(np.abs(residual - center))
    # No test of the top layer: it receives independent cotangents, unlike the single layers predicted above.
    z = (residual - center) / max(scale, 1e-12)
    z[-1] = np.nan
    return z
