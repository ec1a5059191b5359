"""Statistics of pre-activations against NumPy, and a model that is left alone."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.measures import (
    DeadFraction,
    EffectiveRank,
    GradientCosine,
    GradientNorm,
    Kurtosis,
    LayerGradient,
    LinearFitError,
    PreactivationMean,
    PreactivationStd,
    SampleCosine,
    SaturatedFraction,
    SignalToNoise,
    SignDiversity,
    blocks,
)
from gradscope.measures.measuring import GRADIENT_MEASURES, PREACTIVATION_MEASURES
from gradscope.measures.preactivations import slopes
from gradscope.measures.samples import jackknifed, sample_mean
from tests.helpers import noise, seeded

BOTH = (PreactivationStd(), SignDiversity())


def test_definitions_in_numpy():
    h = noise(9, 2, 3, 4) + 0.5
    flat = h.numpy().reshape(9, -1)
    assert PreactivationStd()(h).value == pytest.approx(math.sqrt(flat.var(axis=0).mean()), rel=1e-12)
    positive, negative = (flat > 0).sum(axis=0), (flat < 0).sum(axis=0)
    expected = (np.minimum(positive, negative) / (positive + negative)).mean()
    assert SignDiversity()(h).value == pytest.approx(expected, rel=1e-12)


def test_zeros_count_as_neither_sign():
    h = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
    # Neurons: 1 of 3 in the minority; nothing but zeros: 0; one positive and one negative of two: 1/2.
    assert SignDiversity()(h).value == pytest.approx((1 / 3 + 0 + 1 / 2) / 3)


def test_expectation_for_balanced_neurons():
    values = [SignDiversity()(noise(100, 400, seed=seed)).value for seed in range(5)]
    assert np.mean(values) == pytest.approx(0.5 - math.sqrt(1 / (2 * math.pi * 100)), abs=3e-3)


WITHOUT_ERROR = {"dead_fraction", "kurtosis", "effective_rank"}
WITH_ERROR = [
    m for m in PREACTIVATION_MEASURES if m.quantity not in WITHOUT_ERROR | {"sign_diversity", "linear_fit_error"}
]


@pytest.mark.parametrize("statistic", WITH_ERROR, ids=lambda s: s.quantity)
def test_standard_error_over_batches(statistic):
    # Samples of common scale and mean, so that neurons do not average the spread over samples away.
    def batch(seed):
        h = noise(100, 30, seed=seed)
        h = h * (1 + 0.3 * noise(100, 1, seed=1000 + seed).abs()) + 0.4 * noise(100, 1, seed=2000 + seed) + 0.5
        return {"preactivations": h, "slopes": slopes(nn.ReLU(), h - 2.5), "responses": (h, h.relu())}[statistic.of]

    estimates = [statistic(batch(seed)) for seed in range(300)]
    spread = np.std([e.value for e in estimates])
    known = [e.stderr for e in estimates if e.stderr is not None]
    assert len(known) > 0.75 * len(estimates)
    # Student's t and the bias make a fifth at most.
    assert 0.85 * spread < np.mean(known) < 1.35 * spread


def without(values, row):
    """The values (B, ...), or a pair of them, without one sample."""
    if isinstance(values, tuple):
        return tuple(without(part, row) for part in values)
    return torch.cat([values[:row], values[row + 1 :]])


LEFT_OUT = (PreactivationMean(), PreactivationStd(), SignDiversity(), SampleCosine(), LinearFitError(),
            GradientNorm(), GradientCosine(), SignalToNoise())  # fmt: skip


@pytest.mark.parametrize("statistic", LEFT_OUT, ids=lambda s: s.quantity)
def test_the_standard_error_is_that_of_a_jackknife_by_brute_force(statistic):
    num = 161
    h = noise(num, 6) + 0.3 * noise(num, 1, seed=1) + 1.5
    h[2, 3] = 0.0
    values = (h, h.tanh()) if statistic.of == "responses" else h

    def found(values):
        return statistic(LayerGradient.of(values, torch.ones(6)) if statistic.of == "gradients" else values)

    signed = statistic.signed
    t = np.array([found(without(values, row)).value for row in range(num)])
    whole = found(values).value
    t, whole = (t, whole) if signed else (np.log(t), np.log(whole))
    d = t - t.mean()
    variance, bias = (num - 1) / num * np.square(d).sum(), (num - 1) * (t.mean() - whole)
    if statistic.quantity == "sign_diversity":  # from halves of the batch
        halves = np.mean([SignDiversity()(h[first::2]).value for first in (0, 1)])
        bias = (np.log(halves) - whole) / (np.sqrt(2) - 1)
    f = 2 / ((d**4).sum() / np.square(d).sum() ** 2 - 1 / num)
    wider = scipy.stats.t.ppf(0.975, np.clip(f / 2 - 1, 2, num - 1)) / scipy.stats.norm.ppf(0.975)
    error = found(values).stderr if signed else found(values).log10_stderr * math.log(10)
    expected = math.sqrt(variance + bias**2) * wider
    if statistic.quantity in ("gradient_norm", "signal_to_noise"):  # lengths of means: the bias is added in full
        expected = math.sqrt(variance) * wider + abs(bias) / scipy.stats.norm.ppf(0.975)
    if statistic.quantity in ("sample_cosine", "gradient_cosine"):  # the variance of the upper end
        square = float((h / h.norm(dim=1, keepdim=True)).mean(dim=0).square().sum())
        c, v = scipy.stats.norm.ppf(0.975) * whole / square**2 / 2, math.sqrt(variance) * wider
        expected = c * v**2 + math.hypot(c * v**2, v)
    assert error == pytest.approx(expected, rel=1e-7)


def test_the_error_of_groups_is_that_of_a_jackknife_over_groups():
    directions, place = noise(80, 6) + 0.5, torch.arange(80) % 8
    whole = LayerGradient.of(directions, torch.ones(6))
    sums = torch.stack([whole.unit_sums[place == group].sum(dim=0) for group in range(8)])
    found = GradientCosine()(dataclasses.replace(whole, unit_sums=sums))
    t = [GradientCosine()(LayerGradient.of(directions[place != g], torch.ones(6))).value for g in range(8)]
    wider = scipy.stats.t.ppf(0.975, 7) / scipy.stats.norm.ppf(0.975)  # eight groups, not 80 samples
    v = 7 * np.var(t) * wider**2
    square = float((directions / directions.norm(dim=1, keepdim=True)).mean(dim=0).square().sum())
    c = scipy.stats.norm.ppf(0.975) * found.value / square**2 / 2
    assert found.stderr == pytest.approx(c * v + math.hypot(c * v, math.sqrt(v)), rel=1e-7)


@pytest.mark.parametrize("name", sorted(WITHOUT_ERROR))
def test_an_error_that_the_batch_does_not_show_is_unknown(name):
    (statistic,) = [m for m in PREACTIVATION_MEASURES if m.quantity == name]
    assert statistic(noise(100, 5)).stderr is None


def test_balanced_neurons_have_a_sign_diversity_without_error_and_others_one_with():
    # Balanced: the minimum of two equal counts is biased like 1 / sqrt(B), more than it scatters.
    assert [SignDiversity()(noise(n, 400)).stderr for n in (100, 101)] == [None, None]
    assert SignDiversity()(noise(100, 400) + 1 + 0.3 * noise(100, 1, seed=1)).stderr > 0


def test_few_samples_and_samples_that_agree_show_no_error():
    few = PreactivationMean()(noise(29, 5)).stderr, PreactivationMean()(noise(30, 5)).stderr
    assert few[0] is None and few[1] > 0
    assert SaturatedFraction()(torch.ones(100, 4)).stderr is None  # no saturated entry in 100 samples is not "never"


def test_the_limits_of_what_a_batch_shows():
    def known(bias, spread, length):
        """Whether there is an error where the jackknife finds this bias, in spreads, and this spread of logarithms."""
        logs = torch.tensor([1.0, -1.0] * 15, dtype=torch.float64) * spread / math.sqrt(29)
        return jackknifed(math.exp(-bias * spread / 29), logs.exp(), length=length).stderr is not None

    assert [known(bias, 0.1, False) for bias in (0.45, 0.55)] == [True, False]
    assert [known(bias, 0.1, True) for bias in (0.22, 0.28)] == [True, False]
    assert [known(0.0, spread, True) for spread in (0.19, 0.21)] == [True, False]


@pytest.mark.parametrize("draw", [np.random.Generator.exponential, np.random.Generator.standard_normal])
def test_the_interval_of_a_mean_covers(draw):
    rng = np.random.default_rng(0)
    x = draw(rng, size=(2000, 60)) + 1
    truth = 2 if draw is np.random.Generator.exponential else 1
    found = [sample_mean(torch.from_numpy(row), signed=True) for row in x]
    covered = np.mean([abs(e.value - truth) < 1.96 * e.stderr for e in found])
    assert 0.935 < covered < 0.975  # the standard error of a coverage of 95 % is 0.5 %


@pytest.mark.parametrize(("spread", "num"), [(1.6, 300), (1.2, 100), (0.7, 30)])
def test_the_interval_of_a_mean_cosine_covers(spread, num):
    # Directions in the plane at normal angles: the mean cosine of two of them is exp(-spread^2).
    angles = spread * torch.randn(1000, num, dtype=torch.float64, generator=seeded(3))
    found = [SampleCosine()(torch.stack([a.cos(), a.sin()], dim=1)) for a in angles]
    covered = np.mean([abs(e.value - math.exp(-(spread**2))) < 1.96 * e.stderr for e in found])
    assert 0.94 < covered < 0.99  # the standard error of a coverage of 95 % is 0.7 %


@pytest.mark.parametrize("statistic", [SampleCosine(), GradientCosine()], ids=lambda s: s.quantity)
def test_a_mean_cosine_has_no_bias_that_could_hide_its_error(statistic):
    # Groups of 12 and 13 gradients: the jackknife would see a bias where there is none.
    for seed in range(30):
        directions = torch.randn(100, 40, dtype=torch.float64, generator=seeded(seed))
        whole = LayerGradient.of(directions, torch.ones(40))
        sums = torch.stack([whole.unit_sums[group::8].sum(dim=0) for group in range(8)])
        grouped = dataclasses.replace(whole, unit_sums=sums)
        assert statistic(grouped if statistic.of == "gradients" else directions).stderr > 0


def test_further_definitions_in_numpy():
    h = noise(9, 2, 3) * noise(1, 2, 3, seed=1) + 0.5
    flat = h.numpy().reshape(9, -1)
    assert PreactivationMean()(h).value == pytest.approx(flat.mean(), rel=1e-12)
    deviations = flat - flat.mean(axis=0)
    assert Kurtosis()(h).value == pytest.approx((deviations**4).mean() / (deviations**2).mean() ** 2, rel=1e-12)
    p = np.linalg.svd(flat, compute_uv=False)
    p = p / p.sum()
    assert EffectiveRank()(h).value == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
    units = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    pairs = [units[a] @ units[b] for a in range(9) for b in range(9) if a != b]
    assert SampleCosine()(h).value == pytest.approx(np.mean(pairs), rel=1e-12)
    slope = slopes(nn.Tanh(), h)
    np.testing.assert_allclose(slope.numpy(), 1 - np.tanh(h.numpy()) ** 2, rtol=1e-12)
    assert SaturatedFraction(0.7)(slope).value == pytest.approx((1 - np.tanh(flat) ** 2 < 0.7).mean())
    assert SaturatedFraction(0.7)(slope).value not in (0, 1)
    rectified = np.array([[-1.0, 1.0, -2.0], [-3.0, 2.0, 0.5]])
    assert DeadFraction()(slopes(nn.ReLU(inplace=True), torch.from_numpy(rectified))).value == pytest.approx(1 / 3)


@pytest.mark.parametrize("statistic", PREACTIVATION_MEASURES, ids=lambda s: s.quantity)
def test_blocks_of_neurons_add_up(statistic, monkeypatch):
    h = noise(40, 3, 5, 7).float() + 0.3
    values = {"preactivations": h, "slopes": slopes(nn.Tanh(), h), "responses": (h, h.tanh())}[statistic.of]
    whole = statistic(values)
    monkeypatch.setattr(blocks, "BLOCK", 40 * 16)  # seven blocks, the last one smaller
    parts = statistic(values)
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert parts.stderr == (whole.stderr and pytest.approx(whole.stderr, rel=1e-9))


def test_layers_and_statistics_that_share_memory_do_not_disturb_each_other(monkeypatch):
    """Also in several blocks, and for layers of different sizes; slopes in float32 are rounded differently in parts."""
    monkeypatch.setattr(blocks, "BLOCK", 40 * 16)
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(9, 50), nn.ReLU(), nn.Linear(50, 90), nn.Tanh(), nn.Linear(90, 30), nn.SELU()),
        {},
    )
    for module in (model[1], model[3], model[5]):
        module.register_forward_pre_hook(lambda own, args: x.__setitem__(own, args[0].detach()))
    found = gs.measure(model, noise(40, 9).float(), measures=PREACTIVATION_MEASURES)
    found = found.set_index(["layer", "quantity"])["value"]
    model(noise(40, 9).float())
    for number, (module, h) in zip((1, 3, 5), x.items(), strict=True):
        for statistic in PREACTIVATION_MEASURES:
            values = {"preactivations": h, "slopes": slopes(module, h), "responses": (h, module(h))}[statistic.of]
            assert found[str(number), statistic.quantity] == pytest.approx(statistic(values).value, rel=1e-6)


@pytest.mark.parametrize("digits", [1, 3, 9, 14])
@pytest.mark.parametrize("shape", [(12, 70), (70, 12)])
def test_effective_rank_of_any_spectrum(shape, digits):
    left, right = (torch.linalg.qr(noise(size, 12, seed=size)).Q for size in shape)
    values = torch.logspace(0, -digits, 12, dtype=torch.float64)
    p = (values / values.sum()).numpy()
    found = EffectiveRank()(left * values @ right.T).value
    assert found == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-10)


def test_collapsed_and_empty_layers():
    same = noise(1, 6).expand(5, 6) * torch.arange(1.0, 6.0)[:, None]
    assert EffectiveRank()(same).value == pytest.approx(1, rel=1e-12)
    assert SampleCosine()(same).value == pytest.approx(1)
    nothing = torch.zeros(5, 6)
    assert [s(nothing).value for s in (EffectiveRank(), SampleCosine(), Kurtosis())] == [0, 0, 0]
    huge = 1e200 * noise(5, 6)
    assert SampleCosine()(huge).value == pytest.approx(SampleCosine()(noise(5, 6)).value, rel=1e-12)
    assert Kurtosis()(huge).value == pytest.approx(Kurtosis()(noise(5, 6)).value, rel=1e-12)


def losses(output, labels):
    return functional.cross_entropy(output, labels, reduction="none")


def gradients(model, x, y):
    """Gradient of each sample's loss, (B, P) a layer, one sample at a time."""
    rows = []
    for one in range(len(x)):
        loss = losses(model(x), y)[one]
        rows.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    found = {}
    for name, module in model.named_modules():
        own = [n for n, p in enumerate(model.parameters()) if any(p is q for q in module._parameters.values())]
        if own:
            parts = [
                [torch.zeros_like(p) if g is None else g for g, p in zip(row, model.parameters(), strict=True)]
                for row in rows
            ]
            found[name] = np.array([np.concatenate([row[n].numpy().ravel() for n in own]) for row in parts])
    return found


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(7)])
def test_gradient_statistics_in_numpy(norm):
    torch.manual_seed(0)  # no bias before batch normalization: its gradient is 0 but for rounding
    model = nn.Sequential(nn.Linear(5, 7, bias=False), norm, nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = noise(11, 5), torch.arange(11) % 3
    frame = gs.measure(model, (x, y), loss_fn=losses, learning_rate=0.1)
    values = frame.pivot_table(index="layer", columns="quantity", values="value", aggfunc="first", dropna=False)
    for name, g in gradients(model, x, y).items():
        mean, weight = (
            g.mean(axis=0),
            np.concatenate([p.detach().ravel() for p in model.get_submodule(name).parameters()]),
        )
        row, norm_ = values.loc[name], np.linalg.norm(mean)
        units = g / np.linalg.norm(g, axis=1, keepdims=True)
        expected = {
            "gradient_norm": norm_,
            "gradient_rms": norm_ / math.sqrt(len(mean)),
            "gradient_zero_fraction": (mean == 0).mean(),
            "gradient_to_weight": norm_ / np.linalg.norm(weight),
            "update_to_weight": 0.1 * norm_ / np.linalg.norm(weight),
            "gradient_cosine": np.mean([units[a] @ units[b] for a in range(11) for b in range(11) if a != b]),
            "signal_to_noise": norm_**2 / (np.square(g - mean).sum() / 10),
        }
        for quantity, value in expected.items():
            assert row[quantity] == pytest.approx(value, rel=1e-10, abs=1e-12), (name, quantity)
    assert set(values.columns) == {m.quantity for m in (*PREACTIVATION_MEASURES, *GRADIENT_MEASURES)} | {
        "update_to_weight"
    }


def test_samples_without_a_gradient_have_no_cosine():
    g = noise(20, 6) + 0.5
    g[::4] = 0
    units = (g / g.norm(dim=1, keepdim=True))[torch.arange(20) % 4 > 0].numpy()
    expected = np.mean([units[a] @ units[b] for a, b in itertools.permutations(range(15), 2)])
    assert GradientCosine()(LayerGradient.of(g, torch.ones(6))).value == pytest.approx(expected, rel=1e-12)


def test_one_sample_at_a_time_changes_no_number(monkeypatch):
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3).double(), (noise(41, 5) + 0.5, torch.arange(41) % 3)
    whole, parts = [], []
    for found in (whole, parts):
        found.append(gs.measure(model, batch, loss_fn=losses, measures=GRADIENT_MEASURES)[["value", "stderr_sample"]])
        monkeypatch.setattr("gradscope.measures.layer_gradients.peak_bytes", lambda device: 1)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-9)
    assert np.isfinite(whole[0]).to_numpy().all(axis=1).any()


