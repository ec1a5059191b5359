"""Alarms of step sizes: one layer with another learning rate, in optimizers that measure steps differently."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

import gradscope as gs
from gradscope.models import MLP
from gradscope.monitor.alarms import Alarms, _expected
from gradscope.monitor.weights import Weights


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


def simulated(lengths, gradients, resolution=0.0, names="layers.{}.linear", norm=3.0, largest=None):
    """Alarms of given lengths of steps and of gradients, one row per record and one column per layer."""
    alarms = Alarms({}, resolution)
    largest = np.asarray(lengths) / 10 if largest is None else largest
    for step, (length, gradient, most) in enumerate(zip(lengths, gradients, largest, strict=True)):
        rows = [
            (quantity, names.format(n), value)
            for n in range(len(length))
            for quantity, value in (
                ("weight_norm", norm), ("gradient_norm", gradient[n]), ("gradient_rms", gradient[n] / 10),
                ("update_to_weight", length[n] / norm), ("update_max", most[n]),
            )
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=["quantity", "layer", "value"])
        alarms.record(frame.assign(log10_value=0.0), step)
    return [layer for kind, layer, _ in alarms.fired if kind == "step size"]


def records(factor=1.0, layer=11, num=11, layers=12, seed=0):
    random = np.random.default_rng(seed)
    values = np.exp(0.02 * random.normal(size=(num, layers)))
    values[:, layer] *= factor
    return values


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_a_layer_whose_gradient_itself_differs_is_not_blamed():
    """Steps vary more from layer to layer than their ratio to the gradient, but no step is conspicuous."""
    length, ratio = records(seed=1), records(6.0, seed=2) ** 0.1
    ratio[:, 11] *= 6.0**0.9
    assert simulated(length, length * ratio) == []
    length[:, 11] *= 2
    assert simulated(length, records(seed=3)) == ["layers.11.linear"]


def unlike(seed, records=11, layers=12):
    """Factors that differ much from layer to layer, the same in every record."""
    return np.exp(np.random.default_rng(seed).normal(size=layers)) * np.ones((records, 1))


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_the_first_step_of_momentum_is_that_of_gradient_descent():
    """Later steps sum up gradients, which agree more from step to step in some layers than in others."""
    gradients, sums = unlike(1), unlike(2)
    sums[0] = 1
    lengths = records(2.0, layer=3) * gradients * sums
    lengths[1:] = lengths[:-1]  # a step is made of the gradient of the record before
    assert simulated(lengths, gradients) == ["layers.3.linear"]
    sums[0] = unlike(3)[0]  # the first record is not the first step
    lengths[1:] = (records(2.0, layer=3) * gradients * sums)[:-1]
    assert simulated(lengths, gradients) == []


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_the_largest_entry_counts_where_many_weights_do_not_move():
    """In Adam, the entries with a gradient move equally far, but their number may differ from layer to layer."""
    lengths, gradients, largest = 2.0 * unlike(1), unlike(2), records(2.0, layer=7)
    lengths[:, 7] *= 2
    assert simulated(lengths, gradients, largest=largest) == ["layers.7.linear"]
    assert simulated(lengths, gradients) == []


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_steps_below_the_resolution_of_the_weights_are_not_judged():
    twice, same = records(2.0, layer=4), records(seed=1)
    assert simulated(1e-6 * twice, same, resolution=1e-7) == ["layers.4.linear"]
    assert simulated(1e-8 * twice, same, resolution=1e-7) == []


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_other_roles_in_a_block_are_not_compared_with_each_other():
    """Every second layer takes steps four times as long, as an output layer of a block may."""
    values = records(2.0, layer=8, layers=16) * np.where(np.arange(16) % 2, 4.0, 1.0)
    assert simulated(values, records(layers=16, seed=1), names="{}") == []
    alarms = Alarms({})
    names = [f"blocks.{n // 2}.{('up', 'down')[n % 2]}" for n in range(16)]
    for step, row in enumerate(values):
        rows = [("gradient_norm", n, 1.0) for n in names] + [("gradient_rms", n, 0.1) for n in names]
        rows += [("weight_norm", n, 1.0) for n in names]
        rows += [(q, n, v) for n, v in zip(names, row, strict=True) for q in ("update_to_weight", "update_max")]
        alarms.record(pd.DataFrame(rows, columns=["quantity", "layer", "value"]).assign(log10_value=0.0), step)
    assert [layer for _, layer, _ in alarms.fired] == ["blocks.4.up"]


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_layers_of_equal_steps_give_an_alarm_as_rarely_as_promised():
    """Layers differ by normal noise that is persistent, so no number of records averages it out."""
    alarms = 0
    for seed in range(200):
        noise, others, largest = np.exp(0.3 * np.random.default_rng(seed).normal(size=(3, 12)))
        alarms += bool(simulated([noise] * 6, [others] * 6, largest=[largest] * 6))
    assert alarms <= 6  # expected at most 200 * 0.04 / 3 = 2.7


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_the_most_conspicuous_layer_comes_first():
    values = records(2.0, layer=2)
    values[:, 9] /= 8
    assert simulated(values, records(seed=1)) == ["layers.9.linear", "layers.2.linear"]


def test_the_resolution_is_that_of_the_coarsest_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    assert Weights(model).resolution() == 2**-7
    assert Weights(model.double()).resolution() == 2**-52


def test_step_sizes_survive_a_checkpoint():
    alarms = Alarms({})
    alarms.step_sizes["length"]["a"], alarms.gradients = [2, 0.5, 0.75], {"a": 3.0}
    other = Alarms({})
    other.load_state_dict(alarms.state_dict())
    assert (other.step_sizes, other.gradients) == (alarms.step_sizes, alarms.gradients)


def test_a_robust_line_ignores_one_wrong_neighbor():
    values = 3.0 - 0.5 * np.arange(9)
    values[5] += 10.0
    for place in (0, 3, 4, 8):
        expected, error = _expected(values, place)
        assert expected == pytest.approx(3.0 - 0.5 * place)
        # Brute force: how a least-squares line through the same neighbors predicts the value at this place.
        near = np.array(sorted(set(range(9)) - {place}, key=lambda p: abs(p - place))[:6])
        design = np.stack([np.ones(6), near], 1)
        at = np.array([1.0, place]) @ np.linalg.inv(design.T @ design) @ np.array([1.0, place])
        assert error == pytest.approx(math.sqrt(1 + at))
