"""`compare(model, data)`: name the odd layer out, by its siblings and by mean-field theory of the initialization."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from gradscope.backward.cotangents import Probes
from gradscope.checks.bands import beside
from gradscope.checks.comparison import Comparison
from gradscope.checks.expectations import INITIALIZATION, KEYS, unexpected
from gradscope.checks.levels import scale
from gradscope.checks.reading import Reading, UnreadableError, read
from gradscope.checks.segments import FEWEST, Segment, segments, siblings
from gradscope.checks.siblings import STRUCTURE, Deviation, odd_numbers, odd_structures
from gradscope.choices import checked, stacklevel
from gradscope.coefficients.gsc import gsc
from gradscope.forward.inputs import Forward
from gradscope.forward.interrupts import interruptible
from gradscope.forward.lengths import ZeroOutputError
from gradscope.forward.modules import unwrap
from gradscope.meanfield import LayerSpec, Prediction, predict, standard_variance
from gradscope.meanfield.activations import NAMED

FloatArray = npt.NDArray[np.float64]


@checked
def compare(
    model: nn.Module,
    data: Any,
    *,
    expected: Mapping[str, Any] | None = None,
    prediction: pd.DataFrame | None = None,
    forward: Forward | None = None,
    probes: Probes = "auto",
    generator: torch.Generator | None = None,
) -> Comparison:
    """Return which layers of an initialized network deviate from similar layers or from mean-field theory, and how.

    Layers are compared in two ways.  Thresholds are corrected for the number of layers.

    - With their *siblings*: layers or blocks of the same class and shape, if there are at least four.  Their inner
      modules, the mean squares of their parameters, and statistics of their outputs are compared.  To compare outputs,
      the siblings f_j of a layer f_i run on the input x_i of f_i.  So a wrong layer does not make later layers look
      wrong.
    - With mean-field theory, if the network is a multilayer perceptron.  The z-score ``z_length`` assumes that the mean
      square of the pre-activations of n neurons follows a scaled chi-square distribution with n / c degrees of freedom.
      Here c is the mean squared cosine between the pre-activations of samples, over all pairs, including each sample
      with itself.  Theory does not hold for batch normalization with a batch larger than half the width; a warning says
      so.

    Arguments:
        model: Any module.  Its weights should be as drawn: training makes layers different.
        data, forward, probes, generator: As for `gradscope.gsc`; ``data`` must be one batch.
        expected: How the layers should be built: a mapping with any of the following keys.  For a missing key, the
            layers should be built as most of them are.
            "activation", "normalization": a class, or a name such as "tanh", "layer" or "none"; see
            `gradscope.checks.expectations.unexpected`.
            "initialization", for networks that theory covers: sigma_w^2 = fan_in Var(W) of all weights before a
            nonlinearity.  The value is a number; or "standard", which means 2 for ReLU and its relatives and otherwise
            1; or "measured", which means the measured value of each weight, so that no weight counts as wrong.
        prediction: Predicted GSC with a band (lower and upper ends), instead of the theory of multilayer perceptrons: a
            frame such as `gradscope.meanfield.Transformer.gsc` returns.  Layers with a measured GSC outside of the band
            deviate.

    Cost: about 4 m forward passes and m backward passes, with m = min(13, size of the largest group of siblings).
    For a perceptron, or if ``prediction`` is given, one call of `gradscope.gsc` is added.

    Raises:
        UnreadableError: Theory does not cover the network, but is needed.  It is needed if ``expected`` has an
            "initialization", or if no layer has siblings.  The message names the unsupported part of the network.
        ValueError: ``expected`` has an unknown key or an invalid value, or ``prediction`` does not fit the network.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv:1611.01232.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=30, generator=torch.Generator().manual_seed(0))
    >>> model.layers[4].activation = torch.nn.Identity()
    >>> x = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    >>> print(gs.compare(model, x).deviations[0].text)
    runs no ReLU where its siblings do
    """
    wanted = dict(expected or {})
    if unknown := sorted(set(wanted) - set(KEYS)):
        raise ValueError(f"expected has an unknown key {unknown[0]!r}; use {', '.join(KEYS)}.")
    initialization = wanted.get(INITIALIZATION, "most")
    _check_initialization(initialization)
    with interruptible() as whole, whole:
        model = unwrap(model)
        found = segments(model, data, forward=forward)
        groups = siblings(found)
        judged = [segment for group in groups for segment in group]
        deviations = unexpected(judged or found[:-1], wanted)
        for group in groups:
            deviations += odd_structures(group, found)
            deviations += odd_numbers(group, model, len(judged)) if initialization != "measured" else []
        names = tuple(segment.name for segment in judged)
        if prediction is not None:
            profile = gsc(model, data, forward=forward, probes=probes, generator=generator)
            band, outside = beside(prediction, profile)
            return Comparison(_sorted([*deviations, *outside], found), names, profile=profile, band=band)
        try:
            reading = read(model, data, forward=forward)
            parts = _theory(model, data, reading, initialization, forward, probes, generator)
        except (UnreadableError, ZeroOutputError) as reason:
            if not judged or initialization != "most":
                few = "" if judged else " The network has no four layers or blocks of one kind."
                raise UnreadableError(f"{reason}{few}") from reason
            return Comparison(_sorted(deviations, found), names, str(reason))
        owners = [
            next((s.name for s in found if f"{r.preactivation}.".startswith(f"{s.name}.")), r.name)
            for r in reading.layers
        ]
        comparison = Comparison((), names, layers=tuple(owners), **parts)
        return replace(comparison, deviations=_sorted([*deviations, *_from_theory(comparison)], found))


def _sorted(deviations: Sequence[Deviation], found: Sequence[Segment]) -> tuple[Deviation, ...]:
    """Sort by strength; among equally strong ones, what the user expected and then the first layer come first."""
    order = {segment.name: place for place, segment in enumerate(found)}
    return tuple(
        sorted(deviations, key=lambda d: (-d.strength, d.quantity == STRUCTURE, order.get(d.layer, len(order))))
    )


def _from_theory(comparison: Comparison) -> list[Deviation]:
    """Return the z-scores beyond their thresholds."""
    deviations = []
    for z, beyond, what in (
        (comparison.z_length, comparison.limit(), "length of the pre-activation"),
        (comparison.z_growth, comparison.limit(growth=True), "growth of GSC"),
        (comparison.z_weight, comparison.limit(), "variance of the weights"),
    ):
        for place in np.flatnonzero(np.abs(np.nan_to_num(z)) > beyond):
            text = f"{what} deviates from theory (z = {z[place]:.1f}, threshold {beyond:.1f})"
            deviations.append(Deviation(comparison.layers[place], what, float(abs(z[place])) / beyond, text))
    return deviations


def _theory(
    model: nn.Module, data: Any, reading: Reading, initialization: str | float, forward: Forward | None, probes: Probes,
    generator: torch.Generator | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of a comparison with theory."""
    specs = reading.specs
    if narrow := [r.width for r in reading.layers if r.spec.norm == "batch" and reading.batch_size > r.width / 2]:
        warnings.warn(
            f"Batch normalization of {reading.batch_size} samples at width {narrow[0]}: theory assumes infinite width "
            "and is less accurate for such a batch.",
            stacklevel=stacklevel(),
        )
    measured = np.array([spec.weight_variance for spec in specs])
    nominal = _expected_variances(initialization, specs, measured)
    expected = reading.with_weight_variances(list(nominal))
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
    return {
        "profile": profile, "prediction": prediction, "reading": reading,
        "weight_variances": measured, "nominal": nominal, "log10_gsc": log10_gsc, "z_length": _z_length(expected),
        "z_growth": _z_growth(expected, prediction, log10_gsc),
        "z_weight": np.log(measured / nominal) / np.sqrt(2 / entries),
    }  # fmt: skip


