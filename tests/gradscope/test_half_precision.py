"""bfloat16 and float16 models, against float32 copies with the same rounded weights and data."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.measures import DeadFraction, PreactivationStd, SignDiversity
from gradscope.models.alexnet import AlexNetA
from gradscope.models.mlp import MLP
from tests.helpers import noise, seeded

# Largest relative deviation of a coefficient over ten layers, and of the mean growth rate over seeds.
DEVIATIONS = {torch.bfloat16: (0.10, 0.004), torch.float16: (0.02, 0.001)}


def both(model, x, dtype, **options):
    half = copy.deepcopy(model).to(dtype)
    measured = gs.gsc(half, x.to(dtype), **options)
    return measured, gs.gsc(half.float(), x.to(dtype).float(), **options)


@pytest.mark.parametrize("dtype", DEVIATIONS, ids=str)
@pytest.mark.parametrize(("activation", "norm"), [("selu", "none"), ("tanh", "layer"), ("relu", "none")])
def test_multilayer_perceptrons(dtype, activation, norm):
    single, mean = DEVIATIONS[dtype]
    rates = []
    for seed in range(8):
        model = MLP(depth=12, width=50, activation=activation, norm=norm, generator=seeded(seed))
        x = torch.randn(32, 50, generator=seeded(100 + seed))
        half, full = both(model, x, dtype, probes="exact")
        deviation = (half.log10_values - full.log10_values)[:, 0] * math.log(10)
        assert np.abs(deviation).max() < single
        rates.append(deviation[0] / 12)
    assert abs(np.mean(rates)) < mean


@pytest.mark.parametrize("dtype", DEVIATIONS, ids=str)
def test_alexnet(dtype):
    half, full = both(AlexNetA(generator=seeded()).eval(), torch.randn(2, 3, 32, 32, generator=seeded(1)), dtype)
    assert np.abs(half.log10_values - full.log10_values).max() * math.log(10) < DEVIATIONS[dtype][0] / 4


@pytest.mark.parametrize("dtype", DEVIATIONS, ids=str)
def test_probes_of_a_subspace_stay_unbiased(dtype):
    model = MLP(depth=8, width=40, activation="selu", generator=seeded())
    x = torch.randn(16, 40, generator=seeded(1))
    _, exact = both(model, x, dtype, probes="exact")
    values = []
    for seed in range(60):
        half = copy.deepcopy(model).to(dtype)
        profile = gs.gsc(half, x.to(dtype), probes=gs.Deflated(3, 4), generator=seeded(seed))
        values.append(10 ** (profile.log10_values - exact.log10_values)[:-1, 0])
    error = np.std(values, axis=0) / math.sqrt(60)
    np.testing.assert_array_less(np.abs(np.mean(values, axis=0) - 1), 4 * error + DEVIATIONS[dtype][0] / 3)


def test_sixty_exploding_layers_in_half_precision_stay_finite():
    model = MLP(depth=60, width=40, activation="relu", norm="batch", generator=seeded()).half()
    profile = gs.gsc(model, torch.randn(40, 40, generator=seeded(1)).half(), probes=6)
    assert profile.growth().rate == pytest.approx(1.5, abs=0.1)


def test_statistics_under_autocast_are_not_rounded_once_more():
    """The network runs in bfloat16; counts and sums of what it gave are exact, or those of float32."""
    model, x, heard = nn.Sequential(nn.Linear(6, 40), nn.ReLU()), noise(31, 6).float(), []
    model[1].register_forward_pre_hook(lambda module, args: heard.append(args[0].detach().double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frame = gs.measure(model, x, measures=[SignDiversity(), DeadFraction(), PreactivationStd()])
    (h,) = heard
    positive, negative = (h > 0).sum(0), (h < 0).sum(0)
    expected = {
        "sign_diversity": (torch.minimum(positive, negative) / (positive + negative)).mean(),
        "dead_fraction": (positive == 0).double().mean(),
        "preactivation_std": h.var(0, correction=0).mean().sqrt(),
    }
    for quantity, value in frame.set_index("quantity")["value"].items():
        assert value == pytest.approx(float(expected[quantity]), rel=1e-6), quantity