@functools.cache
def repeated_gradients():
    """All statistics of the gradients of 150 batches."""
    model, frames = nn.Linear(4, 3).double(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(noise(*parameter.shape, seed=1) / 2)
    for seed in range(150):
        x = noise(400, 4, seed=seed) + 0.5
        batch = x, (x[:, 0] > 0.5).long()
        frames.append(gs.measure(model, batch, loss_fn=losses, measures=GRADIENT_MEASURES).set_index("quantity"))
    return frames


@pytest.mark.parametrize(
    "statistic", [m for m in GRADIENT_MEASURES if m.quantity != "gradient_zero_fraction"], ids=lambda s: s.quantity
)
def test_standard_error_of_gradient_statistics(statistic):
    rows = [frame.loc[statistic.quantity] for frame in repeated_gradients()]
    values, errors = np.transpose([(row["value"], row["stderr_sample"]) for row in rows])
    known = ~np.isnan(errors)
    assert known.mean() > 0.75
    # Student's t and the bias make a third at most.
    assert 0.85 * values.std() < errors[known].mean() < 1.5 * values.std()


def test_dead_units_have_zero_gradients():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    nn.init.constant_(model[0].bias[1:3], -100.0)  # two of four units never fire: 2 (5 + 1) of 24 entries
    frame = gs.measure(model, (noise(9, 5), torch.arange(9) % 3), loss_fn=losses, measures=GRADIENT_MEASURES)
    values = frame.set_index(["layer", "quantity"])["value"]
    assert values["0", "gradient_zero_fraction"] >= 0.5
    assert values["2", "gradient_zero_fraction"] == pytest.approx(6 / 15)


def test_the_model_keeps_its_gradients_and_unused_layers_have_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = (
                nn.Linear(3, 2),
                nn.Linear(3, 2),
                nn.Linear(2, 2).requires_grad_(False),
            )

        def forward(self, x):
            return self.frozen(self.used(x))

    model = Model().double()
    model.used.weight.grad = torch.ones(2, 3).double()
    frame = gs.measure(model, (noise(6, 3), torch.arange(6) % 2), loss_fn=losses, measures=GRADIENT_MEASURES)
    assert torch.equal(model.used.weight.grad, torch.ones(2, 3).double()) and model.unused.weight.grad is None
    values = frame.set_index(["layer", "quantity"])["value"]
    assert set(frame["layer"]) == {"used", "unused"}
    assert values["unused", "gradient_norm"] == 0 and values["unused", "gradient_zero_fraction"] == 1
    assert values["used", "gradient_norm"] > 0


def test_refusals():
    model, x, y = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), noise(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"'gradient_norm' .* loss_fn="):
        gs.measure(model, x, measures=GRADIENT_MEASURES)
    with pytest.raises(ValueError, match="loss_fn= would be ignored"):
        gs.measure(model, (x, y), loss_fn=losses, measures=BOTH)
    with pytest.raises(ValueError, match="the labels would be ignored: give loss_fn="):
        gs.measure(model, (x, y))
    with pytest.raises(ValueError, match="measures= is an empty list"):
        gs.measure(model, x, measures=[])
    with pytest.raises(ValueError, match="learning_rate must be"):
        gs.measure(model, (x, y), loss_fn=losses, learning_rate=-1)
    with pytest.raises(ValueError, match="at least two"):
        gs.measure(model, (x[:1], y[:1]), loss_fn=losses, measures=GRADIENT_MEASURES)
    with pytest.raises(ValueError, match=r"loss_fn .* shape \(4,\)"):
        gs.measure(model, (x, y), loss_fn=functional.cross_entropy, measures=GRADIENT_MEASURES)
    with pytest.raises(ValueError, match="requires a gradient"):
        gs.measure(model.requires_grad_(False), (x, y), loss_fn=losses, measures=GRADIENT_MEASURES)


