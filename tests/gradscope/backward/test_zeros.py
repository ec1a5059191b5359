"""Gradients that are exactly zero: one sweep, unless a zero may be an underflow."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.backward import sweep as module
from gradscope.backward.cotangents import Cotangents
from gradscope.backward.readings import lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.estimates import Moments
from tests.helpers import noise, seeded


@pytest.fixture
def passes(monkeypatch):
    """(stride, number of cotangents) of every pass."""
    seen, own = [], module._pass

    def spy(route, cotangents, read, stride, *rest):
        seen.append((stride, sum(c.num for c in cotangents)))
        return own(route, cotangents, read, stride, *rest)

    monkeypatch.setattr(module, "_pass", spy)
    return seen


class Factor(nn.Module):
    """x times a vector, plus what keeps a forward pass of ones at ones."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return x * self.values + (1 - self.values)


def swept(model, names, cotangents):
    captured = gs.capture(model, torch.ones(2, 2))
    rows = [layer for layer in captured.layers if layer.name in names]
    c = Cotangents(captured.target, len(cotangents), len(cotangents), lambda a, b: cotangents[a:b].clone())
    return sweep(TrunkRoute(captured.graph, rows), [c], lengths())


def unit(index):
    v = torch.zeros(1, 2, 2)
    v[..., index] = 1
    return v


def test_dead_units_cost_one_sweep_and_a_short_test(passes):
    model, x = gs.models.MLP(depth=20, width=16, activation="relu", generator=seeded()).double(), noise(4, 16)
    matrix = gs.gsc_matrix(model, x, probes="exact")
    (stride, total), (last, tested) = passes
    assert (stride, last) == (128, 1)
    assert 0 < tested < total / 10
    for target in ("layers.9", "layers.17", "layers.19"):
        column = gs.gsc(model, x, target=target, probes="exact")
        for source in ("input", "layers.3", "layers.8"):
            value = matrix.log10_values[matrix.sources.index(source), matrix.targets.index(target)]
            assert value == pytest.approx(gsc_of(model, x, source, target), abs=1e-9)
            assert value == pytest.approx(column[source].log10_value, abs=1e-9)


def test_the_test_of_a_dead_output_unit_ends_at_the_first_row(monkeypatch):
    bottoms, own = [], module._pass
    monkeypatch.setattr(module, "_pass", lambda route, *rest: bottoms.append(route.bottom) or own(route, *rest))
    model, x = gs.models.MLP(depth=20, width=16, activation="relu", generator=seeded()).double(), noise(4, 16)
    gs.gsc(model, x, probes="exact")
    trunk = gs.capture(model, x).graph.position
    assert bottoms == [0, len(trunk) - 3]  # a linear map and its activation below the target


def gsc_of(model, x, source, target):
    """log10 GSC by plain autograd, one entry of the target after the other."""
    found, z = {"input": x.clone().requires_grad_()}, None
    handles = [
        m.register_forward_hook(lambda m, a, out, n=n: found.__setitem__(n, out)) for n, m in model.named_modules()
    ]
    model(found["input"])
    for handle in handles:
        handle.remove()
    y, z = found[target], found[source]
    square = sum(float(torch.autograd.grad(v, z, retain_graph=True)[0].square().sum()) for v in y.flatten())
    return math.log10(square / z.numel() * float(z.detach().square().sum() / y.detach().square().sum()))


def test_a_zero_that_underflowed_is_found(passes):
    """One cotangent vanishes to 2^-200 between the only two rows, and float32 ends at 2^-149; the other one is dead."""
    model = nn.Sequential(*(Factor(2.0**-10, 0.0) for _ in range(20)))
    first, second = (swept(model, ["input"], unit(index))[0] for index in (0, 1))
    assert math.log2(first.values[0, 0]) + first.exponents[0] == pytest.approx(-200 + 0.5)
    assert second.values[0, 0] == 0
    both = swept(model, ["input"], torch.cat([unit(0), unit(1)]))[0]
    assert math.log2(both.values[0, 0]) + both.exponents[0] == pytest.approx(-200 + 0.5)
    assert both.values[1, 0] == 0


