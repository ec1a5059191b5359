"""The thresholds of the checks in closed form: what just stays below is healthy, and what just exceeds is named."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import nn

import gradscope as gs
from gradscope.checks.levels import FALSE_ALARMS, freedom, limit, scale
from gradscope.checks.reading import UnreadableError, read
from gradscope.checks.segments import segments, siblings
from gradscope.checks.self_check import _determinism, _probes
from gradscope.checks.siblings import _numbers, _quiet, odd_structures
from gradscope.models import MLP
from tests.helpers import noise, seeded

EPS = torch.finfo(torch.float64).eps


def test_one_healthy_network_in_25_has_a_false_alarm_of_any_of_three_checks():
    assert FALSE_ALARMS == 0.04
    assert limit(1) == pytest.approx(stats.norm.ppf(1 - 0.04 / 3 / 2))


def test_the_robust_scale_scatters_like_its_degrees_of_freedom():
    scales = [scale(np.random.default_rng(seed).normal(size=100)) for seed in range(400)]
    assert np.std(np.log(scales)) == pytest.approx(1 / math.sqrt(2 * freedom(100)), rel=0.15)


def equal_layers(num=8, width=64):
    """Layers of one matrix with entries of equal size, on an input for which all features have equal power."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(num)))
    for layer in model:
        layer.weight.data = torch.from_numpy(linalg.hadamard(width)).double() / math.sqrt(width)
    return model, math.sqrt(width) * torch.eye(width, dtype=torch.float64)


def z_of(found, layer, quantity):
    (deviation,) = [d for d in found.deviations if d.layer == layer and d.quantity == quantity]
    return float(deviation.text.split("z = ")[1].split(",")[0])


def test_equal_siblings_have_the_smallest_scale_of_each_statistic():
    # All siblings agree and no statistic has an error, so a difference of 2 in ln is measured by the floor alone.
    model, x = equal_layers()
    model[3].weight.data *= math.e
    found = gs.compare(model, x)
    median = math.sqrt(1 + 1.57 / 7)
    assert z_of(found, "3", "scale of 0.weight") == pytest.approx(2 / 0.01 / median, rel=0.01)
    assert z_of(found, "3", "length of the output") == pytest.approx(2 / 0.1 / median, rel=0.01)
    model, x = equal_layers()
    model[3].weight.data[:32] = 0
    assert z_of(gs.compare(model, x), "3", "share of quiet features") == pytest.approx(0.5 / 0.02 / median, rel=0.01)


def test_a_feature_is_quiet_below_one_percent_of_the_mean_variance():
    for relative, share in ((0.007, 0.1), (0.014, 0.0)):
        power = torch.ones(10, dtype=torch.float64)
        power[0] = 9 * relative / (10 - relative)  # this fraction of the mean of all ten
        y = power.sqrt() * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        assert _quiet(y, -1)[0] == share


def test_a_linear_layer_has_the_curvature_of_rounding():
    model, x = equal_layers(4, 16)
    (group,) = siblings(segments(model, x))
    assert _numbers(group[0], group[0])["curvature"][0] == pytest.approx(math.log(1e-9))


@pytest.mark.parametrize(("num", "odd", "named"), [(20, 2, True), (20, 3, False), (30, 3, True), (30, 4, False)])
def test_a_structure_of_one_tenth_of_the_siblings_is_a_fault(num, odd, named):
    parts = [nn.Sequential(nn.Linear(8, 8), nn.Identity() if n in range(2, 2 + odd) else nn.Tanh()) for n in range(num)]
    network = segments(nn.Sequential(*parts), noise(8, 8).float())
    texts = [d.text for group in siblings(network) for d in odd_structures(group, network)]
    assert any("runs no Tanh" in text for text in texts) == named


@pytest.mark.parametrize(("num", "judged"), [(3, 0), (4, 4)])
def test_four_siblings_are_compared(num, judged):
    model, x = equal_layers(num, 16)
    assert sum(map(len, siblings(segments(model, x)))) == judged


