"""What one measurement costs besides the passes themselves: Python calls, operations of torch and reads of the device.

Counts and not times: a time depends on what else the machine does.
"""

import cProfile
import pstats
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradscope as gs
from tests.helpers import seeded

# Operations that wait for the device: they turn a tensor into Python numbers.
READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default")


class Operations(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self):
        super().__init__()
        self.num = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num[str(func)] += 1
        return func(*args, **(kwargs or {}))


def reference():
    model = gs.models.MLP(depth=50, width=100, activation="selu", generator=seeded())
    return model, torch.randn(100, 100, generator=seeded(1))


@pytest.fixture
def measure():
    """One measurement of the reference: an MLP with 50 layers of width 100, a batch of 100, one probe."""
    model, x = reference()

    def once():
        return gs.gsc(model, x, probes=1, generator=seeded(2))

    once()  # what is imported and built at the first use
    return once


def test_python_calls(measure):
    profile = cProfile.Profile()
    profile.enable()
    measure()
    profile.disable()
    assert pstats.Stats(profile).total_calls < 17_000


def test_operations(measure):
    with Operations() as operations:
        measure()
    assert sum(operations.num.values()) <= 490  # forward and backward pass with parameter gradients: 556


MEASUREMENTS = {
    # copies: lengths; what the sweep read
    "one probe": (2, lambda model, x: gs.gsc(model, x, probes=1)),
    # and whether links agree with the engine; the 100 cotangents come in two batches
    "exact": (4, lambda model, x: gs.gsc(model, x, probes="exact")),
    "matrix": (3, lambda model, x: gs.gsc_matrix(model, x, probes=1)),
    # and, of the replays that find directions: lengths before, one for each of 2 directions, whether all are finite
    "deflated matrix": (7, lambda model, x: gs.gsc_matrix(model, x, probes=gs.Deflated(2, 2))),
    # and lengths of the weights
    "parameters": (3, lambda model, x: gs.parameter_gsc(model, x, probes=2)),
    # two passes over the data, with lengths each; deviations from the mean; what the sweep read
    "nlc": (4, lambda model, x: gs.nlc(model, x, probes=2)),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_device_is_read_a_few_times_at_any_depth(name, monkeypatch):
    expected, measured = MEASUREMENTS[name]
    copies, own = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.numel()) or own(tensor))
    with Operations() as operations:
        measured(*reference())
    assert sum(operations.num[name] for name in READS) == 0
    assert len(copies) == expected
