"""Stacks of convolutions and their mean field."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from scipy import integrate, stats
from torch import nn

import gradscope as gs
from experiments.archive import reference
from experiments.studies import convolution_gsc
from experiments.studies.convolution_gsc import numbers, stacks
from tests.helpers import ROOT, noise, seeded


@pytest.fixture(scope="module")
def published():
    return reference.load(ROOT / "results" / "convolution_gsc")


def stack(kind, seed=0, channels=4, stages=2, convs=2):
    return stacks.Stack(kind=kind, channels=channels, stages=stages, convs=convs, generator=seeded(seed))


@pytest.mark.parametrize(
    ("kind", "side"),
    [("circular", 16), ("reflect", 16), ("zeros", 16), ("valid", 8), ("strided", 4), ("max", 4), ("average", 4)],
)
def test_stacks_of_all_kinds_have_the_same_weights(kind, side):
    model, plain = stack(kind), stack("circular")
    assert model(torch.randn(2, 4, 16, 16, generator=seeded(1))).shape == (2, 4, side, side)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    names = [name for name, _ in model.named_children()]
    pooled = [f"pool{stage}" for stage in (1, 2)] if kind in ("max", "average") else []
    assert sorted(names) == sorted([f"conv{k}" for k in (1, 2, 3, 4)] + pooled)
    assert len(stacks.expected_log10_gsc(kind, stages=2, convs=2, side=16)) == len(names) + 1


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of circular, valid, .* got 'same'"):
        stack("same")


def test_correlation_after_relu_by_integration():
    assert stacks.relu_correlation(0) == pytest.approx(1 / math.pi) and stacks.relu_correlation(1) == pytest.approx(1)
    c = 0.4
    density = stats.multivariate_normal([0, 0], [[1, c], [c, 1]]).pdf
    product, _ = integrate.dblquad(lambda v, u: u * v * density((u, v)), 0, 8, 0, 8)
    assert stacks.relu_correlation(c) == pytest.approx(product / 0.5, rel=1e-6)


def test_average_pooling_of_given_taps_is_exact():
    """GSC of a pooling is 1 / (1 + 3 rho), rho the mean inner product of two taps over their mean square."""
    x = noise(2, 3, 6, 6).abs()
    taps = torch.stack([x[:, :, u::2, v::2] for u in (0, 1) for v in (0, 1)]).flatten(1)
    gram = taps @ taps.T
    rho = float((gram.sum() - gram.trace()) / 3 / gram.trace())
    same = nn.Conv2d(3, 3, 1, bias=False).double()
    nn.init.dirac_(same.weight)  # GSC is that of networks with parameters
    found = gs.gsc(nn.Sequential(same, nn.AvgPool2d(2)), x, probes="exact").to_frame()["value"].iloc[0]
    assert found == pytest.approx(1 / (1 + 3 * rho), rel=1e-10)


@pytest.mark.parametrize("c", [0.0, 0.6])
def test_pooling_against_a_simulation(c):
    random = np.random.default_rng(0)
    shared = math.sqrt(c) * random.normal(size=(400_000, 1))
    h = shared + math.sqrt(1 - c) * random.normal(size=(400_000, 8))  # two windows of four
    first, second = np.maximum(h[:, :4], 0), np.maximum(h[:, 4:], 0)
    for found, one, other, squares in (
        (stacks.max_pooling(c), first.max(axis=1), second.max(axis=1), h[:, :4].max(axis=1) > 0),
        (stacks.average_pooling(c), first.mean(axis=1), second.mean(axis=1), (h[:, :4] > 0).sum(axis=1) / 16),
    ):
        into, pooling, cosine = found
        # From h to the pooled map: squares of the Jacobian a window over the mean square of an output, for h has 1.
        assert into * pooling == pytest.approx(squares.mean() / np.square(one).mean(), rel=0.01)
        assert cosine == pytest.approx((one * other).mean() / np.square(one).mean(), rel=0.01)


def test_zero_padding_by_counting_taps():
    side, depth = 4, 3
    expected = stacks.expected_log10_gsc("zeros", stages=1, convs=depth, side=side)
    places = [(i, j) for i in range(side) for j in range(side)]
    counts = np.array([[max(abs(i - k), abs(j - m)) <= 1 for k, m in places] for i, j in places]) / 9
    for k in range(depth + 1):
        lengths = np.linalg.matrix_power(counts, k) @ np.ones(side**2)
        outputs = np.linalg.matrix_power(counts, depth) @ np.ones(side**2)
        gradients = np.linalg.matrix_power(counts.T, depth - k) @ np.ones(side**2)
        # |J|_F^2 / n, and mean squares of the layer and of the output.
        assert 10 ** expected[k] == pytest.approx(gradients.mean() * lengths.mean() / outputs.mean(), rel=1e-12)


def test_a_wide_stack_is_as_predicted():
    """Seed by seed against the torus, which takes most of the spread away; small maps make the border large."""
    kinds = ("zeros", "max", "average")
    changes = {kind: [] for kind in kinds}
    for seed in range(6):
        x = torch.randn(4, 48, 8, 8, generator=seeded(100 + seed))
        values = {}
        for kind in ("circular", *kinds):
            model = stack(kind, seed, channels=48, stages=1)
            frame = gs.gsc(model, x, probes=8, generator=seeded(seed)).to_frame().set_index("layer")
            values[kind] = frame["log10_value"]["conv1" if kind == "zeros" else "input"]
            values["plain"] = frame["log10_value"]["conv1"] if kind == "circular" else values["plain"]
        for kind in kinds:
            changes[kind].append(values[kind] - values["plain" if kind == "zeros" else "circular"])
    for kind in kinds:
        expected = stacks.expected_log10_gsc(kind, stages=1, convs=2, side=8)[1 if kind == "zeros" else 0]
        spread = np.std(changes[kind], ddof=1) / math.sqrt(6)
        assert abs(np.mean(changes[kind]) - expected) < max(4 * spread, 3 * math.log10(1.03)), kind
        assert expected < -0.01


def test_factors_and_claims_follow_the_frame(published):
    frame = published.frame.copy()
    same = frame[frame["kind"] == "circular"].set_index(["seed", "layer", "quantity"])["log10_value"]
    rows = (frame["kind"] == "strided") & (frame["quantity"] == "gsc")
    keys = frame.loc[rows, ["seed", "layer", "quantity"]].apply(tuple, axis=1)
    frame.loc[rows, "log10_value"] = keys.map(same) + math.log10(2)
    found = numbers.factor(frame, "strided")
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    verdicts = {claim.says: claim.holds for claim in convolution_gsc.claims(replace(published, frame=frame))}
    assert verdicts["With stride 2, GSC differs from GSC of the reference by a factor of less than 1.1"] is False
    assert verdicts["With no padding, GSC differs from GSC of the reference by a factor of less than 1.1"] is True


def shifted(published, **factors):
    """The frame with totals that are known multiples of those of the torus."""
    frame = published.frame.copy()
    gsc = frame["quantity"] == "gsc"
    torus = frame[gsc & (frame["kind"] == "circular") & (frame["layer"] == "input")].set_index("seed")["log10_value"]
    for kind, factor in factors.items():
        rows = gsc & (frame["kind"] == kind) & (frame["layer"] == "input")
        frame.loc[rows, "log10_value"] = frame.loc[rows, "seed"].map(torus) + math.log10(factor)
    return replace(published, frame=frame)


def test_the_answer_follows_the_claims(published):
    assert "with stride 2, no padding, mirrored padding or zero padding." in convolution_gsc.answer(published)
    collected = shifted(published, strided=2.0, valid=1.05, reflect=1.0, zeros=1.0, max=3.0, average=0.5)
    kept, lost, lowered = convolution_gsc.answer(collected).split(". ")
    assert "5.0 % with no padding, mirrored padding or zero padding" in kept and "with stride 2" in lost
    assert "average pooling by a factor of 2.0." in lowered and "max pooling by" not in lowered
    verdicts = {claim.says: claim.holds for claim in convolution_gsc.claims(collected)}
    assert verdicts["Max pooling lowers GSC"] is False and verdicts["Average pooling lowers GSC"] is True
    assert verdicts["With average pooling, GSC changes by the factor that mean field predicts"] is False


def test_the_side_is_that_of_the_configuration():
    settings = yaml.safe_load((ROOT / "conf" / "study" / "convolution_gsc.yaml").read_text())
    assert settings["data"]["shape"] == [settings["model"]["channels"], numbers.SIDE, numbers.SIDE]


def test_figures_show_the_factors(published):
    drawn = convolution_gsc.STUDY.figures(published)
    for ax, kinds in zip(drawn["total"].axes, (numbers.KEEPING, numbers.POOLING), strict=True):
        (bars,) = ax.containers
        shown = np.asarray(bars.lines[0].get_xdata(), dtype=float)
        assert shown == pytest.approx([numbers.factor(published.frame, kind).value for kind in kinds])
    zeros = next(c for c in drawn["layers"].axes[0].containers if c.get_label() == "zero padding").lines[0].get_ydata()
    expected = [math.log10(numbers.factor(published.frame, "zeros", place).value) for place in range(7)]
    assert np.asarray(zeros, dtype=float) == pytest.approx(expected)
    assert (
        drawn["layers"].axes[0].get_ylim() != drawn["layers"].axes[1].get_ylim() == drawn["layers"].axes[2].get_ylim()
    )
    for figure in drawn.values():
        plt.close(figure)