def test_rows_of_a_frame_in_execution_order():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()
    ).double()
    x = noise(50, 5)
    frame = gs.measure(model, x, measures=BOTH)
    assert list(frame["layer"]) == ["1", "4", "1", "4"]
    assert list(frame["index"]) == [1, 2, 1, 2]
    assert list(frame["depth_from_output"]) == [1, 0, 1, 0]
    std = frame[frame["quantity"] == "preactivation_std"].set_index("layer")["value"]
    assert std["4"] == pytest.approx(1, abs=1e-3)  # 1 up to the eps of batch normalization
    assert std["1"] == pytest.approx(float(model[0](x).detach().var(dim=0, correction=0).mean().sqrt()), rel=1e-12)
    gs.frames.check(frame)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(inplace=True)).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    x = noise(8, 5)
    gs.measure(model, x)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(x, noise(8, 5))


def test_a_nonlinearity_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(3, 3), nn.Tanh()

        def forward(self, x):
            return self.act(input=self.linear(x))

    assert list(gs.measure(Keyword().double(), noise(5, 3), measures=BOTH)["layer"]) == ["act", "act"]


def test_errors():
    with pytest.raises(ValueError, match=r"No nonlinearity .* Linear"):
        gs.measure(nn.Linear(3, 3), torch.randn(4, 3, generator=seeded()))
    with pytest.raises(ValueError, match=r"two samples.*\(1, 3\)"):
        gs.measure(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(1, 3, generator=seeded()))


