"""Several models over seeds: the numbers of `gradscope.growth`, simultaneous intervals, tables, and equal networks."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import gradscope as gs
from gradscope.comparing.models import interval_text
from tests.helpers import noise


class Scaled(nn.Module):
    """Square matrices as `nn.Linear` draws them, each before an activation."""

    def __init__(self, activation=nn.ReLU, depth=12, width=12):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width, bias=False), activation()) for _ in range(depth)]
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.layers(x)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(9 * x)


def fixed():
    generator = torch.Generator().manual_seed(5)
    model = Scaled()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3
    return model


MODELS = {"relu": Scaled, "tanh_x": lambda: Scaled(nn.Tanh), "chaotic": lambda: Scaled(Sine, 20)}
DATA = noise(6, 12)


@pytest.fixture(scope="module")
def found():
    lines = []
    result = gs.compare_models(MODELS, DATA, seeds=4, probes="exact", progress=lines.append)
    return result, lines


def by_hand(factory, seeds=4):
    profiles = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        profiles.append(gs.gsc(factory(), DATA, probes="exact"))
    return profiles


def test_the_numbers_are_those_of_growth(found):
    result, lines = found
    gs.frames.check(result.frame)
    assert set(result.frame["seed"]) == {0, 1, 2, 3} and [line.split(":")[0] for line in lines] == list(MODELS)
    for name, factory in MODELS.items():
        profiles, row = by_hand(factory), result.table.set_index("model").loc[name]
        growth = gs.growth(profiles)
        assert (row["rate"], row["rate_low"], row["verdict"]) == (growth.rate, growth.rate_low, growth.verdict)
        said = f"{name}: undecided. At the present estimate, {growth.advice}." in result.remarks
        assert said == (growth.verdict == "undecided")
        own = result.frame[result.frame["model"] == name]
        np.testing.assert_array_equal(own["log10_value"], np.concatenate([p.log10_values[:, 0] for p in profiles]))
        totals = [p.log10_values[0, 0] for p in profiles]
        ends = stats.t.interval(0.95, 3, np.mean(totals), stats.sem(totals))
        np.testing.assert_allclose(row[["total", "total_low", "total_high"]].astype(float), [np.mean(totals), *ends])


def test_differences_are_welch_intervals_with_the_correction_of_bonferroni(found):
    result, _ = found
    slopes = {name: [math.log(p.growth().rate) for p in by_hand(factory)] for name, factory in MODELS.items()}
    pairs = list(itertools.combinations(MODELS, 2))
    assert list(zip(result.differences["model"], result.differences["other"], strict=True)) == pairs
    for (a, b), row in zip(pairs, result.differences.itertuples(), strict=True):
        welch = stats.ttest_ind(slopes[a], slopes[b], equal_var=False).confidence_interval(1 - 0.05 / 3)
        assert (row.low, row.high) == pytest.approx((math.exp(welch.low), math.exp(welch.high)), rel=1e-9)
        assert row.differ == (not row.low <= 1 <= row.high)
        assert f"The rates of {a} and {b} {'differ' if row.differ else 'do not differ significantly'}" in str(result)
    assert result.differences["differ"].any()


def test_all_intervals_hold_together():
    """Equal models: in at most 5 % of the comparisons, with the error of 400, is any pair said to differ."""
    from gradscope.comparing.models import _differences

    rng = np.random.default_rng(0)
    wrong = [_differences({n: rng.normal(0, 1 + n, 5) for n in range(4)})["differ"].any() for _ in range(400)]
    assert np.mean(wrong) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_the_random_state_is_as_before_and_every_generator_is_seeded():
    class Own(Scaled):
        def __init__(self):
            super().__init__()
            self.draws = random.random(), float(np.random.rand())  # noqa: NPY002
            seen.append(self.draws)

    seen = []
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    gs.compare_models({"a": Own, "b": Own}, DATA, seeds=[7, 2])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert seen[:2] == seen[2:] and len(set(seen)) == 2


def test_equal_networks_are_counted_once_and_named():
    once = Scaled()
    result = gs.compare_models({"own seed": fixed, "one object": lambda: once, "random": Scaled}, DATA, seeds=3)
    assert result.table["networks"].to_list() == [1, 1, 3] and result.differences.empty
    assert sum("all 3 seeds gave the same network" in remark for remark in result.remarks) == 2
    assert "own seed: all 3 seeds gave the same network" in str(result)
    calls = itertools.cycle([fixed, Scaled, fixed])
    result = gs.compare_models({"mixed": lambda: next(calls)()}, DATA, seeds=3)
    assert result.remarks[0] == "mixed: seeds 2 gave networks equal to earlier ones, which count once."


def test_tables(found):
    result, _ = found
    markdown = result.to_markdown().splitlines()
    assert len(markdown) == 5 and all(line.count("|") == 6 for line in markdown)
    latex = result.to_latex()
    assert latex.count(r"\\") == 4 and r"tanh\_x & " in latex and latex.endswith(r"\end{tabular}")
    assert result._repr_html_().startswith("<table")
    assert repr(result) == "ModelComparison(3 models, 4 seeds)"
    one = gs.compare_models({"a|b^2\\~": Scaled}, DATA, seeds=2)
    assert r"| a\|b^2\~ |" in one.to_markdown().replace("\\\\", "\\")
    assert r"a|b\textasciicircum{}2\textbackslash{}\textasciitilde{} &" in one.to_latex()


@pytest.mark.parametrize("half", [3e-5, 0.0049, 0.5, 7.0, 123.0])
def test_digits_are_those_that_the_interval_supports(half):
    value, low, high = map(
        float, re.findall(r"[-\d.]+", interval_text(1.23456789, 1.23456789 - half, 1.23456789 + half))
    )
    assert low < high and abs((high - low) / 2 / half - 1) < 0.11 and abs(value - 1.23456789) <= 0.06 * half
    text = interval_text(1.23456789, 1.23456789 - half, 1.23456789 + half).split()[0]
    assert not text.partition(".")[2] or 10.0 ** -len(text.partition(".")[2]) >= 0.0099 * half  # and not more


def test_the_figure_has_a_curve_per_model_with_its_verdict(found):
    result, _ = found
    ax = result.plot()
    labels = [text.get_text() for text in ax.texts]
    for row in result.table.itertuples():
        assert f"{row.model}: {row.verdict}" in labels
    assert len(ax.collections) == 3  # bands


def test_models_without_a_rate():
    result = gs.compare_models({"short": lambda: Scaled(depth=3), "long": Scaled}, DATA, seeds=2)
    assert result.table["verdict"].to_list()[0] == "no rate" and math.isnan(result.table["rate"][0])
    assert "short: no rate. A growth rate needs at least 6 layers" in str(result)
    assert np.isfinite(result.table["total"]).all() and result.differences.empty


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, DATA), ValueError, "at least one model"),
        (({"a": Scaled}, iter([DATA])), ValueError, "data is an iterator, which only the first network could read"),
        (({"a": lambda: 3}, DATA), TypeError, "factory of 'a' must return a torch.nn.Module, got int"),
        (({"a": Scaled}, DATA[:, :5]), ValueError, "'a' with seed 0 cannot be measured: .*shapes"),
        (({"a": lambda: nn.Flatten()}, DATA), ValueError, "'a' with seed 0 cannot be measured: Flatten has no param"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        gs.compare_models(*arguments, seeds=2)
    for seeds in (0, [], [1, 1]):
        with pytest.raises(ValueError, match="seeds"):
            gs.compare_models({"a": Scaled}, DATA, seeds=seeds)
