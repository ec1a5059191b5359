"""The error of the nonlinearity coefficient: what it covers, and when it is unknown."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import seeded


def repeated(model, num, probes, repetitions, scale=1.0, width=4):
    """NLC of fresh samples, whose lengths are lognormal with the standard deviation ``scale`` of the logarithm."""
    generator = seeded(7)

    def draw():
        x = torch.randn(num, width, dtype=torch.float64, generator=generator)
        return x * (scale * torch.randn(num, 1, dtype=torch.float64, generator=generator)).exp()

    return [gs.nlc(model, draw(), probes=probes, generator=generator) for _ in range(repetitions)]


class OneDirection(nn.Module):
    """An affine map to eight equal outputs: NLC is 1, and each probe has the variance of a Jacobian of rank one."""

    def forward(self, x):
        return x.sum(dim=1, keepdim=True).expand(-1, 8) * 1.0


@pytest.mark.parametrize("probes", [1, 4])
def test_the_error_of_an_affine_map_is_that_of_its_probes(probes):
    found = repeated(OneDirection(), 100, probes, 150, scale=0.0)
    # NLC^2 is the mean of 100 squares (v.1)^2 / 8, each over the probes: its variance is 2 (1 - 1/8) / (100 probes).
    expected = math.sqrt(2 * (1 - 1 / 8) / (100 * probes)) / 2 / math.log(10)
    assert np.std([e.log10_value for e in found]) == pytest.approx(expected, rel=0.15)
    # A single probe has only a bound of its variance.
    assert np.mean([e.log10_stderr for e in found]) == pytest.approx(expected, rel=0.15 if probes > 1 else 0.35)
    assert {e.num_probes for e in found} == {probes}


def test_an_affine_map_with_all_cotangents_has_no_error():
    (found,) = repeated(nn.Linear(4, 3, dtype=torch.float64), 50, "exact", 1)
    assert found.value == pytest.approx(1, rel=1e-12)
    assert found.log10_stderr == pytest.approx(0, abs=0.06)


class Exponential(nn.Module):
    """exp(x / 2) of one normal input: J^2 is lognormal, and NLC^2 = t e^t / (e^t - 1) with t = 1/4."""

    def forward(self, x):
        return (x / 2).exp()


@pytest.mark.parametrize("num", [40, 120])
def test_the_interval_covers_in_closed_form(num):
    truth = math.log10(math.exp(0.25) / (4 * math.expm1(0.25))) / 2
    found = repeated(Exponential(), num, "exact", 60, scale=0.0, width=1)
    low, high = np.transpose([e.interval() for e in found])
    assert np.mean((low <= truth) & (truth <= high)) > 0.88  # the standard error of a coverage of 95 % is 2.8 %
    assert np.mean(high - low) < 2.2 * 3.92 * np.std([e.log10_value for e in found])


def test_the_error_and_its_freedom_by_hand():
    # f = |x| of one input: all squared slopes are 1, so the error is that of the ratio of two variances.
    class Absolute(nn.Module):
        def forward(self, x):
            return x.abs()

    x = torch.randn(40, 1, dtype=torch.float64, generator=seeded(5))
    found, (x, f) = gs.nlc(Absolute(), x, probes="exact"), (x.numpy()[:, 0], x.abs().numpy()[:, 0])
    p, q = np.square(x - x.mean()), np.square(f - f.mean())
    assert found.value == pytest.approx(math.sqrt(p.mean() / q.mean()), rel=1e-9)
    d = p / p.mean() - q / q.mean()
    assert found.log10_stderr == pytest.approx(d.std(ddof=1) / math.sqrt(40) / 2 / math.log(10), rel=1e-9)
    freedom = 1 / (np.sum(d**4) / np.sum(d**2) ** 2 - 1 / 40) - 1
    assert 2 < freedom < 38 and found.freedom == pytest.approx(freedom, rel=1e-9)


def test_batches_of_a_stream_count_as_their_samples():
    x = torch.randn(60, 4, dtype=torch.float64, generator=seeded(1))
    model = nn.Sequential(nn.Linear(4, 5, dtype=torch.float64), nn.Tanh())
    whole, parts = (gs.nlc(model, data, probes="exact") for data in (x, [x[:10], x[10:45], x[45:]]))
    assert parts.log10_value == pytest.approx(whole.log10_value, rel=1e-9)
    assert parts.log10_stderr == pytest.approx(whole.log10_stderr, rel=1e-9)
    assert parts.freedom == pytest.approx(whole.freedom, rel=1e-6)


@pytest.mark.parametrize("probes", ["exact", 4])
def test_the_error_of_coupled_samples_is_unknown(probes):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    x = torch.randn(40, 4, dtype=torch.float64, generator=seeded(2))
    assert gs.nlc(model.train(), x, probes=probes).stderr is None
    assert gs.nlc(model.eval(), x, probes=probes).stderr > 0


def test_the_error_is_unknown_for_few_samples_and_for_an_nlc_of_zero():
    x = torch.randn(30, 4, dtype=torch.float64, generator=seeded(3))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    assert gs.nlc(model, x[:29]).stderr is None
    assert gs.nlc(model, x).stderr > 0

    class Steps(nn.Module):
        def forward(self, x):
            return x + (x.sign() - x).detach() - x + 0 * x  # the slope of a step function is 0

    flat = gs.nlc(Steps(), x)
    assert (flat.value, flat.stderr) == (0, None)


class Scaled(nn.Module):
    """A network whose output is multiplied by a number, which changes no NLC."""

    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.scale = scale

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.mark.parametrize("scale", [1e-150, -1e-150, 1e150])
def test_the_scale_of_the_output_changes_nothing(scale):
    x = torch.randn(50, 4, dtype=torch.float64, generator=seeded(1))
    one, other = Scaled(1.0), Scaled(scale)
    other.inner = one.inner
    found, expected = (gs.nlc(m, x, probes="exact") for m in (other, one))
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.log10_stderr == pytest.approx(expected.log10_stderr, rel=1e-9)
