"""What one measurement costs besides the passes themselves: Python calls, operations of torch and reads of the device.

Counts and not times: a time depends on what else the machine does.
"""

import cProfile
import pstats
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import gradscope as gs
from tests.helpers import noise, seeded

# Operations that wait for the device: they turn a tensor into Python numbers or into a size, or check for an error.
READS = (
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "_linalg_eigh", "_linalg_svd",
    "linalg_eig", "_linalg_check_errors", "linalg_cholesky_ex", "linalg_inv_ex",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts the operations of torch by name, and what would wait for the device if the tensors were on a GPU.

    On a CPU, no operation copies a tensor to Python or NumPy, so the methods that do so are counted, too; a second copy
    of what is already on the CPU is not.
    """

    def __init__(self):
        super().__init__()
        self.num, self.reads, self.copies = Counter(), Counter(), {}

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("cpu", "tolist", "numpy"):  # NumPy itself calls `numpy`
            self.patch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def counted(self, name, own):
        def method(tensor, *args, **kwargs):
            # States of random generators are bytes, and always on the CPU.
            if id(tensor) not in self.copies and tensor.dtype != torch.uint8:
                self.reads[name] += 1
            result = own(tensor, *args, **kwargs)
            if name == "cpu":
                result = result.clone()
                self.copies[id(result)] = result
            return result

        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.num[name] += 1
        masked = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or masked:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        float, bool, np.asarray, lambda a: a.item(), lambda a: a.tolist(), lambda a: a.cpu(), lambda a: a.numpy(),
        torch.nonzero, lambda a: a[a > 0], lambda a: a.cpu().tolist(), torch.linalg.eigvalsh, torch.linalg.svdvals,
    ],
)  # fmt: skip
def test_every_way_to_read_is_counted(read):
    matrix = read in (torch.linalg.eigvalsh, torch.linalg.svdvals)
    with Operations() as operations:
        read(torch.eye(2) if matrix else torch.ones(()))
    assert operations.reads.total() == 1


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
    assert pstats.Stats(profile).total_calls < 13_700


@pytest.mark.parametrize("threads", [0, 1])
def test_operations(measure, threads):
    """Threads, which torch.compile and loaders leave, change nothing."""
    done = threading.Event()
    others = [threading.Thread(target=done.wait) for _ in range(threads)]
    for other in others:
        other.start()
    try:
        with Operations() as operations:
            measure()
    finally:
        done.set()
    assert sum(operations.num.values()) <= 475  # forward and backward pass with parameter gradients: 556


def network(depth, *between):
    """A deep network with layers that Python calls in turn."""
    torch.manual_seed(0)
    layers = [module for _ in range(depth) for module in (nn.Linear(10, 10), *[make() for make in between], nn.Tanh())]
    for linear in layers[:: 2 + len(between)]:
        nn.init.orthogonal_(linear.weight)
    return nn.Sequential(*layers, nn.Linear(10, 4))


def losses(output, labels):
    return functional.cross_entropy(output, labels, reduction="none")


def record(model, x, labels):
    """A record of a monitor, after one that learned the weights; without the check of loss and gradients."""
    monitor = gs.Monitor(model, x)
    losses(model(x), labels).mean().backward()
    monitor.record()
    monitor.steps += 1
    return monitor.record


def batch_norm():
    return nn.BatchNorm1d(10)


class Flip(nn.Module):
    """An operation that the graph does not show to keep samples apart."""

    def forward(self, x):
        return x.flip(1)


MEASUREMENTS = {
    "one probe": (1, lambda model, x, y: gs.gsc(model, x, probes=1)),
    # whether samples influence each other, which the graph of the losses does not show
    "one probe of losses": (2, lambda model, x, y: gs.gsc(model, (x, y), probes=1, loss_fn=losses)),
    "exact": (1, lambda model, x, y: gs.gsc(nn.Sequential(model, nn.Linear(4, 100)), x, probes="exact")),
    "matrix": (1, lambda model, x, y: gs.gsc_matrix(model, x, probes=1)),
    # the replays that find directions
    "deflated matrix": (2, lambda model, x, y: gs.gsc_matrix(model, x, probes=gs.Deflated(2, 2))),
    "parameters": (1, lambda model, x, y: gs.parameter_gsc(model, x, probes=2)),
    "nlc": (1, lambda model, x, y: gs.nlc(model, x, probes=2)),
    "activations": (1, lambda model, x, y: gs.measure(model, x)),
    "gradients": (1, lambda model, x, y: gs.measure(model, (x, y), loss_fn=losses, learning_rate=0.1)),
}


def reads(model, run):
    x, y = noise(40, 10).float(), torch.arange(40) % 4
    prepared = run(model, x, y) if run is record else partial(run, model, x, y)
    with Operations() as operations:
        prepared()
    return operations.reads.total()


@pytest.mark.parametrize("depth", [8, 14])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_device_is_read_a_few_times_at_any_depth(name, depth):
    expected, run = MEASUREMENTS[name]
    assert reads(network(depth), run) == expected


@pytest.mark.parametrize("depth", [8, 14])
@pytest.mark.parametrize(
    ("between", "expected"),
    # with Flip: whether samples influence each other
    [((), 1), ((batch_norm,), 1), ((Flip,), 2)],
)
def test_a_record_of_a_monitor_reads_the_device_once(depth, between, expected):
    assert reads(network(depth, *between), record) == expected


def test_nlc_of_one_batch_runs_two_forward_passes():
    model, x = network(2), noise(40, 10).float()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    single = gs.nlc(model, x, probes=2)
    assert len(passes) == 2  # recorded, and for the values
    stream = gs.nlc(model, iter([x]), probes=2)
    assert len(passes) == 2 + 3
    assert (single.value, single.stderr) == (stream.value, stream.stderr)
