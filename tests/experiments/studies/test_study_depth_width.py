"""The study of depth and width against networks of known rate, and intervals that hold together."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import gradscope.meanfield as mf
from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.evidence.means import mean
from experiments.studies import depth_width
from experiments.studies.depth_width import figures, measurement, numbers
from gradscope import frames
from tests.helpers import ROOT, noise, seeded


class Turn(nn.Module):
    """x -> a Q (x - 1) + 1 with Q orthogonal, which leaves the point 1 where it is and stretches around it by a."""

    def __init__(self, a, seed):
        super().__init__()
        self.weight = nn.Parameter(a * torch.linalg.qr(noise(8, 8, seed=seed))[0])

    def forward(self, x):
        return (x - 1) @ self.weight.T + 1


def test_every_source_at_its_distance():
    model = nn.Module()
    model.layers = nn.Sequential(*(Turn(1.5, seed) for seed in range(20)))
    model.forward = model.layers.forward
    x = torch.ones(4, 8, dtype=torch.float64)
    frame = depth_width.measure(model, x, generator=seeded(), num_probes=2, num_sources=5)
    assert frame["layer"].tolist() == [f"layers.{k}" for k in (3, 7, 11, 15, 19)]
    assert frame["depth_from_output"].tolist() == [16, 12, 8, 4, 0]
    np.testing.assert_allclose(frame["log10_value"], 2 * math.log10(1.5) * frame["depth_from_output"], atol=1e-12)
    with pytest.raises(ValueError, match="num_sources=6 must divide the depth, got depth 20"):
        depth_width.measure(model, x, generator=seeded(), num_probes=2, num_sources=6)


def test_intervals_hold_together():
    draws = np.random.default_rng(0).standard_normal((4000, 6, 3)) * [1.0, 5.0, 0.2] + [3.0, -1.0, 0.0]
    held, truth = 0, [3.0, -1.0, 0.0]
    for draw in draws:
        found = numbers.simultaneous(draw)
        held += all(one.low < value < one.high for one, value in zip(found, truth, strict=True))
    # Bonferroni covers 95 % at least, and of independent columns (1 - 0.05 / 3)^3 = 95.08 %.
    assert held / len(draws) == pytest.approx((1 - 0.05 / 3) ** 3, abs=4 * math.sqrt(0.05 * 0.95 / len(draws)))
    wider = stats.t.interval(1 - 0.05 / 6, 5, loc=draws[0].mean(axis=0), scale=stats.sem(draws[0]))
    ends = [(one.low, one.high) for one in numbers.simultaneous(draws[0], looks=2)]
    np.testing.assert_allclose(ends, np.transpose(wider))


def synthetic(depth_effect=0.0, width_effect=0.0, noise_of=0.0, base=1.1, num_seeds=8):
    """SELU of nine sizes whose rate is base + depth_effect (depth / 100) + width_effect / width."""
    generator, rows = np.random.default_rng(1), []
    for seed in range(num_seeds):
        for depth in (50, 100, 200):
            for width in (100, 200, 400):
                rate = base + depth_effect * depth / 100 + width_effect / width + noise_of * generator.standard_normal()
                away = np.arange(9, -1, -1) * (depth // 10)
                rows += [(seed, depth, width, far, far * math.log10(rate)) for far in away]
    seeds, depths, widths, away, log10_values = map(list, zip(*rows, strict=True))
    frame = frames.tidy(
        {
            "layer": [f"layers.{depth - 1 - far}" for depth, far in zip(depths, away, strict=True)],
            "index": np.array(depths) - away, "depth_from_output": away,
            "target": [f"layers.{depth - 1}" for depth in depths], "quantity": "gsc", "log10_value": log10_values,
            "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.0, "reduction": "batch", "coupled": False,
            "num_probes": 0, "num_samples": 32,
        }
    ).assign(seed=seeds, depth=depths, width=widths)  # fmt: skip
    return frame.assign(model="selu", activation="selu", norm="none", batch_size=32)


@pytest.mark.parametrize(
    ("effects", "within", "dependent"),
    [
        ({"noise_of": 0.001}, [True, True], [False, False]),
        ({"noise_of": 0.1}, [None, None], [None, None]),
        ({"noise_of": 0.012}, [None, None], [None, None]),  # no dependence is seen, and one beyond the tolerance may be
        ({"depth_effect": 0.02, "noise_of": 0.001}, [False, True], [True, False]),
        ({"width_effect": 2.0, "noise_of": 0.001}, [True, False], [False, True]),
        ({"width_effect": 0.5, "noise_of": 0.0005}, [True, True], [False, True]),  # little, and yet there
        # From the smallest to the largest width the change is 0.0061 in the log; from the mean, it was at most 0.004.
        ({"width_effect": 0.9, "noise_of": 0.0001}, [True, False], [False, True]),
        ({"depth_effect": 0.004, "base": 1.0, "noise_of": 1e-4}, [False, True], [True, False]),
        ({"depth_effect": 0.004, "base": 1.6, "noise_of": 1e-4}, [True, True], [True, False]),  # what counts is the log
    ],
)
def test_an_effect_is_found_where_it_is(effects, within, dependent):
    found = depth_width.claims(Collected(synthetic(**effects), None, {}))
    assert [claim.holds for claim in found[:2]] == within
    assert [claim.holds for claim in found[2:4]] == dependent
    says = [claim.says for claim in found]
    assert "within tolerance at every depth" in says[0] and "within tolerance at every width" in says[1]
    assert "depends on the depth" in says[2] and "depends on the width" in says[3]


def test_the_answer_follows_the_verdicts():
    same, other = (
        depth_width.answer(Collected(synthetic(width_effect=effect, noise_of=1e-3, num_seeds=16), None, {}))
        for effect in (0.0, 2.0)
    )
    assert "per layer is the same within 0.5 % in selu. From width" in same
    assert "is the same within 0.5 % in selu. In the" in same
    assert "is the same within 0.5 % in selu. From width" in other and "it changes by more in selu. In the" in other


def test_the_details_follow_the_verdicts():
    many = depth_width.details(Collected(synthetic(width_effect=2.0, noise_of=1e-3, num_seeds=16), None, {}))
    assert many.startswith("3 seeds were added") and 'is supported for "at every depth" and ' in many
    assert "depend on the depth (in brackets: change of the log rate): none. Networks" in many
    assert "change by less than the tolerance, if at all: selu." in many
    assert "depend on the width (in brackets: change of the log rate): selu (-0.0" in many
    assert "| selu | 1." in many
    few = depth_width.details(Collected(synthetic(noise_of=1e-3), None, {}))
    assert "after the first look" not in few


def test_a_dependence_is_corrected_for_all_that_were_looked_at():
    """The widest grow less, by 2.6 standard errors: enough for a single test of eight seeds, not for one of four.

    The interval of the change, which contains 0, lies within the tolerance.
    """
    frame = synthetic()
    widest = frame["width"] == 400
    change = -0.002 + 0.002035 * np.where(frame["seed"] % 2, 1, -1)
    frame.loc[widest, "log10_value"] += (frame["depth_from_output"] * change / math.log(10))[widest]
    ends = numbers.all_rates(Collected(frame, None, {}))["selu"].ends("width")
    assert ends.mean() / stats.sem(ends) == pytest.approx(-2.6, abs=0.01)
    assert mean(ends).high < 0 < mean(ends, comparisons=4).high
    claim = depth_width.claims(Collected(frame, None, {}))[3]
    assert claim.holds is False and f"{mean(ends, comparisons=4):+}" in claim.because


def test_sizes_are_those_that_were_measured():
    collected = reference.load(ROOT / "results" / "depth_width")
    assert collected.frame["seed"].nunique() > measurement.FIRST_SEEDS
    assert set(collected.manifest["choices"]["model"]) == set(measurement.NETWORKS)
    assert measurement.TOLERANCE * max(collected.manifest["config"]["model"]["depth"]) == pytest.approx(1)


def test_rates_of_a_frame_that_is_known():
    rates = numbers.all_rates(Collected(synthetic(width_effect=2.0), None, {}))["selu"]
    known = np.log(1.1 + 2.0 / np.array([100, 200, 400]))
    assert (rates.depths, rates.widths) == ((50, 100, 200), (100, 200, 400))
    np.testing.assert_allclose(rates.values, np.broadcast_to(np.exp(known), (8, 3, 3)))
    assert rates.largest.value == pytest.approx(np.exp(known[-1]))
    np.testing.assert_allclose(rates.by("width")[0], known[:2] - known[2])
    np.testing.assert_allclose(rates.by("depth"), 0, atol=1e-12)
    slope, end = np.polyfit(1 / np.array([100, 200, 400]), known, 1)
    np.testing.assert_allclose(rates.lines, [[end, slope]] * 8)
    assert rates.theory == mf.gsc_rate("selu")


def test_the_limit_is_held_against_mean_field():
    *_, limit = depth_width.claims(Collected(synthetic(width_effect=2.0, noise_of=1e-4), None, {}))
    assert limit.holds is False  # 1.1, and mean field says 1.0716
    *_, limit = depth_width.claims(Collected(synthetic(width_effect=0.1, base=mf.gsc_rate("selu")), None, {}))
    assert limit.holds is True


def test_profiles_run_from_mean_field():
    frame = synthetic(base=1.2, num_seeds=2)
    both = pd.concat([frame, frame.assign(model="relu_batch", activation="relu", norm="batch")])
    figure = figures.profiles(both)
    deepest = next(ax for ax in figure.axes if ax.get_title() == "selu, depth 200")
    curve = next(line for line in deepest.lines if line.get_label() == "width 100")
    expected = 180 * (math.log10(1.2) - math.log10(mf.gsc_rate("selu")))
    assert max(curve.get_xdata()) == 180 and curve.get_ydata()[-1] == pytest.approx(expected)
    assert len({(line.get_color(), line.get_marker()) for line in deepest.lines[:3]}) == 3
    plt.close(figure)
