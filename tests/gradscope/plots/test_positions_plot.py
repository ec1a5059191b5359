"""Figures of GSC by position: what they draw, and of what."""

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise, seeded

T = 4


@pytest.fixture(scope="module")
def model():
    class Sums(nn.Module):
        """Every position adds half of all earlier ones."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.5 * torch.ones(T, T, dtype=torch.float64).tril(-1))

        def forward(self, x):
            return x + self.weight @ x

    return nn.Sequential(Sums(), Sums())


def test_the_heat_map_holds_the_blocks_and_masks_exact_zeros(model):
    found = gs.gsc(model, noise(3, T, 2), positions="both")
    for layer, row in (("input", 0), ("0", 1)):
        ax = gs.plots.positions(found, layers=layer)
        drawn = ax.collections[0].get_array()
        expected = 10 ** found.blocks.log10_values[row]
        np.testing.assert_allclose(drawn.filled(0), expected)
        assert (drawn.mask == (expected == 0)).all() and drawn.mask.sum() == T * (T - 1) / 2
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("source position $s$", "target position $t$")
        assert ax.figure.axes[-1].get_ylabel() == "GSC of a block (squared convention)"


@pytest.mark.parametrize("by", ["source", "target"])
def test_curves_have_one_line_per_layer_with_a_band(model, by):
    found = gs.gsc(model, noise(3, T, 2), positions=by, probes=3, generator=seeded())
    ax = found.plot()
    lines = [line for line in ax.lines if len(line.get_xdata()) == T]
    for line, values in zip(lines, found.blocks.log10_values[:-1], strict=True):
        np.testing.assert_allclose(line.get_ydata(), values.ravel())
    # Of one target position, J J^T is diagonal: then random signs are exact, and there is no band.
    assert len(ax.collections) == 2 * (by == "source") and ax.get_xlabel().startswith(f"{by} position")


def test_the_lag_profile_shows_sinks_apart(model):
    frame = gs.gsc(model, noise(3, T, 2), positions="both").lag_profile(sinks=1)
    ax = gs.plots.positions(frame, layers=["input"])
    assert ax.get_xlabel() == "lag $t - s$"
    assert [text.get_text() for text in ax.texts] == ["s = 0", "input"]
    rows = frame[(frame["layer"] == "input") & (frame["quantity"] == "gsc_by_lag")]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), rows["log10_value"].where(np.isfinite(rows["log10_value"])))


BAD = [
    ({"layers": "nowhere"}, r"layers must be some of input, 0, 1; got \['nowhere'\]"),
    ({"layers": ["input", "0"]}, r"A heat map shows the blocks of one layer, got layers=\['input', '0'\]"),
    ({"data": gs.frames.observed("balance", 1.0).assign(log10_low=0.0, log10_high=0.0)}, "no blocks of positions"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        gs.plots.positions(**{"data": gs.gsc(model, noise(3, T, 2), positions="both"), **options})
