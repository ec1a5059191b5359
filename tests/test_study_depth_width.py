"""The study of depth and width against networks of known rate, and intervals that hold together."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import gradscope.meanfield as mf
from experiments import sizes
from experiments.collect import Collected
from experiments.studies import depth_width
from gradscope import frames
from tests.helpers import noise, seeded


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
    with pytest.raises(ValueError, match="num_sources=6 layers at equal distances need a depth they divide, got 20"):
        depth_width.measure(model, x, generator=seeded(), num_probes=2, num_sources=6)


def test_intervals_hold_together():
    draws = np.random.default_rng(0).standard_normal((4000, 6, 3)) * [1.0, 5.0, 0.2] + [3.0, -1.0, 0.0]
    held = 0
    for draw in draws:
        low, high = sizes.simultaneous(draw)
        held += bool(((low < [3.0, -1.0, 0.0]) & (high > [3.0, -1.0, 0.0])).all())
    # Bonferroni covers 95 % at least, and of independent columns (1 - 0.05 / 3)^3 = 95.08 %.
    assert held / len(draws) == pytest.approx((1 - 0.05 / 3) ** 3, abs=4 * math.sqrt(0.05 * 0.95 / len(draws)))
    low, high = sizes.simultaneous(draws[0][:, :1])
    expected = stats.t.interval(0.95, 5, loc=draws[0][:, 0].mean(), scale=stats.sem(draws[0][:, 0]))
    assert (low[0], high[0]) == pytest.approx(expected)


def synthetic(depth_effect=0.0, width_effect=0.0, noise_of=0.0):
    """SELU of nine sizes whose rate is 1.1 + depth_effect (depth / 100) + width_effect / width."""
    generator, parts = np.random.default_rng(1), []
    for seed in range(8):
        for depth in (50, 100, 200):
            for width in (100, 200, 400):
                rate = 1.1 + depth_effect * depth / 100 + width_effect / width + noise_of * generator.standard_normal()
                away = np.arange(9, -1, -1) * (depth // 10)
                parts.append(
                    frames.tidy(
                        {
                            "layer": [f"layers.{depth - 1 - d}" for d in away], "index": depth - away,
                            "depth_from_output": away, "target": f"layers.{depth - 1}", "quantity": "gsc",
                            "log10_value": away * math.log10(rate), "log10_stderr_probe": 0.0,
                            "log10_stderr_sample": 0.0, "reduction": "batch", "coupled": False, "num_probes": 0,
                            "num_samples": 32,
                        }
                    ).assign(seed=seed, depth=depth, width=width)
                )  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(model="selu", activation="selu", norm="none", batch_size=32)


@pytest.mark.parametrize(
    ("effects", "by_depth", "by_width"),
    [
        ({"noise_of": 0.001}, True, True),
        ({"noise_of": 0.1}, None, None),
        ({"depth_effect": 0.02, "noise_of": 0.001}, False, True),
        ({"width_effect": 2.0, "noise_of": 0.001}, True, False),
    ],
)
def test_an_effect_is_found_where_it_is(effects, by_depth, by_width):
    found = depth_width.claims(Collected(synthetic(**effects), None, {}))
    assert [claim.holds for claim in found[:2]] == [by_depth, by_width]
    assert "does not depend on the depth" in found[0].says and "does not depend on the width" in found[1].says


def test_rates_of_a_frame_that_is_known():
    rates = sizes.all_rates(synthetic(width_effect=2.0), ["selu"])["selu"]
    assert (rates.depths, rates.widths) == ((50, 100, 200), (100, 200, 400))
    np.testing.assert_allclose(rates.values, np.broadcast_to(1.1 + 2.0 / np.array([100, 200, 400]), (8, 3, 3)))
    np.testing.assert_allclose(rates.lines, [[1.1, 2.0]] * 8)
    assert rates.common.value == pytest.approx(1.1 + 2 * (0.01 + 0.005 + 0.0025) / 3)
    np.testing.assert_allclose(rates.by_width[0], 2 * np.array([0.01, 0.005, 0.0025]) - 2 * 0.0175 / 3)
    assert rates.theory == mf.gsc_rate("selu")


def test_the_limit_is_held_against_mean_field():
    *_, limit = depth_width.claims(Collected(synthetic(width_effect=2.0, noise_of=1e-4), None, {}))
    assert limit.holds is False  # 1.1, and mean field says 1.0716
    assert f"{1.1 - mf.gsc_rate('selu'):+.4f}" in limit.because
