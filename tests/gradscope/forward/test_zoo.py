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
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gradscope as gs
from tests.bruteforce import gsc_log10
from tests.zoo import SINGLE, SMALL, TRANSFORMERS, Packed, Specimen

HAVE = "the extra 'zoo' is not installed (transformers==5.23.0)"
ALL = [*SMALL, *TRANSFORMERS, *SINGLE]


def build(name: str) -> Specimen:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers", reason=HAVE)
    return {**SMALL, **TRANSFORMERS, **SINGLE}[name]()


def first_tensor(output: Any) -> Tensor:
    leaves = pytree.tree_leaves(output.__dict__ if isinstance(output, Packed) else output)
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
        squares[label] = float(tensor.detach().abs().square().sum())
        zeros[label] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + zeros[label]

    def add_zeros(structure: Any, label: str) -> Any:
        packed = isinstance(structure, Packed)
        leaves, spec = pytree.tree_flatten(vars(structure) if packed else structure)
        number = 0
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaves[i] = add_zero(leaf, f"{label}[{number}]" if number else label)
                number += 1
        rebuilt = pytree.tree_unflatten(leaves, spec)
        return replace(structure, **rebuilt) if packed else rebuilt

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
            sums[label] += float(gradient.abs().double().square().sum())
    length = float(output.detach().double().square().sum())

    def reals(zero: Tensor) -> int:
        return 2 * zero.numel() if zero.is_complex() else zero.numel()

    return {k: float(np.log10(sums[k] / reals(zeros[k]) * squares[k] / length)) for k in zeros}


def profile(specimen: Specimen, **options: Any) -> gs.Profile:
    """A default profile; with fewer than three rows there must be a warning that offers layers=, else none."""
    short = pytest.warns(UserWarning, match=r"(?s)trunk.*layers=")
    with short if len(specimen.rows) < 3 else contextlib.nullcontext():
        return gs.gsc(specimen.model, specimen.data, forward=specimen.forward, **options)


def test_the_truth_is_that_of_torch_autograd_functional():
    specimen = build("post-activation ResNet")
    specimen.model.train()
    expected = truth(specimen, ["input", "conv1", "layer2.0", "pool"])
    for name, value in expected.items():
        assert value == pytest.approx(gsc_log10(specimen.model, name, specimen.data), abs=1e-12)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_exact_profile_is_the_full_batch_jacobian(name, train):
    specimen = build(name)
    specimen.model.train(train)
    torch.manual_seed(7)  # one mask of dropout for both
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only . layers lie on the trunk")  # asked for below
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


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit by bit."""
    leaves, others = (pytree.tree_flatten(structure) for structure in (a, b))
    return leaves[1] == others[1] and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(leaves[0], others[0], strict=True)
    )


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
    after = state(specimen)
    assert not [what for what in before if not same(before[what], after[what])]
    # Also while the capture is alive.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(specimen.model)))
    assert same(dict(copied.state_dict()), dict(specimen.model.state_dict()))


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "measure",
    [gs.capture, gs.gsc, lambda model, x: gs.gsc(model, x, probes=gs.Deflated(2, 2)), gs.measure],
    ids=["capture", "gsc", "deflated", "measure"],
)
def test_a_hundred_captures_leave_nothing_behind(measure):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 16))
    x = torch.randn(1024, 16)  # about 0.25 MiB of activations a capture, 25 MiB in all

    def live_tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for _ in range(5):
        measure(model, x)
    gc.collect()
    gc.disable()  # nothing may wait for the collector either
    try:
        tensors, memory = live_tensors(), resident_mib()
        for _ in range(100):
            measure(model, x)
        assert live_tensors() == tensors
        if Path("/proc/self/statm").exists():
            assert resident_mib() - memory < 8
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
