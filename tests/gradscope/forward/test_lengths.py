"""Lengths of layers: those of the tensors as the layers made them, whatever overwrites the tensors, in one pass."""

import pytest
import torch
from torch import nn

import gradscope as gs
from tests.gradscope.forward.test_recorder import linears
from tests.helpers import noise


def _without_version(h):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(h):
        h.mul_(3.0)


def _by_chunks(h):
    with torch.no_grad():
        for part in h.unsafe_chunk(2, 1):  # has a version of its own
            part.mul_(3.0)


def _by_a_view(h):
    with torch.no_grad():
        h.view(-1).data.mul_(3.0)


# Ways to overwrite a tensor of which autograd notices the first only.
WRITES = {
    "in place": lambda h: h.mul_(3.0),
    "data": lambda h: h.data.mul_(3.0),
    "new data": lambda h: setattr(h, "data", 3.0 * h.data),
    "data of a view": _by_a_view,
    "data of a detached copy": lambda h: h.detach().data.mul_(3.0),
    "numpy": lambda h: h.detach().numpy().__imul__(3.0),
    "chunks": _by_chunks,
    "without version": _without_version,
    "dlpack": lambda h: torch.from_dlpack(h.detach()).mul_(3.0),
    "storage": lambda h: h.untyped_storage().copy_((3.0 * h).untyped_storage()),
}


class Overwritten(nn.Module):
    """Functional code overwrites the output of ``first``, before ``second`` or after it."""

    def __init__(self, write=lambda h: None, report=lambda length: None, *, later=False):
        super().__init__()
        self.first, self.second, self.third = linears(3)
        self.write, self.report, self.later = write, report, later

    def forward(self, x):
        h = self.first(x)
        self.report(float(h.detach().norm()))
        if not self.later:
            self.write(h)
        y = self.third(self.second(h).sin())
        if self.later:
            self.write(h)
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", WRITES)
def test_a_length_is_that_of_the_tensor_as_the_layer_made_it(how, dtype):
    for later in (False, True):
        true, passes = [], []
        model = Overwritten(WRITES[how], true.append, later=later).to(dtype)
        model.first.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        captured = gs.capture(model, noise(5, 6).to(dtype))
        assert length_of(captured, "first") == pytest.approx(true[0], rel=1e-6)
        assert len(passes) == 1


def test_a_length_does_not_depend_on_memory_that_is_freed_or_that_a_loss_overwrites():
    true = []
    model = Overwritten(lambda h: h.untyped_storage().resize_(0), true.append, later=True)  # computed again in backward
    assert length_of(gs.capture(model, noise(5, 6)), "first") == pytest.approx(true[0], rel=1e-6)

    def loss(output, labels):
        losses = output.square().sum(1)
        output.detach().numpy().__imul__(3.0)  # as kernels of one's own do, to save memory
        return losses

    plain = Overwritten().float()
    captured = gs.capture(plain, (noise(5, 6).float(), torch.zeros(5)), loss_fn=loss)
    assert length_of(captured, "third") == pytest.approx(float(plain(noise(5, 6).float()).detach().norm()), rel=1e-6)


def test_tensors_of_many_shapes_and_kinds_have_the_lengths_of_brute_force():
    """More kinds than there are blocks, more tensors than a block holds, large ones, and one shape in several types."""
    true = {}

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            y = self.a(x)
            for n in range(160):
                z = (y[:, :1] * (n + 1)).expand(5, 1 + n % 40 if n < 80 else 6)
                z = z.double() if n % 7 == 0 else z.bfloat16() if n % 7 == 1 else z * 1.0
                z = z.repeat(1, 4000) if n % 11 == 0 else z.t().contiguous() if n % 11 == 1 else z
                made = gs.tap(z, f"z{n}")
                true[f"z{n}"] = float(made.detach().double().norm())
                y = y + made.float().sum() * 1e-9
            return y

    captured = gs.capture(Mixed(), noise(5, 6).float())
    for name, length in true.items():
        assert length_of(captured, name) == pytest.approx(length, rel=1e-12), name


def length_of(captured, name):
    layer = next(layer for layer in captured.reached if name in layer.names)
    length = captured.lengths[layer.edge[:2]]
    return float(length.squares.sum() * 4.0**length.exponent) ** 0.5


def test_a_measurement_inside_a_forward_pass_leaves_the_lengths_of_the_outer_one():
    inner, true = nn.Sequential(*linears(2)), []

    def write(h):
        gs.gsc(inner, noise(5, 6), probes=1, forward=lambda model, x: (h.data.mul_(3.0), model(x))[1])

    captured = gs.capture(Overwritten(write, true.append), noise(5, 6))
    assert length_of(captured, "first") == pytest.approx(true[0], rel=1e-6)


def test_an_empty_embedding_beside_another_one_is_no_row():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.f, self.out = nn.Embedding(9, 6), nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, ids, extra):
            return self.out(torch.cat([self.e(ids), self.f(extra)], 1)).tanh().mean(1)

    model, ids = Two(), torch.arange(15).reshape(5, 3) % 9
    found = gs.gsc(model, {"ids": ids, "extra": torch.zeros(5, 0, dtype=torch.long)}, layers="e", probes="exact")
    one = lambda model, ids: model.out(model.e(ids)).tanh().mean(1)  # noqa: E731
    alone = gs.gsc(model, ids, layers="e", probes="exact", forward=one)
    assert found["e"].log10_value == pytest.approx(alone["e"].log10_value, abs=1e-9)
