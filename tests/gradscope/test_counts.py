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


@pytest.fixture
def measure():
    """One measurement of the reference: an MLP with 50 layers of width 100, a batch of 100, one probe."""
    model = gs.models.MLP(depth=50, width=100, activation="selu", generator=seeded())
    x = torch.randn(100, 100, generator=seeded(1))

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


def test_operations_and_reads(measure):
    with Operations() as operations:
        measure()
    assert sum(operations.num.values()) <= 470  # forward and backward pass with parameter gradients: 556
    assert sum(operations.num[name] for name in READS) == 0


def test_the_results_are_copied_from_the_device_twice(measure, monkeypatch):
    """Once after the forward pass, when NaN is refused, and once after the sweep."""
    copies, own = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.numel()) or own(tensor))
    measure()
    assert len(copies) == 2