def test_linear_fit_error_of_gaussian_preactivations():
    """1 - Cov(h, phi)^2 / Var(phi) for h ~ N(0, 1): Cov = E phi' by Stein's lemma."""
    h = noise(40_000, 5, seed=3)
    relu = LinearFitError()((h, h.relu()))
    expected = 1 - 0.25 / (0.5 - 1 / (2 * math.pi))
    assert relu.value == pytest.approx(expected, abs=4 * relu.stderr)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    slope, variance = weights @ (1 - np.tanh(nodes) ** 2), weights @ np.tanh(nodes) ** 2
    tanh = LinearFitError()((h, h.tanh()))
    assert tanh.value == pytest.approx(1 - slope**2 / variance, abs=4 * tanh.stderr)
    assert tanh.stderr < 0.001


def test_linear_fit_error_is_that_of_least_squares():
    h = noise(30, 4, seed=1).double() * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    a = torch.nn.functional.selu(h - 3)
    left = sum(np.polyfit(x, y, 1, full=True)[1][0] for x, y in zip(h.T.numpy(), a.T.numpy(), strict=True))
    total = float((a - a.mean(dim=0)).square().sum())
    assert LinearFitError()((h, a)).value == pytest.approx(left / total, rel=1e-9)
    assert LinearFitError()((h, 2 * h - 7)).value == pytest.approx(0, abs=1e-12)
    assert LinearFitError()((h, torch.ones_like(h))).value == 0