def test_a_zero_that_underflowed_and_would_have_grown_again(passes):
    model = nn.Sequential(*(Factor(2.0**10, 1.0) for _ in range(20)), *(Factor(2.0**-10, 1.0) for _ in range(20)))
    (reading,) = swept(model, ["input"], unit(0))
    assert math.log2(reading.values[0, 0]) + reading.exponents[0] == pytest.approx(0.5)
    assert len(passes) > 2


def test_a_dead_network_is_swept_once(passes):
    model = nn.Sequential(nn.Linear(2, 2), *(Factor(0.0, 0.0) for _ in range(3)))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)
    readings = swept(model, ["input", "0", "1"], unit(0))
    assert not any(reading.values.any() for reading in readings)
    assert passes == [(128, 1), (1, 1)]


def test_the_exponent_of_a_zero_says_nothing():
    values, exponents = np.array([1.0, 0.0, 3.0]), np.array([-1200, 0, -1200])
    moments = Moments.of(values, exponents)
    assert np.ldexp(float(moments.mean), moments.exponent + 1200) == pytest.approx(4 / 3)
    assert np.ldexp(float(moments.m2), 2 * (moments.exponent + 1200)) == pytest.approx(14 / 3)
    assert Moments.of(np.zeros(3), np.array([5, 6, 7])).estimate().value == 0


def test_a_dead_cotangent_does_not_hide_vanishing_ones():
    """The first cotangent is dead at once, so it keeps exponent 0; the others vanish to 2^-700."""
    model = nn.Sequential(nn.Linear(2, 2), *(Factor(2.0**-7, 2.0**-7) for _ in range(100)), Factor(0.0, 1.0))
    x = torch.ones(2, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    # J = diag(0, 2^-700); the input and the output are ones.
    assert gs.gsc(model, x, probes="exact")["input"].log10_value == pytest.approx(-1400 * math.log10(2) - math.log10(2))
    weights = gs.parameter_gsc(model, x, probes="exact")["0"].log10_value
    assert -1400 * math.log10(2) - 2 < weights < -1400 * math.log10(2) + 2


class Scale(nn.Module):
    """A multiplication by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("exponent", [150, 162, 200, 300])
def test_gradients_whose_squares_leave_the_range_of_float64_are_no_zeros(exponent):
    """The bias hides the input, so the output stays and GSC is proportional to the square of the factor."""

    def log10s(power):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Scale(10.0**-power), nn.Linear(4, 4), nn.Linear(4, 4))
        return gs.gsc(model.double(), noise(3, 4), probes="exact").log10_values.ravel()[:4]

    assert log10s(exponent) == pytest.approx(log10s(40) - 2 * (exponent - 40), abs=1e-9)


@pytest.mark.parametrize("power", [-330, -660])
def test_the_scale_of_weights_changes_no_standard_error(power):
    """Their fourth powers leave the range of float64: a power of two in every layer shifts values and nothing else."""
    x = torch.randn(4, 10, dtype=torch.float64, generator=seeded(1))

    def measured(exponent):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(10, 10, dtype=torch.float64) for _ in range(3)])
        with torch.no_grad():
            for layer in model:
                layer.weight.mul_(2.0**exponent)
                layer.bias.fill_(1)  # to float64, the output of every layer is 1
        return gs.gsc(model, x, probes="exact")

    found, expected = measured(power), measured(-90)
    shift = 2 * (power + 90) * np.log10(2) * np.array([[3], [2], [1], [0]])
    np.testing.assert_allclose(found.log10_values, expected.log10_values + shift, atol=1e-9)
    np.testing.assert_allclose(found.log10_stderr_sample, expected.log10_stderr_sample, rtol=1e-9)
    assert expected.log10_stderr_sample[0] > 0.1
