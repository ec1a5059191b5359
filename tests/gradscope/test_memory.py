"""When memory runs out, the batch of cotangents is halved and the sweep continues.  Numbers are copied together."""

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.memory import Later, batch_bytes, free_bytes, is_out_of_memory, peak_bytes, together
from tests.helpers import noise


class Greedy(torch.autograd.Function):
    """The identity, whose backward pass takes at most ``room`` cotangents at once."""

    room = 10**9
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return Greedy.apply(x), in_dims[0]

    @staticmethod
    def backward(ctx, gradient):
        return Limit.apply(gradient)


class Limit(torch.autograd.Function):
    @staticmethod
    def forward(gradient):
        if Greedy.room < 1:
            raise torch.OutOfMemoryError("of one cotangent")
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, gradient):
        if info.batch_size > Greedy.room:
            raise torch.OutOfMemoryError(f"Tried to allocate {info.batch_size} cotangents")
        return gradient.clone(), in_dims[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.last(Greedy.apply(self.first(x)))


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("measure", [gs.gsc, gs.gsc_matrix])
def test_a_batch_of_cotangents_that_is_too_large_is_halved(room, measure, monkeypatch):
    model, x = Model(), noise(3, 6)
    expected = measure(model, x, probes="exact").log10_values
    monkeypatch.setattr(Greedy, "room", room)
    np.testing.assert_allclose(measure(model, x, probes="exact").log10_values, expected, atol=1e-12)


def test_a_single_cotangent_that_is_too_large_is_an_error(monkeypatch):
    monkeypatch.setattr(Greedy, "room", 0)
    with pytest.raises(torch.OutOfMemoryError, match="cotangent"):
        gs.gsc(Model(), noise(3, 6), probes="exact")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("not enough memory"), False),
    ],
    ids=str,
)
def test_what_running_out_of_memory_looks_like(error, expected):
    assert is_out_of_memory(error) == expected


def test_budgets():
    cpu = torch.device("cpu")
    assert free_bytes(cpu) > 1 << 20
    assert batch_bytes(cpu) <= batch_bytes(torch.device("cuda"))
    assert 20 * peak_bytes(cpu) <= max(free_bytes(cpu) * 1.5, 20)


def test_what_waits_is_copied_together_in_its_shapes_and_types(monkeypatch):
    copies, own = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.numel()) or own(tensor))
    shared = torch.arange(6).reshape(2, 3)
    with together():
        first = Later([shared, torch.tensor(True), torch.ones(2, dtype=torch.float16, requires_grad=True)])
        with together():
            second = Later([torch.zeros(0, 4), shared])
        assert [array.tolist() for array in second.arrays] == [[], [[0, 1, 2], [3, 4, 5]]]
        assert [array.tolist() for array in first.arrays] == [[[0, 1, 2], [3, 4, 5]], 1, [1, 1]]
        assert all(array.dtype == np.float64 for array in first.arrays + second.arrays)
        assert copies == [6 + 1 + 2]  # what both need is copied once
        alone = Later([torch.ones(5)])
    later = Later([torch.ones(7)])  # nothing waits for the end of another context
    assert len(alone.arrays) == len(later.arrays) == 1 and copies == [9, 5, 7]


def test_checks_follow_the_copy_and_are_forgotten_with_an_error():
    called = []

    def check(name):
        called.append(name)
        raise ValueError(name)

    with pytest.raises(ValueError, match="first"), together():
        failing, other = Later([torch.ones(1)]), Later([torch.ones(1)])
        failing.then(lambda: check("first"))
        other.then(lambda: check("second"))
        assert called == []
        _ = other.arrays
    assert called == ["first", "second"]  # each of them, once
    called.clear()
    with together():
        with pytest.raises(KeyError), together():
            Later([torch.ones(1)]).then(lambda: check("forgotten"))
            raise KeyError
        assert Later([torch.ones(1)]).arrays and called == []
    done = Later([torch.ones(1)])
    _ = done.arrays
    with pytest.raises(ValueError, match="at once"):
        done.then(lambda: check("at once"))