def test_linear_fit_errors_of_a_model_that_works_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh()).double()
    x = noise(50, 4)
    frame = gs.measure(model, x, measures=[LinearFitError()])
    h = model[0](x)
    assert frame["value"].iloc[0] == pytest.approx(LinearFitError()((h, h.relu())).value, rel=1e-9)
    assert frame["layer"].tolist() == ["1", "3"]


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 10.0])
def test_the_interval_of_a_gradient_norm_contains_the_norm_or_is_missing(signal):
    # 20 independent normal entries around a mean of length ``signal``.  The noise of the mean of 100 has length 0.45.
    repetitions, missed, known = 300, 0, 0
    generator = seeded(5)
    for _ in range(repetitions):
        g = torch.randn(100, 20, dtype=torch.float64, generator=generator)
        g[:, 0] += signal
        found = GradientNorm()(LayerGradient.of(g, torch.ones(20)))
        if found.stderr is not None:
            known += 1
            missed += abs(math.log(found.value / signal)) > 1.96 * found.stderr / found.value
    assert missed <= 0.05 * repetitions
    assert known == (repetitions if signal == 10 else 0)


class Parallel(nn.Module):
    """A wide layer whose outputs for different samples are nearly parallel; draws numbers, and works in place."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x * 1e-5 + torch.randn(90).double() + 0.1)


def test_effective_ranks_of_nearly_singular_matrices_are_measured_in_a_second_pass():
    class Counting(nn.Module):
        passes = 0

        def __init__(self):
            super().__init__()
            self.inner, self.easy = Parallel(), nn.Tanh()

        def forward(self, x):
            Counting.passes += 1
            return self.easy(x) + self.inner(x)

    model, x = Counting(), noise(12, 90)
    torch.manual_seed(3)
    nearly = x * 1e-5 + torch.randn(90).double() + 0.1
    torch.manual_seed(3)
    frame = gs.measure(model, x, measures=[EffectiveRank(), PreactivationStd()])
    assert Counting.passes == 2
    expected = {"easy": x, "inner.act": nearly}
    for layer, h in expected.items():
        p = np.linalg.svd(h.numpy(), compute_uv=False)
        p /= p.sum()
        found = frame[(frame["layer"] == layer) & (frame["quantity"] == "effective_rank")]["value"].item()
        assert found == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
        assert EffectiveRank()(h).value == found
    Counting.passes = 0
    gs.measure(model, x, measures=[PreactivationStd()])
    assert Counting.passes == 1


class OwnRank(EffectiveRank):
    """A statistic of a user, who writes only how to call it."""

    def __call__(self, preactivations):
        return gs.Estimate.exact(float(preactivations.shape[1]))


class Largest:
    quantity, of = "largest", "gradients"

    def __call__(self, gradient):
        assert gradient.norm.value > 0  # copies what waits on the device
        return gs.Estimate.exact(float(gradient.mean.abs().max()), 3)


def test_measures_of_a_user_may_read_by_themselves():
    model, x, y = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double(), noise(9, 5), torch.arange(9) % 3
    measures = [OwnRank(), PreactivationStd(), Largest(), GradientNorm()]
    frame = gs.measure(model, (x, y), loss_fn=losses, measures=measures).set_index("quantity")["value"]
    functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert frame["effective_rank"] == 3
    assert frame["largest"] == pytest.approx(8 * gradient.abs().max().item(), rel=1e-12)
    assert frame["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert frame["preactivation_std"] == PreactivationStd()(model[0](x)).value


def test_the_first_cause_of_nan_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = noise(6, 3), torch.arange(6) % 2
    spoiled = x.clone()
    spoiled[4, 1] = math.nan
    for data, options in ((spoiled, {}), ((spoiled, y), {"loss_fn": losses})):
        with pytest.raises(ValueError, match=r"x holds 1 NaN .* the first at \(4, 1\)"):
            gs.measure(model, data, **options)

    def strict(output, labels):
        raise RuntimeError("labels differ" if torch.isfinite(output).all() else "a consequence")

    with pytest.raises(RuntimeError, match="labels differ"):
        gs.measure(model, (x, y), loss_fn=strict, measures=[GradientNorm()])
    with torch.no_grad():
        model[0].weight[1, 1] = math.inf
    with pytest.raises(ValueError, match="'preactivation_std' of layer '1' is NaN"):
        gs.measure(model, x, measures=BOTH)
    model[0].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="Nonlinearity '1' receives NaN"):  # its sign would count
        gs.measure(model, x, measures=[SignDiversity()])
    for loss_fn in (losses, strict):
        with pytest.raises(FloatingPointError, match="Layer '0' is the first with NaN or Inf"):
            gs.measure(model, (x, y), loss_fn=loss_fn, measures=[GradientNorm()])
    with pytest.raises(ValueError, match="at least one neuron, got shape"):
        PreactivationStd()(noise(4, 0, 3))
