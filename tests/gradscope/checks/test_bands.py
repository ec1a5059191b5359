"""`gs.compare` with a prediction that has a band."""

import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise, seeded


def orthogonal() -> nn.Sequential:
    """Six orthogonal maps, for which every GSC is 1."""
    layers = [nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(6)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, generator=seeded(1))
    return nn.Sequential(*layers)


def band(low: float, high: float, names=("0", "1", "2", "3", "4")) -> pd.DataFrame:
    middle = (low + high) / 2
    return pd.DataFrame({"layer": names, "log10_value": middle, "log10_low": low, "log10_high": high})


def test_all_rows_within():
    found = gs.compare(orthogonal(), noise(4, 8), prediction=band(-0.1, 0.2))
    assert found.deviations == ()
    assert str(found).splitlines()[-1] == "compared with the prediction: 5 layers"
    frame = found.to_frame()
    assert frame["log10_gsc"].tolist() == pytest.approx([0.0] * 5, abs=1e-12)
    assert frame["log10_gsc_theory"].tolist() == pytest.approx([0.05] * 5)


def test_rows_outside_are_named_with_their_distance():
    prediction = band(-0.1, 0.1)
    prediction.loc[2, ["log10_low", "log10_high"]] = 0.3, 0.5  # 0 is four half-widths from 0.4
    found = gs.compare(orthogonal(), noise(4, 8), prediction=prediction.drop(index=3))
    assert [(d.layer, d.quantity) for d in found.deviations] == [("2", "GSC")]
    assert found.deviations[0].strength == pytest.approx(4.0)
    assert found.first_deviation == "2"
    assert found.to_frame().set_index("layer").loc["2", "deviation"].endswith("predicted band, 0.300 to 0.500")


def test_theory_of_a_transformer():
    options = {"depth": 8, "width": 128, "heads": 4, "length": 16, "vocabulary": 128}
    plain, gated = (gs.models.GPT(**options, mlp=mlp, generator=seeded()) for mlp in ("gelu", "swiglu"))
    x = torch.randint(128, (2, 16), generator=seeded(1))
    prediction = plain.mean_field(x).gsc()
    assert not gs.compare(plain, x, prediction=prediction, probes=2).deviations
    # All blocks are alike, so siblings show nothing, but GSC of gated blocks grows faster.
    found = gs.compare(gated, x, prediction=prediction, probes=2)
    assert {deviation.quantity for deviation in found.deviations} == {"GSC"}
    assert found.first_deviation == "embedding"


@pytest.mark.parametrize(
    ("prediction", "match"),
    [
        (band(0, 1).drop(columns="log10_low"), "lacks the column 'log10_low'"),
        (band(0, 1, ["a", "b", "c", "d", "e"]), "no row of a measured layer: 'input' is measured, and 'a' predicted"),
        (
            band(0, 1).assign(depth_from_output=9),
            "layer '0' lies 9 layers before the output in the prediction, and 5 in",
        ),
    ],
)
def test_predictions_that_do_not_fit(prediction, match):
    with pytest.raises(ValueError, match=match):
        gs.compare(orthogonal(), noise(4, 8), prediction=prediction)