def _check_initialization(value: Any) -> None:
    number = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    if not (number or value in ("standard", "measured", "most")):
        raise ValueError(f'initialization must be "standard", "measured" or a positive number, got {value!r}.')


def _expected_variances(initialization: str | float, specs: Sequence[LayerSpec], measured: FloatArray) -> FloatArray:
    """Return sigma_w^2 of every layer; by default the median of those with equal activation and normalization."""
    if initialization == "measured":
        return measured
    if isinstance(initialization, (int, float)):
        return np.full(len(specs), float(initialization))
    if initialization == "standard":
        names = [spec.activation.name.lower().replace("leakyrelu", "leaky_relu") for spec in specs]
        return np.array([standard_variance(NAMED[name]) if name in NAMED else 1.0 for name in names])
    kinds = [(spec.activation.name, spec.norm, spec.branch_variance is None) for spec in specs]
    alike = [[m for m, other in zip(measured, kinds, strict=True) if other == kind] for kind in kinds]
    return np.array([np.median(a) if len(a) >= FEWEST else m for a, m in zip(alike, measured, strict=True)])


def _z_length(reading: Reading) -> FloatArray:
    """Return z of q per layer; theory: q = sigma_w^2 p + sigma_b^2, p the measured mean square one layer before.

    The cube root of a chi-square variable is nearly normal, also in the tails (Wilson and Hilferty, 1931).
    """
    z, p = [], reading.mean_square
    for layer in reading.layers:
        expected = layer.spec.weight_variance * p + layer.spec.bias_variance
        variance = 2 * layer.overlap / (9 * layer.width)
        root = (layer.received / expected) ** (1 / 3) if expected > 0 and layer.received > 0 else math.nan
        z.append((root - 1 + variance) / math.sqrt(variance))
        p = layer.square
    return np.array(z)


def _z_growth(reading: Reading, prediction: Prediction, log10_gsc: FloatArray) -> FloatArray:
    """Return z of the increments of ln GSC, for theory at the measured lengths.  NaN for fewer than eight layers."""
    if len(reading.layers) < 8:
        return np.full(len(reading.layers), np.nan)
    predicted, p = -np.diff(prediction.log10_gsc), reading.mean_square
    for number, layer in enumerate(reading.layers):
        if p <= 0:
            predicted[number] = math.nan
        elif layer.spec.norm == "none":  # a normalization makes the length before it irrelevant
            one = predict([layer.spec, layer.spec], batch_size=reading.batch_size, mean_square=p)
            predicted[number] = one.log10_gsc[0] - one.log10_gsc[1]
        p = layer.square
    residual = -np.diff(log10_gsc) - predicted
    # No test of the top layer: it receives independent cotangents, unlike the single layers predicted above.
    residual[-1] = np.nan
    known = residual[np.isfinite(residual)]
    return (residual - np.median(known)) / max(scale(known), 1e-12) if len(known) > 1 else residual * np.nan
