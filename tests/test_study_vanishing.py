"""The study of vanishing gradients against the chain rule, in closed form."""

import math

import numpy as np
import pytest
import torch

import gradscope as gs
from experiments.studies import vanishing
from tests.helpers import noise, seeded


def test_the_chain_by_hand_is_the_derivative():
    def loss(weights):
        a = vanishing.INPUT
        for w in weights:
            a = 1 / (1 + math.exp(-w * a))
        return 0.5 * (vanishing.TARGET - a) ** 2

    by_hand = vanishing.by_hand(vanishing.INPUT, vanishing.TARGET, vanishing.WEIGHTS)
    for k in range(3):
        h, ends = 1e-5, []
        for sign in (1, -1):
            moved = list(vanishing.WEIGHTS)
            moved[k] += sign * h
            ends.append(loss(moved))
        assert by_hand[k] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-7)


@pytest.fixture(scope="module")
def frame():
    model = gs.models.MLP(depth=4, width=12, activation="sigmoid", out_features=3, generator=seeded(0)).double()
    return vanishing.measure(model, noise(16, 12), generator=seeded(1))


def test_by_hand_and_measured_agree(frame):
    found = frame[frame["quantity"] == "by_autograd"].set_index("layer")["value"]
    by_hand = vanishing.by_hand(vanishing.INPUT, vanishing.TARGET, vanishing.WEIGHTS)
    np.testing.assert_allclose(found[["w1", "w2", "w3"]], np.abs(by_hand), rtol=1e-14)
    assert frame.loc[frame["quantity"] == "relative_difference", "value"].max() < 1e-14


def test_chains(frame):
    """With w = 8, b = -4 the units stay at 1/2, of slope 8 / 4; with w = 1 factors are multiplied here."""
    plain, held = vanishing.CHAINS
    rows = frame[frame["quantity"] == "log10_chain"]
    np.testing.assert_allclose(rows.loc[rows["layer"] == held, "value"], np.arange(1, 31) * math.log10(2), rtol=1e-12)
    h, total, expected = 0.5, 0.0, []
    for _ in range(30):
        h = 1 / (1 + math.exp(-h))
        total += math.log10(h * (1 - h))
        expected.append(total)
    np.testing.assert_allclose(rows.loc[rows["layer"] == plain, "value"], expected, rtol=1e-12)
    bound = frame[(frame["quantity"] == "log10_chain_bound") & (frame["layer"] == plain)]["value"]
    np.testing.assert_allclose(bound, -np.arange(1, 31) * math.log10(4))


def test_gradients_of_layers_are_those_of_autograd(frame):
    model = gs.models.MLP(depth=4, width=12, activation="sigmoid", out_features=3, generator=seeded(0)).double()
    y = torch.randint(3, (16,), generator=seeded(1))
    torch.nn.functional.cross_entropy(model(noise(16, 12)), y).backward()
    rows = frame[frame["quantity"] == "gradient_norm"].set_index("layer")["value"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert rows[name] == pytest.approx(float(module.weight.grad.norm()), rel=1e-10)


def test_the_factor_a_layer():
    """A gradient of 2^index at each layer halves on its way to the input."""
    layers = [f"layers.{k}.linear" for k in range(6)]
    rows = [
        vanishing.observed("gradient_norm", 2.0 ** np.arange(6) * scale, layer=layers, index=np.arange(6)).assign(
            seed=seed, activation="tanh", norm="none"
        )
        for seed, scale in enumerate((1.0, 3.0))
    ]
    made = vanishing.pd.concat(rows, ignore_index=True)
    made["log10_value"] = np.log10(made["value"])
    found = vanishing.rate(made, "tanh", "none")
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
