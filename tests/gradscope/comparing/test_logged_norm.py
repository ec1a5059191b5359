"""`check_norm` recognizes wrong gradient norms, of one process and of two, and never gives a wrong name."""

import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise
from tests.processes import both, needs_gloo

X, Y = noise(8, 6), noise(8, 3, seed=2)
SCALE, MOST = 1024.0, 0.125


class Net(nn.Module):
    """Two layers that share a weight, and a head."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if tied:
            self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def scaler(scale=SCALE):
    """A scaler with its scale, as after the first backward pass."""
    made = torch.amp.GradScaler("cpu", init_scale=scale)
    made.scale(torch.ones(()))
    return made


def backward(model, own=slice(None), scale=1.0):
    (((model(X[own]) - Y[own]) ** 2).mean() * scale).backward()
    return model


def gradients(model):
    """The gradients of a model in one process, by name."""
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def norm(arrays):
    return math.sqrt(sum(np.square(array).sum() for array in arrays))


def whole(model):
    return norm(gradients(model).values())


def others(g):
    """Other norms of gradients, by what they are, computed by numpy."""
    flat, norms = np.concatenate([a.ravel() for a in g.values()]), [np.linalg.norm(a) for a in g.values()]
    return {
        "the square of the global norm": np.square(flat).sum(),
        "the largest entry": np.abs(flat).max(),
        "the sum of all absolute values": np.abs(flat).sum(),
        "the root mean square of all entries": np.sqrt(np.square(flat).mean()),
        "the largest norm of a parameter": max(norms),
        "the sum of the norms of the parameters": sum(norms),
        "the mean of the norms of the parameters": sum(norms) / len(norms),
        "the root mean square of the norms of the parameters": np.sqrt(np.square(norms).mean()),
        "the norm of matrices and larger tensors only": norm(a for a in g.values() if a.ndim == 2),
        "the norm of vectors and numbers only": norm(a for a in g.values() if a.ndim == 1),
        "the norm without 'head'": norm(a for name, a in g.items() if not name.startswith("head")),
        "the norm of 'first' only": norm(a for name, a in g.items() if name.startswith("first")),
    }


def test_the_norm_that_torch_returns_is_global():
    model = backward(Net())
    found = gs.check_norm(model, torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    assert (found.verdict, found.ratio) == ("global", pytest.approx(1, abs=1e-12))
    assert found.norm == pytest.approx(whole(model), rel=1e-12)  # an infinite bound clips nothing
    assert gs.check_norm(nn.DataParallel(model), torch.tensor([found.norm], dtype=torch.float32)).verdict == "global"


@pytest.mark.parametrize("text", others(gradients(backward(Net()))))
def test_other_norms_are_named(text):
    model = backward(Net())
    found = gs.check_norm(model, others(gradients(model))[text], max_norm=1e9)
    assert found.verdict == "another norm" and text in found.fits and "get_total_norm" in found.advice


def test_tied_parameters_counted_twice_and_frozen_ones_left_out():
    model = backward(Net(tied=True))
    g = gradients(model)
    assert len(g) == 5
    found = gs.check_norm(model, norm([*g.values(), g["first.weight"]]))
    assert (found.verdict, found.fits) == ("another norm", ("the norm with tied parameters counted twice",))
    model.head.weight.requires_grad_(False)
    found = gs.check_norm(model, norm(a for name, a in g.items() if name != "head.weight"))
    assert (found.verdict, found.fits) == ("another norm", ("the norm without frozen parameters",))


def test_a_clipped_norm():
    model = backward(Net())
    before = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    found = gs.check_norm(model, MOST, max_norm=MOST)
    assert before > MOST and found.verdict == "clipped" and "clip_grad_norm_ returns" in found.advice
    inactive = gs.check_norm(model, before, max_norm=2 * before)
    assert inactive.verdict == "undecided" and "that clipping changes" in inactive.advice and inactive.ratio == 1
    torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
    late = gs.check_norm(model, before, max_norm=MOST)
    assert late.verdict == "unknown" and "before clip_grad_norm_" in late.advice
    assert gs.check_norm(model, MOST, max_norm=MOST).verdict == "undecided"


def test_the_loss_scale():
    scaled, model = scaler(), backward(Net(), scale=SCALE)
    optimizer, true = torch.optim.SGD(model.parameters()), whole(model) / SCALE
    for unscaled in (False, True):
        assert gs.check_norm(model, true, scaler=scaled).verdict == "global"
        for wrong in (true * SCALE, true / SCALE):
            found = gs.check_norm(model, wrong, scaler=scaled)
            assert found.verdict == "loss scale" and "unscale_" in found.advice
            assert found.norm == pytest.approx(true, rel=1e-12)
        if not unscaled:
            scaled.unscale_(optimizer)
    same = gs.check_norm(model, true, scaler=scaler(1.0))
    assert same.verdict == "undecided" and "while the loss scale is not 1" in same.advice
    assert gs.check_norm(model, true, scaler=torch.amp.GradScaler("cpu", enabled=False)).verdict == "global"


def test_what_nothing_explains():
    model = backward(Net())
    found = gs.check_norm(model, 0.777 * whole(model))
    assert (found.verdict, found.fits) == ("unknown", ()) and "Give max_norm= and scaler=" in found.advice
    assert gs.check_norm(model, 1.01 * whole(model)).verdict == "unknown"
    assert gs.check_norm(model, 1.01 * whole(model), rtol=0.02).verdict == "global"


@pytest.mark.parametrize("logged", [0.23, 0.225, 0.004321, 1.2, 12.35, 123.46, 4e-05, 4.3e-05])
@pytest.mark.parametrize("error", [-0.49, 0.49])
def test_a_rounded_number_is_recognized_with_the_tolerance_of_the_hint(logged, error):
    """The true norm is nearly half a unit of the last digit away from the logged number."""
    unit = 10.0 ** Decimal(repr(logged)).as_tuple().exponent
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.grad = torch.full((1, 1), logged + error * unit, dtype=torch.float64)
    found = gs.check_norm(model, logged)
    hint = re.match(r"If (\S+) is a rounded number, give rtol=(\S+)\. Give max_norm= and scaler= ", found.advice)
    assert found.verdict == "unknown" and float(hint[1]) == logged and float(hint[2]) * logged <= unit
    assert gs.check_norm(model, logged, rtol=float(hint[2])).verdict == "global"
    assert gs.check_norm(model, 1.5 * logged, rtol=float(hint[2])).verdict == "unknown"


@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-6), (torch.bfloat16, 7e-3)])
def test_the_tolerance_is_the_rounding_of_the_gradient(dtype, error):
    model = backward(Net()).to(dtype)
    for p in model.parameters():
        p.grad = p.grad.to(dtype)
    true = norm(p.grad.double().numpy() for p in model.parameters())
    assert gs.check_norm(model, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])).verdict == "global"
    assert gs.check_norm(model, true * (1 + error)).verdict == "global"
    assert gs.check_norm(model, true * (1 + 3 * error)).verdict == "unknown"


def test_random_numbers_get_no_name():
    model = backward(Net())
    numbers = noise(1000, seed=5).abs() * whole(model)
    assert [gs.check_norm(model, number).verdict for number in numbers].count("unknown") >= 995


def test_sparse_gradients_and_parameters_without_one():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).double()
    model[0](torch.tensor([1, 1, 4])).square().sum().backward()
    true = np.linalg.norm(model[0].weight.grad.to_dense())
    assert gs.check_norm(model, true).norm == pytest.approx(true, rel=1e-12)


def test_bad_input():
    model = Net()
    with pytest.raises(ValueError, match=r"No parameter has a gradient: call check_norm after backward\(\)"):
        gs.check_norm(model, 1.0)
    backward(model)
    with pytest.raises(ValueError, match="logged is None in every process"):
        gs.check_norm(model, None)
    for wrong in (-1.0, math.nan, math.inf, "much", "0.5", torch.ones(2), 10**400):
        with pytest.raises(ValueError, match="logged must be the norm that this process logged, a finite number >= 0"):
            gs.check_norm(model, wrong)
    with pytest.raises(ValueError, match="max_norm must be a finite number > 0"):
        gs.check_norm(model, 1.0, max_norm=0.0)
    with pytest.raises(ValueError, match=r"scaler must be a torch\.GradScaler or None, got 1024\.0"):
        gs.check_norm(model, 1.0, scaler=SCALE)
    model.second.bias.grad[1] = math.nan
    with pytest.raises(ValueError, match=r"gradient of 'second.bias' holds NaN or Inf.*first_nonfinite"):
        gs.check_norm(model, 1.0)


@needs_gloo
def test_one_process_of_a_group_decides_nothing_about_several(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = backward(Net())
        found = gs.check_norm(model, whole(model))
    finally:
        torch.distributed.destroy_process_group()
    assert found.verdict == "undecided" and found.ratio == pytest.approx(1)
    assert found.advice == "Check again with at least two processes."


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    for part in model.children():
        fully_shard(part)
    return fully_shard(model)


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}  # each process holds all of the head
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def alone(model):
    """Each process differentiates its own samples, and no gradient is averaged."""
    return model


# How a model is wrapped, and whether each process differentiates all samples.
WRAPPERS = {
    "fsdp": (fsdp, False), "tensor parallel": (tensor_parallel, True),
    "ddp": (nn.parallel.DistributedDataParallel, False), "not averaged": (alone, False),
}  # fmt: skip


def local_norm(model):
    """The norm that a process computes from what it holds."""
    parts = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]
    return norm(part.numpy() for part in parts)


def two_processes():
    """By wrapper, the check of each logged number; its key begins with the verdict that is right."""
    rank, found = torch.distributed.get_rank(), {}
    for name, (wrap, everything) in WRAPPERS.items():
        own = slice(None) if everything else slice(rank, None, 2)
        model, true, parts = backward(wrap(Net()), own), whole(backward(Net())), [0.0, 0.0]
        torch.distributed.all_gather_object(parts, local_norm(model))
        logs = {
            "global": true,
            "local": parts[rank],
            "local, of the first process": parts[0],
            "local, only one process logs": None if rank else parts[0],
            "times world size": 2 * true,
            "times world size, divided": true / 2,
            "times root of world size": math.sqrt(2) * true,
            "times root of world size, divided": true / math.sqrt(2),
            "clipped": MOST,
            "another norm": true**2,
            "another norm, replicas counted twice": math.hypot(*parts),
            "another norm, mean of processes": sum(parts) / 2,
            "unknown": 0.777 * true,
            "unknown, one process is wrong": true if rank else 0.777 * true,
        }
        checks = {text: gs.check_norm(model, logged, max_norm=MOST) for text, logged in logs.items()}
        for scale, text, factor in ((SCALE, "loss scale", SCALE), (2.0, "undecided", 2.0)):
            scaled = backward(wrap(Net()), own, scale)
            checks[text] = gs.check_norm(scaled, factor * true, scaler=scaler(scale))
        found[name] = true, checks
    return found


def different_replicas():
    model = backward(Net())
    with torch.no_grad():
        model.head.bias += torch.distributed.get_rank()
    try:
        gs.check_norm(model, 1.0)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return both(__file__, "two_processes", "different_replicas", folder=tmp_path_factory.mktemp("both"))


# Where a wrong norm of one process is no wrong norm, or another one.
EXCEPTIONS = {
    ("ddp", "local"): "global",
    ("ddp", "another norm, replicas counted twice"): "times root of world size",
    ("ddp", "another norm, mean of processes"): "global",
    ("fsdp", "another norm, replicas counted twice"): "global",
}


@needs_gloo
@pytest.mark.parametrize("name", WRAPPERS)
def test_six_wrong_norms_of_two_processes_are_recognized(found, name):
    first, second = (checks for _, checks in (one[name] for one in found["two_processes"]))
    assert {text: check.verdict for text, check in first.items()} == {text: c.verdict for text, c in second.items()}
    for text, check in first.items():
        right = EXCEPTIONS.get((name, text)) or EXCEPTIONS.get((name, text.split(",")[0])) or text.split(",")[0]
        assert check.verdict == right, (text, str(check))


@needs_gloo
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_global_norm_of_two_processes_is_that_of_one(found, name):
    for true, checks in (one[name] for one in found["two_processes"]):
        assert [check.norm for check in checks.values()] == pytest.approx([true] * len(checks), rel=1e-12)


@needs_gloo
def test_different_replicas_are_refused(found):
    for said in found["different_replicas"]:
        assert "Parameter 'head.bias' is not the same in all processes" in said
