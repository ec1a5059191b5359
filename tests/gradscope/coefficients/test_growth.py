"""Rates, intervals and verdicts on curves whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import gradscope as gs
from gradscope.coefficients.growth import fit_growth

DEPTH = np.arange(50, -1, -1)
LN10 = math.log(10)


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(1.5, "exploding"), (1.03, "exploding"), (0.9, "vanishing"), (1.0, "stable"), (1.01, "stable")],
)
def test_an_exact_exponential(rate, verdict):
    growth = fit_growth(math.log10(3) + DEPTH * math.log10(rate), DEPTH)
    assert growth.rate == pytest.approx(rate, rel=1e-12)
    assert growth.intercept == pytest.approx(3, rel=1e-9)
    assert growth.verdict == verdict
    assert not growth.curved
    assert growth.rate_low == pytest.approx(rate, rel=1e-9)
    assert growth.total == pytest.approx(math.log10(3) + 50 * math.log10(rate))


def test_order_of_the_layers_does_not_matter():
    y = np.random.default_rng(0).normal(size=51).cumsum()
    order = np.random.default_rng(1).permutation(51)
    assert fit_growth(y, DEPTH) == fit_growth(y[order], DEPTH[order])


@pytest.mark.parametrize("power", [2, 3, 6])
def test_a_power_law_is_curved(power):
    assert fit_growth(power * np.log10(1 + DEPTH), DEPTH).curved


def test_a_curve_that_surely_grows_is_exploding_and_curved():
    # Ten times the rate near the target, and still far above the margin far from it.
    growth = fit_growth(np.where(DEPTH > 25, 5 + 0.02 * (DEPTH - 25), 0.2 * DEPTH), DEPTH)
    assert (growth.verdict, growth.curved) == ("exploding", True)
    assert "exploding, curved (p = " in str(growth)


@pytest.mark.parametrize(("rate", "ignored"), [(1.0, math.log(1.02)), (1.5, math.log(1.5) / 4)])
def test_halves_that_differ_by_just_what_does_not_count_are_rarely_curved(rate, ignored):
    # The margin, or a quarter of the slope: the p value is below 0.01 in 1 % of all cases, 5 of 500.
    rng, found = np.random.default_rng(5), 0
    kink = np.maximum(DEPTH - 26, 0) * ignored / LN10
    for _ in range(500):
        found += fit_growth(walk(rng, rate, 0.1)[0] + kink, DEPTH).curved
    assert 0 < found <= 15


def test_growth_that_ended_long_before_the_target_gives_no_rate():
    growth = fit_growth(np.where(DEPTH > 40, (DEPTH - 40) * 0.2, 0.0), DEPTH)
    assert growth.verdict == "stable"
    assert growth.total == pytest.approx(2)


def walk(rng, rate, spread, seeds=1, layers=50):
    steps = rng.normal(math.log10(rate), spread / LN10, size=(seeds, layers))
    return np.concatenate([np.zeros((seeds, 1)), steps.cumsum(axis=1)], axis=1)[:, ::-1]


@pytest.mark.parametrize("seeds", [1, 2, 8])
def test_the_interval_covers_the_rate_of_a_random_walk(seeds):
    # log GSC of a random network is a sum of changes; 1,000 repetitions know 95 % to 0.7 %, and the bounds lie four
    # times as far away.
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(1000):
        growth = fit_growth(walk(rng, 1.2, 0.1, seeds), DEPTH)
        hits += growth.rate_low <= 1.2 <= growth.rate_high
    assert 0.922 <= hits / 1000 <= 0.978


def test_noise_that_all_rows_share_does_not_narrow_the_interval():
    # Probes change the curve by a walk of their own.  The interval must contain it, although each row of a single curve
    # looks as certain as before.
    rng, hits = np.random.default_rng(3), 0
    for _ in range(500):
        growth = fit_growth(walk(rng, 1.2, 0.05) + walk(rng, 1.0, 0.1), DEPTH)
        hits += growth.rate_low <= 1.2 <= growth.rate_high
    assert 0.91 <= hits / 500 <= 0.99


@pytest.mark.parametrize(("rate", "wrong"), [(1.02, "exploding"), (1.02, "stable"), (0.98, "vanishing")])
def test_a_rate_at_the_margin_is_rarely_decided_wrongly(rate, wrong):
    # 2.5 % is promised; 1,000 repetitions know it to 0.5 %, and the bound lies three times as far away.
    rng = np.random.default_rng(7)
    verdicts = [fit_growth(walk(rng, rate, 0.05), DEPTH).verdict for _ in range(1000)]
    assert verdicts.count(wrong) / 1000 <= 0.04


def test_alternating_layers_do_not_widen_the_interval():
    # Attention and feed-forward sublayers change GSC by different constants: a zigzag without any uncertainty.
    zigzag = 0.01 * (DEPTH % 2)
    rng = np.random.default_rng(2)
    curves = [walk(rng, 1.0, 0.01)[0] for _ in range(20)]

    def width(added):
        found = [fit_growth(curve + added, DEPTH) for curve in curves]
        return np.median([one.rate_high - one.rate_low for one in found])

    assert width(zigzag) < 2 * width(0.0)


def test_a_final_layer_of_another_kind_is_left_out():
    y = walk(np.random.default_rng(4), 1.03, 0.01)[0]
    jump = y + np.where(DEPTH > 1, 0.5, 0.0)  # a final normalization between depths 1 and 2
    plain, found = fit_growth(y, DEPTH), fit_growth(jump, DEPTH)
    assert found.rate == pytest.approx(plain.rate, rel=0.005)
    assert found.total == pytest.approx(plain.total + 0.5)


def test_seeds_are_averaged_in_the_logarithm():
    rates = np.linspace(1.1, 1.4, 8)
    growth = fit_growth(np.log10(rates)[:, None] * DEPTH, DEPTH)
    logs = np.log(rates)
    assert math.log(growth.rate) == pytest.approx(logs.mean())
    margin = 2.364624 * logs.std(ddof=1) / math.sqrt(8)  # Student's t with seven degrees of freedom
    assert math.log(growth.rate_high / growth.rate) == pytest.approx(margin, rel=1e-5)


def test_a_verdict_of_many_networks_is_never_weaker_than_their_common_verdict():
    rng, needed = np.random.default_rng(6), 0
    for _ in range(200):
        seeds, rate = int(rng.integers(2, 12)), float(rng.choice([1.04, 1.1, 0.95, 1.0]))
        curves = walk(rng, rate, float(rng.choice([0.01, 0.05])), seeds) * rng.normal(1, 0.5, size=(seeds, 1))
        alone = {fit_growth(curve, DEPTH).verdict for curve in curves}
        if len(alone) == 1 and alone != {"undecided"}:
            needed += 1
            assert fit_growth(curves, DEPTH).verdict in alone
    assert needed > 20


def test_undecided_says_what_would_decide():
    rng = np.random.default_rng(1)
    few = fit_growth(walk(rng, 1.03, 0.1), DEPTH)
    assert few.verdict == "undecided"
    assert few.advice == str(few).split(": ")[1]
    needed = int(few.advice.split()[1])
    # As many networks as it says, with the same spread and this rate, are decided in most cases.
    found = [fit_growth(walk(rng, few.rate, 0.1, needed), DEPTH).verdict for _ in range(30)]
    assert sum(verdict != "undecided" for verdict in found) >= 10


def test_the_margin_is_the_callers():
    y = DEPTH * math.log10(1.03)
    assert fit_growth(y, DEPTH, margin=0.05).verdict == "stable"
    assert fit_growth(y, DEPTH, margin=0.01).verdict == "exploding"
    with pytest.raises(ValueError, match="margin is a relative change of GSC per layer between 0 and 1"):
        fit_growth(y, DEPTH, margin=1.02)


def test_text():
    text = str(fit_growth(DEPTH * math.log10(1.5), DEPTH))
    assert text == "rate 1.5000 (no spread) per layer, exploding"


def test_layers_of_one_unit_share_a_depth():
    with pytest.raises(ValueError, match="at least 6 different depths, got 3, 4"):
        fit_growth(np.arange(9.0), np.array([4, 4, 4, 4, 3, 3, 3, 3, 0]))


def test_errors():
    with pytest.raises(ValueError, match="at least 6 layers besides the target, got 4"):
        fit_growth(np.zeros(5), np.arange(5))
    y = DEPTH * 0.1
    y[DEPTH == 7] = -math.inf
    with pytest.raises(ValueError, match="zero or not finite 7 layers from the target"):
        fit_growth(y, DEPTH)
    with pytest.raises(ValueError, match=r"shape \(1, 51\), but depth_from_output has 9 entries"):
        fit_growth(y, np.arange(9))


def profiles(seeds=3, depth=12, width=20):
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    models = [gs.models.MLP(depth=depth, width=width, activation="tanh", norm="layer", generator=g) for g in generators]
    return [gs.gsc(m, torch.randn(8, width, generator=g)) for m, g in zip(models, generators, strict=True)]


def test_results_lists_and_frames_give_the_same_growth():
    found = profiles()
    frame = pd.concat([one.to_frame().assign(seed=7 * seed) for seed, one in enumerate(found)])
    values = np.stack([one.log10_values[:, 0] for one in found])
    fitted = fit_growth(values, np.arange(12, -1, -1))
    assert gs.growth(found).rate == gs.growth(frame).rate == fitted.rate
    assert gs.growth(found).num_networks == 3
    assert gs.growth(found[0]) == found[0].growth()


def test_the_interval_of_the_total_is_that_of_the_probes():
    model = gs.models.MLP(depth=8, width=20, generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    exact, probed = gs.gsc(model, x, probes="exact").growth(), gs.gsc(model, x, probes=8)
    assert exact.total_low == exact.total == exact.total_high
    growth, (low, high) = probed.growth(), probed.interval()
    assert (growth.total_low, growth.total_high) == pytest.approx((low[0, 0], high[0, 0]))


def test_the_interval_of_the_total_of_several_networks_by_hand():
    # Independent errors of 0.3, 0.4 and 1.2 have the length 1.3, and the mean of three has a third of it.
    frames = [
        one.to_frame().assign(
            seed=seed, log10_low=lambda f, m=m: f.log10_value - m, log10_high=lambda f, m=m: f.log10_value + 2 * m
        )
        for seed, (one, m) in enumerate(zip(profiles(), (0.3, 0.4, 1.2), strict=True))
    ]
    found = gs.growth(pd.concat(frames))
    assert found.total - found.total_low == pytest.approx(1.3 / 3, rel=1e-9)
    assert found.total_high - found.total == pytest.approx(2.6 / 3, rel=1e-9)


def test_a_matrix_grows_toward_any_of_its_targets():
    model = gs.models.MLP(depth=12, width=10, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 10)
    matrix = gs.gsc_matrix(model, x)
    assert gs.growth(matrix, target="layers.8").rate == pytest.approx(gs.gsc(model, x, target="layers.8").growth().rate)
    with pytest.raises(ValueError, match=r"no target 'layers\.99'; the targets are input, layers\.0"):
        gs.growth(matrix, target="layers.99")


def test_what_is_not_one_network_per_seed_is_refused():
    found = profiles(2)
    frames = [one.to_frame().assign(seed=0, width=width) for one, width in zip(found, (20, 30), strict=True)]
    with pytest.raises(ValueError, match=r"several networks with the same seed \(0\), which differ in 'width'"):
        gs.growth(pd.concat(frames))
    other = profiles(1, depth=14)
    with pytest.raises(ValueError, match="Seed 0 has no GSC 13 layers from the target"):
        gs.growth([*found, *other])
    with pytest.raises(ValueError, match="data is an empty list"):
        gs.growth([])
    with pytest.raises(ValueError, match="no rows of quantity 'gsc'"):
        gs.growth(gs.frames.observed("balance", 1.0))
