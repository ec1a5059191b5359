"""The zoo: networks of every build against brute force, their rows, and that they are left as they were."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gradscope as gs
from tests.zoo import SINGLE, SMALL, TRANSFORMERS, Checkpointed, Pair, Specimen, noise

HAVE = "the extra 'zoo' is not installed (transformers==5.23.0)"
ALL = [*SMALL, *TRANSFORMERS, *SINGLE]


def build(name: str) -> Specimen:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers", reason=HAVE)
    return {**SMALL, **TRANSFORMERS, **SINGLE}[name]()


def first_tensor(output: Any) -> Tensor:
    leaves = pytree.tree_leaves(output.__dict__ if hasattr(output, "hidden") else output)
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())


def truth(specimen: Specimen, names: Collection[str]) -> dict[str, float]:
    """log10 GSC of the named layers to the output, from full-batch Jacobians.

    To every named tensor of one forward pass a zero is added; derivatives by those zeros, an entry of the output at a
    time, are the rows of the Jacobians.  The sum is a new tensor, so nothing that the model overwrites in place is it.
    """
    model, calls = copy.deepcopy(specimen.model), Counter()
    zeros: dict[str, Tensor] = {}
    squares: dict[str, float] = {}

    def add_zero(tensor: Tensor, label: str) -> Tensor:
        if label not in names:
            return tensor
        assert label not in zeros
        squares[label] = float(tensor.detach().square().sum())
        zeros[label] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + zeros[label]

    def add_zeros(structure: Any, label: str) -> Any:
        leaves, spec = pytree.tree_flatten(structure)
        number = 0
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point():
                leaves[i] = add_zero(leaf, f"{label}[{number}]" if number else label)
                number += 1
        return pytree.tree_unflatten(leaves, spec)

    def called(label: str) -> str:
        calls[label] += 1
        return f"{label}#{calls[label]}" if calls[label] > 1 else label

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda m, args, out, name=name: add_zeros(out, called(name)))
    floats = pytree.tree_map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, specimen.data)
    data = add_zeros(floats, "input")
    with mock.patch.object(gs, "tap", lambda tensor, name: add_zero(tensor, called(name))):
        if specimen.forward is not None:
            output = specimen.forward(model, data)
        else:
            output = first_tensor(model(**data) if isinstance(data, dict) else model(data))
    if "output" in names:
        output = add_zero(output, "output")
    assert zeros.keys() == set(names)
    sums = dict.fromkeys(zeros, 0.0)
    for entry in output.flatten():
        gradients = torch.autograd.grad(entry, list(zeros.values()), retain_graph=True)
        for label, gradient in zip(zeros, gradients, strict=True):
            sums[label] += float(gradient.double().square().sum())
    length = float(output.detach().double().square().sum())
    return {k: float(np.log10(sums[k] / zeros[k].numel() * squares[k] / length)) for k in zeros}


def profile(specimen: Specimen, **options: Any) -> gs.Profile:
    """A default profile; with fewer than three rows there must be a warning that offers layers=, else none."""
    short = pytest.warns(UserWarning, match=r"(?s)trunk.*layers=")
    with short if len(specimen.rows) < 3 else contextlib.nullcontext():
        return gs.gsc(specimen.model, specimen.data, forward=specimen.forward, **options)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_exact_profile_is_the_full_batch_jacobian(name, train):
    specimen = build(name)
    specimen.model.train(train)
    torch.manual_seed(7)  # one mask of dropout for both
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No layer but the target")  # asked for below
        measured = gs.gsc(specimen.model, specimen.data, forward=specimen.forward, probes="exact")
    torch.manual_seed(7)
    expected = truth(specimen, measured.layers)
    for row in measured.layers:
        assert 10 ** (measured[row].log10_value - expected[row]) == pytest.approx(1, rel=0, abs=specimen.rtol), row


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_default_profile_are_those_that_a_person_would_name(name):
    specimen = build(name)
    measured = profile(specimen)
    assert " ".join(measured.layers) == " ".join(specimen.rows)
    assert np.isfinite(measured.log10_values).all()
    assert measured.log10_values[-1, 0] == pytest.approx(0, abs=1e-9)


def state(specimen: Specimen) -> dict[str, Any]:
    """Everything about a model and its data that a measurement has no business to change."""
    model = specimen.model
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: (id(tensor), tensor.clone()) for name, tensor in model.named_buffers()},
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "gradients": {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modules": {
            name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
            for name, module in model.named_modules()
        },
        "random": torch.get_rng_state(),
        "data": [(t.clone(), t.requires_grad, t.grad) for t in pytree.tree_leaves(specimen.data)],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [*SMALL, *TRANSFORMERS])
def test_nothing_is_changed(name, train):
    specimen = build(name)
    specimen.model.train(train)
    some = next(specimen.model.parameters())
    some.grad = torch.ones_like(some)
    before = state(specimen)
    captured = gs.capture(specimen.model, specimen.data, forward=specimen.forward)
    assert captured.coupled in (True, False)
    gs.gsc(specimen.model, specimen.data, forward=specimen.forward, probes=2)
    torch.testing.assert_close(state(specimen), before, rtol=0, atol=0)
    # Also while the capture is alive.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(specimen.model)))
    torch.testing.assert_close(copied.state_dict(), specimen.model.state_dict(), rtol=0, atol=0)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "measure",
    [gs.capture, gs.gsc, lambda model, x: gs.gsc(model, x, probes=gs.Deflated(2, 2)), gs.measure],
    ids=["capture", "gsc", "deflated", "measure"],
)
def test_two_hundred_captures_leave_nothing_behind(measure):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, 64))
    x = torch.randn(256, 64)  # about 0.5 MiB of activations a capture

    def live_tensors() -> int:
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    for _ in range(5):
        measure(model, x)
    gc.collect()
    gc.disable()  # nothing may wait for the collector either
    try:
        tensors, memory = live_tensors(), resident_mib()
        for _ in range(200):
            measure(model, x)
        assert live_tensors() == tensors
        if Path("/proc/self/statm").exists():
            assert resident_mib() - memory < 16
    finally:
        gc.enable()


def test_samples_that_keep_apart_are_not_called_coupled():
    # An expert that happens to get as many tokens as there are samples has an output whose leading dimension is 2.
    specimen = build("mixture of experts, some without work")
    assert not gs.capture(specimen.model, specimen.data).coupled


def test_samples_coupled_where_they_are_not_the_leading_dimension():
    specimen = build("coupled below, time first")
    assert gs.capture(specimen.model, specimen.data).coupled


@pytest.mark.parametrize("name", ["nn.TransformerEncoder, norm first", "LSTM", "post-activation ResNet", "Llama"])
def test_a_matrix_has_the_profile_as_its_last_column(name):
    specimen = build(name)
    exact = gs.gsc(specimen.model, specimen.data, probes="exact").log10_values[:, 0]
    matrix = gs.gsc_matrix(specimen.model, specimen.data, probes="exact")
    np.testing.assert_allclose(matrix.log10_values[:, -1], exact, atol=1e-12)


def test_data_parallel_is_measured_through_its_module():
    model, x = Pair().double(), noise(3, 4)
    wrapped, plain = gs.gsc(nn.DataParallel(model), x), gs.gsc(model, x)
    assert wrapped.layers == plain.layers
    np.testing.assert_array_equal(wrapped.log10_values, plain.log10_values)


@pytest.mark.parametrize("how", ["part", "part, called before", "in place", "in place, called before"])
def test_a_compiled_part_of_a_model(how):
    torch.manual_seed(0)
    first, block, last = nn.Linear(4, 4), Pair(), nn.Linear(2, 2)
    x = noise(3, 4)
    plain = nn.Sequential(first, block, last).double()
    expected = gs.gsc(plain, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        torch._dynamo.reset()
        if how.startswith("part"):
            model = nn.Sequential(first, torch.compile(block, backend="eager"), last)
        else:
            model = plain
            model.compile(backend="eager")
        if how.endswith("before"):
            model(x)
        measured = gs.gsc(model, x)
        again = model(x)
    np.testing.assert_allclose(measured.log10_values[:, 0], expected.log10_values[:, 0], atol=1e-12)
    torch.testing.assert_close(again, last(block(first(x))))


def test_reentrant_checkpoints_are_refused_with_the_way_out():
    with pytest.raises((RuntimeError, ValueError), match="use_reentrant=False"):
        gs.gsc(Checkpointed(use_reentrant=True).double(), noise(3, 4))


@pytest.mark.parametrize("around", ["the call", "forward"])
def test_autocast_is_right_within_its_rounding(around):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.Linear(16, 8)), torch.randn(6, 16)
    exact = gs.gsc(model, x, probes="exact").log10_values[:, 0]
    if around == "the call":
        with torch.autocast("cpu", torch.bfloat16):
            rounded = gs.gsc(model, x, probes="exact")
    else:
        forward = torch.autocast("cpu", torch.bfloat16)(lambda model, x: model(x))
        rounded = gs.gsc(model, x, probes="exact", forward=forward)
    assert len(rounded.layers) == 10
    # Nine roundings to 2^-8, on a squared quantity.
    np.testing.assert_allclose(rounded.log10_values[:, 0], exact, atol=9 * 2 * 2**-8 / np.log(10))


def test_an_interrupt_in_the_middle_leaves_the_model_clean():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        gs.gsc(model, torch.randn(3, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model[1].num_batches_tracked == 0


def test_an_embedding_that_renormalizes_its_rows_is_put_back():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    gs.gsc(model, torch.tensor([[1, 2], [3, 4]]))
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)
