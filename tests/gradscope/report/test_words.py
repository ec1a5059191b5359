"""Sentences and numbers of the page say what the measurements support, and no more."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradscope as gs
from gradscope.coefficients.growth import fit_growth
from gradscope.models import MLP
from gradscope.report import sections, tables, words
from tests.browser import Tables
from tests.helpers import noise, seeded

# log10 GSC of a ResNet-8: every stage adds growth, and the mean over positions takes away more than that.
RESNET = [-0.903, -0.853, -0.920, -0.938, -1.100, -1.301, -1.443, -0.013, -0.013, 0.0]


def rows_of(log10, half=0.0):
    names = [f"layer {place}" for place in range(len(log10))]
    log10 = np.array(log10)
    depth = np.arange(len(log10))[::-1]
    return pd.DataFrame(
        {"layer": names, "depth_from_output": depth, "log10_value": log10, "log10_low": log10 - half,
         "log10_high": log10 + half}
    )  # fmt: skip


def verdict_on(log10, half=0.0):
    rows = rows_of(log10, half)
    growth = fit_growth(rows["log10_value"], rows["depth_from_output"])
    kind, headline, facts = words.verdict(rows, growth, "")
    return growth, kind, headline, dict(facts)


def test_a_rate_that_the_whole_network_contradicts_is_no_explosion():
    growth, kind, headline, facts = verdict_on(RESNET)
    assert growth.verdict == "exploding" and growth.total < 0  # what is tested here
    assert kind == "" and "explode" not in headline
    assert headline == (
        "◆ Gradients grow from layer to layer, but not over the whole network: GSC of the network is 0.1250"
    )
    assert "at layer 7: GSC is 0.03606 before it and 0.9705 after it" in facts["Whole network"]
    assert "nothing explodes at this depth" in facts["Meaning"] and "Reduce the depth" not in facts["What to do"]
    assert "fitted to 6 of 9 layers, those nearer to layer 9" in facts["Rate"]


def test_the_mirrored_network_does_not_vanish():
    growth, kind, headline, facts = verdict_on([-value for value in RESNET])
    assert growth.verdict == "vanishing" and kind == ""
    assert headline.startswith("◆ Gradients shrink from layer to layer, but not over the whole network")
    assert "at layer 7: GSC is 27.73 before it and 1.030 after it" in facts["Whole network"]


@pytest.mark.parametrize(("rate", "verdict"), [(1.3, "exploding"), (1 / 1.3, "vanishing")])
def test_rate_and_network_agree(rate, verdict):
    log10 = np.log10(rate) * np.arange(40)[::-1]
    growth, kind, headline, facts = verdict_on(log10)
    assert growth.verdict == kind == verdict
    value = 39 * math.log10(rate)
    assert headline.endswith(f"GSC of the network is 10^{value:.4g}".replace("-", "−"))
    assert "step against" not in facts["Whole network"]


def test_a_total_that_may_be_below_one_is_no_explosion():
    log10 = np.log10(1.3) * np.arange(10.0)[::-1]
    assert verdict_on(log10, half=0.5)[1] == "exploding"
    assert verdict_on(log10, half=1.2)[1] == ""  # the interval of the whole network contains 1


def test_a_curve_that_bends_is_said():
    growth, _, _, facts = verdict_on(np.cumsum(np.r_[0, np.full(15, 0.2), np.full(15, 0.02)])[::-1])
    assert growth.curved and "The curve bends" in facts["Rate"]


def test_first_layers_that_spoil_the_rate_of_a_short_network():
    """log10 GSC of input, stem, eight blocks and a head that averages over positions."""
    log10 = [-2.70, -2.81, -2.15, -2.15, -2.15, -2.13, -2.10, -2.03, -1.99, -1.94, 0.0]
    growth, _, _, facts = verdict_on(log10)
    assert growth.verdict == "undecided" and "with layers= of gs.gsc" in facts["What to do"]
    blocks, *_ = verdict_on(log10[2:])
    assert blocks.rate_high / blocks.rate_low < 0.5 * growth.rate_high / growth.rate_low  # the advice helps here
    long, _, _, facts = verdict_on([*np.linspace(0.8, 0.1, 40), *([0.0, 0.3] * 6), 0.0])
    assert long.verdict == "undecided" and "layers=" not in facts["What to do"]
    assert "layers=" not in verdict_on(np.linspace(2.0, 0.0, 10))[3]["What to do"]  # decided


def test_no_interval_has_ends_that_look_alike():
    generator = np.random.default_rng(0)
    for _ in range(500):
        value, half = generator.normal() * 10 ** generator.uniform(-9, 9), 10 ** generator.uniform(-9, 3)
        half = max(half, 1e-6 * abs(value))
        low, shown, high = (tables.supported(end, half) for end in (value - half, value, value + half))
        assert len({low, high}) == 2
        number = float(shown.replace("−", "-"))
        assert abs(number - value) <= 0.051 * half * (1 + 1e-9)  # half of the second digit of the error


def test_a_table_shows_what_errors_support_and_holds_all_digits():
    frame = pd.DataFrame(
        {"layer": ["a", "b"], "x": [1.2345678, math.nan], "low": [1.2, math.nan], "high": [1.3, math.nan],
         "y": [12.345678, 3.456789], "z": [0.123456, -1.5], "n": [12345, 6],
         "empty": ["", None], "unknown": [math.nan] * 2}
    )  # fmt: skip
    errors = pd.DataFrame({"y": [0.12, math.nan]})
    text = tables.html(frame, "caption", errors=errors, interval=("x", "low", "high"), scores=["z"])
    table = Tables(text).tables[0]
    assert table[0] == ["layer", "x", "low", "high", "y", "z", "n"]  # columns that hold nothing are left out
    assert table[1] == ["a", "1.2345678", "1.2", "1.3", "12.345678", "0.123456", "12345"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells[:6] == ["1.235", "1.200", "1.300", "12.35 <small>± 0.12</small>", "0.1", "12345"]
    assert cells[6:] == ["–", "–", "–", "3.46", "−1.5", "6"]
    exact = tables.html(frame.assign(low=frame["x"], high=frame["x"]), "caption", interval=("x", "low", "high"))
    assert Tables(exact).tables[0][0] == ["layer", "x", "y", "z", "n"]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(7))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


def test_what_is_missing_is_said_where_it_is_missed(tmp_path):
    model, data = Functional().double(), (noise(6, 8), torch.arange(6))

    def losses(output, labels):
        return cross_entropy(output, labels, reduction="none")

    text = gs.report(model, data, tmp_path / "report.html", loss_fn=losses, matrix=False, check=False).read_text()
    reason = (
        "Statistics of activations are missing. No nonlinearity module was called in model Functional: functional calls"
    )
    assert text.index("Layers</h2>") < text.index(reason) < text.index(sections.COMPARED + "</h2>")
    assert "choose measures=" not in text  # an argument of another function
    table = next(table for table in Tables(text).tables if "log10 GSC" in table[0])
    place = table[0].index("gradient norm")
    shown = {row[0]: float(row[place]) for row in table[1:] if row[place]}
    measured = gs.measure(model, data, loss_fn=losses, measures=[gs.measures.GradientNorm()])
    assert shown == dict(zip(measured["layer"], measured["value"], strict=True))


def test_a_loader_is_refused_with_what_to_give(tmp_path):
    data = torch.utils.data.TensorDataset(noise(12, 8), torch.arange(12))
    with pytest.raises(ValueError, match=r"stream of batches \(DataLoader\): give one batch, such as next\(iter"):
        gs.report(MLP(depth=8, width=8), torch.utils.data.DataLoader(data, 4), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_networks_whose_rate_and_total_differ_are_named():
    growth = pd.DataFrame(
        {"network": ["a", "b"], "rate": [1.3, 1.3], "verdict": ["exploding"] * 2, "log10_gsc": [-0.9, 3.0]}
    )
    headline, facts = words.verdicts(growth)
    assert headline == "2 networks: 2 exploding"
    assert dict(facts)["Beware"].endswith("on the other side of 1 for a (0.1259).")


def test_wide_tables_get_the_longer_side_of_the_paper(tmp_path):
    model = MLP(depth=8, width=8, generator=seeded()).double()
    text = gs.report(model, noise(6, 8), tmp_path / "report.html", matrix=False, check=False, compare=False).read_text()
    assert 'class="wide"' in text
    bare = Functional().double()
    text = gs.report(bare, noise(6, 8), tmp_path / "report.html", matrix=False, check=False, compare=False).read_text()
    assert 'class="wide"' not in text
