"""Alarms of step sizes: one layer with another learning rate, in optimizers that measure steps differently."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import gradscope as gs
from gradscope.models import MLP
from gradscope.monitor.alarms import Alarms, _expected


def fired(optimizer, factor, layer=4, every=1, steps=12, depth=10):
    """Train with ``factor`` times the learning rate in one layer; return the layers with unequal steps."""
    generator = torch.Generator().manual_seed(0)
    model = MLP(depth=depth, width=60, activation="tanh", norm="layer", out_features=5, generator=generator)
    own = list(model.layers[layer].parameters())
    others = [p for p in model.parameters() if not any(p is q for q in own)]
    rate = 1e-3 if optimizer is torch.optim.Adam else 0.02
    trained = optimizer([{"params": others}, {"params": own, "lr": factor * rate}], lr=rate)
    monitor = gs.Monitor(
        model, torch.randn(8, 60, generator=generator), every=10**6, statistics_every=every, max_overhead=None
    )
    for _ in range(steps * every):
        x, y = torch.randn(32, 60, generator=generator), torch.randint(5, (32,), generator=generator)
        trained.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        monitor.step()
        trained.step()
    return [layer for kind, layer, _ in monitor.alarms.fired if kind == "step size"]


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("layer", [0, 4, 9])
def test_a_doubled_step_size_is_named(optimizer, layer):
    assert fired(optimizer, 2.0, layer) == [f"layers.{layer}.linear"]
    assert fired(optimizer, 1.0, layer) == []


def test_the_warning_says_how_much_longer_the_steps_are():
    with pytest.warns(gs.MonitorWarning, match=r"step size at layer 'layers.4.linear'.*are 2 times as long"):
        fired(torch.optim.SGD, 2.0)
    with pytest.warns(gs.MonitorWarning, match=r"layer 'layers.4.linear'.*are 0.5 times as long"):
        fired(torch.optim.SGD, 0.5)


def test_few_layers_are_not_compared():
    assert fired(torch.optim.SGD, 2.0, depth=6) == []


def test_step_sizes_survive_a_checkpoint():
    alarms = Alarms({})
    alarms.steps["length"]["a"], alarms.gradients = [0.5, 0.25], {"a": 3.0}
    other = Alarms({})
    other.load_state_dict(alarms.state_dict())
    assert (other.steps, other.gradients) == (alarms.steps, alarms.gradients)


def test_a_robust_line_ignores_one_wrong_neighbor():
    values = 3.0 - 0.5 * np.arange(9)
    values[5] += 10.0
    for place in (0, 3, 4, 8):
        assert _expected(values, place)[0] == pytest.approx(3.0 - 0.5 * place)
