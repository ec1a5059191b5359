"""Constructs that break other tools, each measured as its plain equivalent or refused with the way out."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from tests.helpers import noise


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


class Checkpointed(Plain):
    reentrant = False

    def forward(self, x):
        return self.c(checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=self.reentrant))


class ByForward(Plain):
    def forward(self, x):
        return self.c(self.b.forward(torch.tanh(self.a(x))))


class Tapped(Plain):
    def forward(self, x):
        return self.c(self.b(gs.tap(torch.tanh(self.a(x)), "squashed")))


class Autocast(Plain):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().double()


X = noise(5, 4)


def like(plain, kind):
    model = kind().double()
    model.load_state_dict(plain.state_dict())
    return model


def exact(model, x=X, **options):
    profile = gs.gsc(model, x, probes="exact", **options)
    return dict(zip(profile.layers, profile.log10_values[:, 0], strict=True))


def assert_same(model, plain, layers=("input", "a", "b", "c")):
    found, expected = exact(model), exact(plain)
    for layer in layers:
        assert found[layer] == pytest.approx(expected[layer], rel=1e-12, abs=1e-14), layer


def test_checkpointing_that_is_not_reentrant(plain):
    assert_same(like(plain, Checkpointed), plain)


def test_reentrant_checkpointing_is_refused(plain):
    model = like(plain, Checkpointed)
    model.reentrant = True
    with pytest.raises(ValueError, match=r"reentrant checkpointing.*use_reentrant=False"):
        gs.gsc(model, X)


def test_a_module_called_by_forward_is_reported(plain):
    model = like(plain, ByForward)
    assert_same(model, plain, ("input", "a", "c"))
    assert "so not recorded: b." in str(gs.capture(model, X).describe())


def test_tapped_tensor_is_a_row(plain):
    assert list(exact(like(plain, Tapped))) == ["input", "a", "squashed", "b", "c"]


@pytest.mark.filterwarnings("ignore")  # of torch's own imports
@pytest.mark.parametrize("how", ["child", "in place", "function"])
def test_compiled_parts_run_eager(plain, how):
    model = copy.deepcopy(plain)
    if how == "child":
        model.b = torch.compile(model.b, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        squash = torch.compile(torch.tanh, backend="aot_eager")
        model.forward = lambda x: model.c(model.b(squash(model.a(x))))
    model(X)  # compiled before there are hooks
    assert_same(model, plain)


def test_data_parallel_wrappers_come_off(plain):
    assert exact(nn.DataParallel(plain)) == exact(plain)


def test_distributed_data_parallel_comes_off(plain, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert exact(nn.parallel.DistributedDataParallel(copy.deepcopy(plain))) == exact(plain)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_inside_and_outside(plain):
    model = like(plain, Autocast).float()
    inside = exact(model, X.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = exact(copy.deepcopy(plain).float(), X.float())
    assert inside == outside
    reference = exact(plain)
    for layer, value in inside.items():
        assert value == pytest.approx(reference[layer], abs=0.01)
    assert set(gs.capture(model, X.float()).describe().to_frame()["dtype"]) == {"float32", "bfloat16"}


def test_the_scale_of_a_gradient_scaler_cancels(plain):
    def losses(scale):
        return lambda output, labels: scale * nn.functional.cross_entropy(output, labels, reduction="none")

    labels = torch.arange(5) % 3
    one, scaled = (exact(plain, (X, labels), loss_fn=losses(scale)) for scale in (1.0, 2.0**16))
    assert one == pytest.approx(scaled, rel=1e-12)


def test_copies_and_pickles_after_a_capture(plain):
    captured = gs.capture(plain, X)
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert exact(other) == exact(plain)
        assert not other.a._forward_hooks and not other.a._forward_pre_hooks
    assert captured.layers


def test_an_exception_in_the_middle_leaves_no_hook(plain):
    plain.c = nn.Linear(5, 3).double()  # does not fit
    with pytest.raises(RuntimeError) as raised:
        gs.gsc(plain, X)
    assert any("Raised inside layer 'c'" in note for note in raised.value.__notes__)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_multihead_attention_from_outside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Attention(), nn.Linear(4, 2)).double()
    x = noise(2, 3, 4)
    above = lambda h: model[2](model[1](h))  # noqa: E731
    h, y = model[0](x).detach(), model(x).detach()
    jacobian = torch.autograd.functional.jacobian(above, h).reshape(12, 24)
    expected = np.log10(float(jacobian.square().sum() / 24 * h.square().sum() / y.square().sum()))
    assert exact(model, x)["0"] == pytest.approx(expected, rel=1e-10)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]
