"""Measured GSC beside a prediction with a band: which rows lie outside."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from gradscope.checks.siblings import Deviation
from gradscope.choices import require
from gradscope.coefficients.profiles import Profile

COLUMNS = ("layer", "log10_value", "log10_low", "log10_high")


def beside(prediction: pd.DataFrame, profile: Profile) -> tuple[pd.DataFrame, list[Deviation]]:
    """Return measured and predicted log10 GSC of the layers that both have, and a deviation per row outside its band.

    Raises:
        ValueError: The prediction lacks a column, predicts no layer of the profile except the target, or has layers in
            other places.
    """
    require(prediction, COLUMNS, "gradscope.meanfield.Transformer.gsc")
    predicted = prediction[list(COLUMNS)].rename(columns={"log10_value": "log10_gsc_theory"})
    measured = pd.DataFrame({"layer": profile.layers[:-1], "log10_gsc": profile.log10_values[:-1, -1]})
    table = measured.merge(predicted, on="layer")
    if table.empty:
        raise ValueError(
            f"The prediction has no row of a measured layer: {profile.layers[0]!r} is measured, and "
            f"{prediction['layer'].iloc[0]!r} predicted. Rename the layers of the prediction."
        )
    if "depth_from_output" in prediction:
        places = dict(zip(profile.layers, profile.indices[-1] - np.array(profile.indices), strict=True))
        for layer, place in zip(prediction["layer"], prediction["depth_from_output"], strict=True):
            if places.get(layer, place) != place:
                raise ValueError(
                    f"The prediction is for another network: layer {layer!r} lies {place} layers before the output in "
                    f"the prediction, and {places[layer]} in the model."
                )
    deviations = []
    for row in table.to_dict("records"):
        low, high, value = row["log10_low"], row["log10_high"], row["log10_gsc"]
        half, away = (high - low) / 2, abs(value - (high + low) / 2)
        if away > half:  # never, if the band is unknown
            text = f"log10 GSC of {value:.3f} is outside the predicted band, {low:.3f} to {high:.3f}"
            deviations.append(Deviation(row["layer"], "GSC", away / half if half else math.inf, text))
    return table, deviations
