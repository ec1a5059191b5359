"""Parameters without entries and sparse gradients: the numbers of a twin without them."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from tests.helpers import noise


class Empty(nn.Module):
    def __init__(self, extra: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(4, 3).double(), nn.Tanh(), nn.Linear(3, 3).double()
        if extra:
            self.prompt, self.b.prompt = (nn.Parameter(torch.zeros(0, 4, dtype=torch.float64)) for _ in range(2))
            self.none = nn.Linear(0, 3).double()
            self.none.bias = None

    def forward(self, x):
        y = self.b(self.act(self.a(x)))
        return (
            y + self.prompt.sum() + self.b.prompt.sum() + self.none(x.detach()[:, :0])
            if hasattr(self, "none")
            else y + 0
        )


class Embedded(nn.Module):
    def __init__(self, sparse: bool):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.a, self.r = nn.Embedding(11, 4, sparse=sparse), nn.Linear(4, 4), nn.ReLU()
        self.h = nn.Linear(4, 3)

    def forward(self, i):
        return self.h(self.r(self.a(self.e(i).mean(1))))


IDS = torch.randint(11, (5, 6), generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(5) % 3


def cross_entropy(output, labels):
    return functional.cross_entropy(output, labels, reduction="none")


def monitored(model, x, loss):
    monitor = gs.Monitor(model, x, every=1, max_overhead=None)
    for _ in range(2):
        model.zero_grad()
        value = loss(model(x), CLASSES).mean()
        value.backward()
        monitor.step(value, (x, CLASSES))
    return monitor.to_frame()


def same(found, expected):
    if isinstance(expected, pd.DataFrame):
        expected = expected.reset_index(drop=True)
        found = found[found.layer.isin(expected.layer)].reset_index(drop=True)
        assert list(found.layer) == list(expected.layer)
        found, expected = found.log10_value.to_numpy(float), expected.log10_value.to_numpy(float)
    np.testing.assert_allclose(found, expected, atol=1e-6)


MEASURES = {
    "gsc": lambda model, x, loss: gs.gsc(model, x).log10_values,
    "parameter_gsc": lambda model, x, loss: gs.parameter_gsc(model, x, probes="exact").log10_values,
    "one probe": lambda model, x, loss: gs.parameter_gsc(model, x, probes=1).log10_values,
    "measure": lambda model, x, loss: gs.measure(model, (x, CLASSES), loss_fn=loss),
    "Monitor": monitored,
}


@pytest.mark.parametrize("name", MEASURES)
def test_empty_parameters(name):
    x = noise(5, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        models = [Empty(extra) for extra in (True, False)]
    found, expected = (MEASURES[name](model, x, cross_entropy) for model in models)
    same(found, expected)


@pytest.mark.parametrize("name", MEASURES)
def test_sparse_gradients(name):
    found, expected = (MEASURES[name](Embedded(sparse).double(), IDS, cross_entropy) for sparse in (True, False))
    same(found, expected)


def test_nonfinite_sparse_gradients_name_the_layer():
    faults = []
    for sparse in (True, False):
        model = Embedded(sparse)
        assert gs.first_nonfinite(model, (IDS, CLASSES), loss_fn=cross_entropy) is None
        model.e.register_forward_hook(lambda module, args, output: output + (output * 0).sqrt())
        faults.append(gs.first_nonfinite(model, (IDS, CLASSES), loss_fn=cross_entropy))
    assert faults[0] == faults[1]
    assert faults[0] is not None


def test_losses_of_samples_are_refused_by_the_monitor():
    monitor = gs.Monitor(Embedded(False), IDS)
    with pytest.raises(ValueError, match=r"step needs one loss, .* got shape \(5,\) on cpu: give losses\.mean\(\)"):
        monitor.step(torch.ones(5))