@pytest.mark.parametrize(("relative", "read_it"), [(7e-4, True), (14e-4, False)])
def test_a_layer_is_read_if_it_is_reproduced_to_a_thousandth(relative, read_it):
    model = MLP(depth=4, width=8, activation="tanh", generator=seeded()).double()
    model.layers[2].activation.register_forward_hook(lambda m, args, y: (1 + relative) * y)
    if read_it:
        assert len(read(model, noise(6, 8)).layers) == 4
    else:
        with pytest.raises(UnreadableError, match="is not its function"):
            read(model, noise(6, 8))


class Scale(torch.autograd.Function):
    """The identity, whose gradient is wrong by a small factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Faulty(nn.Module):
    """x plus what ``fault`` adds to it."""

    def __init__(self, fault):
        super().__init__()
        self.linear, self.fault = nn.Linear(4, 4, bias=False, dtype=torch.float64), fault
        self.linear.weight.data = torch.eye(4, dtype=torch.float64)

    def forward(self, x):
        return self.fault(self.linear(x))


def status(fault, name):
    report = gs.check(Faulty(fault), torch.ones(5, 4, dtype=torch.float64))
    return next(check.status for check in report.checks if check.name == name)


@pytest.mark.parametrize(("relative", "expected"), [(0.03, "passed"), (0.06, "FAILED")])
def test_a_gradient_may_be_wrong_by_four_percent(relative, expected):
    # |1 - (1 + r)| may reach 0.02 of the sum 2 + r: r = 0.041.
    assert status(lambda h: Scale.apply(h, 1 + relative), "finite differences") == expected


@pytest.mark.parametrize(("step", "expected"), [(0.7, "passed"), (1.4, "FAILED")])
def test_a_second_pass_may_differ_by_the_square_root_of_the_precision(step, expected):
    model, x = Faulty(torch.tanh), torch.ones(5, 4, dtype=torch.float64)
    first = gs.capture(model, x)
    model.fault = lambda h: torch.tanh(h) * (1 + step * math.sqrt(EPS))
    assert _determinism(first, gs.capture(model, x))[0] == expected


@pytest.mark.parametrize(("step", "expected"), [(0.7, "passed"), (1.4, "FAILED")])
def test_another_sample_may_move_by_the_square_root_of_the_precision(step, expected):
    # Sample 0 moves by its own length 2; the others by c times that, beside a batch of length sqrt(20).
    c = step * math.sqrt(EPS) * math.sqrt(20) / 2
    mixing = torch.tensor([0.0, c, 0, 0, 0], dtype=torch.float64)[:, None]
    assert status(lambda h: h + mixing * h[0].detach(), "independence") == expected


@pytest.mark.parametrize(("z", "expected"), [(4.0, "passed"), (6.0, "FAILED")])
def test_probes_may_deviate_by_five_standard_errors(z, expected):
    # Once all passes of the exact measurement are over, the output is larger, with the same gradient.
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double(), noise(5, 6)
    calls, last, larger = 0, math.inf, 0.0

    def grow(module, args, y):
        nonlocal calls
        calls += 1
        return y + larger * (calls > last) * y.detach()

    model[2].register_forward_hook(grow)
    captured, calls = gs.capture(model, x), 0
    exact = gs.gsc(model, x, probes="exact").log10_values[:-1]
    passes, probed = calls, gs.gsc(model, x, probes=64)
    deviation = np.min(z * probed.log10_stderr_probe[:-1] + probed.log10_values[:-1] - exact)
    calls, last, larger = 0, passes, 10 ** (deviation / 2) - 1
    status, detail = _probes(captured, model, x, None, None)
    assert (status, f"at most {z:.1f} standard errors" in detail) == (expected, True)


@pytest.mark.parametrize(("noise_of_slope", "judged"), [(0.014, 2), (0.028, 1)])
def test_slopes_that_differ_by_two_percent_between_step_sizes_are_not_judged(noise_of_slope, judged):
    # One entry at 1, moved by h: central differences of h + k (h - 1)^3 have the slope 1 + k h^2, at 3, 1, 0.3 steps.
    k = noise_of_slope / (8.91 - noise_of_slope) / EPS ** (2 / 3)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Faulty(lambda h: h + k * (h - 1) ** 3)).double()
    nn.init.ones_(model[0].weight)
    model[1].linear = nn.Identity()
    report = gs.check(model, torch.ones(1, 1, dtype=torch.float64))
    assert next(c.detail for c in report.checks if c.name == "finite differences").startswith(f"{judged} of 2 layers")
