"""Statistics of pre-activations against NumPy, and a model that is left alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.measures import PreactivationStd, SignDiversity
from tests.helpers import noise, seeded


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


@pytest.mark.parametrize("statistic", [PreactivationStd(), SignDiversity()])
def test_standard_error_over_batches(statistic):
    # Samples of common scale and mean, so that neurons do not average the spread over samples away.
    def batch(seed):
        h = noise(100, 30, seed=seed)
        return h * (1 + 0.3 * noise(100, 1, seed=1000 + seed).abs()) + 0.4 * noise(100, 1, seed=2000 + seed) + 0.5

    estimates = [statistic(batch(seed)) for seed in range(300)]
    spread = np.std([e.value for e in estimates])
    assert np.mean([e.stderr for e in estimates]) == pytest.approx(spread, rel=0.15)


def test_rows_of_a_frame_in_execution_order():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()
    ).double()
    x = noise(50, 5)
    frame = gs.measure(model, x)
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

    assert list(gs.measure(Keyword().double(), noise(5, 3))["layer"]) == ["act", "act"]


def test_errors():
    with pytest.raises(ValueError, match="No nonlinearity module fired in Linear: functional calls"):
        gs.measure(nn.Linear(3, 3), torch.randn(4, 3, generator=seeded()))
    with pytest.raises(ValueError, match=r"at least two of them, got pre-activations of shape \(1, 3\)"):
        gs.measure(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(1, 3, generator=seeded()))
