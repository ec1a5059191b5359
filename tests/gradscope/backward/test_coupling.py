"""Independence of samples: proved only where it is true, and known in every case."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.backward.coupling import detected, separate, splits
from gradscope.models.alexnet import AlexNetA
from tests.helpers import noise

MASK = torch.tensor([False, True])
TOKENS = nn.Linear(2, 2).double()


class ReluBackward0(torch.autograd.Function):
    """Swaps samples, under a name like that of one of torch's own nodes."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(0)


class Function(nn.Module):
    def __init__(self, function, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(width, width, dtype=torch.float64) for _ in range(2))
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def attention(h):
    """Attention over tokens: (B, T, C) -> (B, T, C)."""
    return torch.softmax(h @ h.mT, dim=-1) @ h


def outer(h):
    """Products of all pairs of features, (B, N) -> (B, N, N)."""
    return h.unsqueeze(-1) * h.unsqueeze(1)


COUPLED = {
    "batch norm": lambda h: functional.batch_norm(h, None, None, training=True),
    "minus the mean": lambda h: h - h.mean(0),
    "mean, kept": lambda h: h - h.mean(0, keepdim=True),
    "transposed": lambda h: h.T,
    "product of the transposed": lambda h: h @ (h.T @ h),
    "view that mixes": lambda h: h.T.reshape(6, 6),
    "cumulative sum": lambda h: h.cumsum(0),
    "attention over the batch": lambda h: torch.softmax(h @ h.T, dim=1) @ h,
    "softmax over the batch": lambda h: torch.softmax(h, dim=0),
    "layer norm over everything": lambda h: functional.layer_norm(h, h.shape),
    "broadcast sample": lambda h: h + h[0],
    "scaled by the batch": lambda h: h * h.norm(),
    "rolled": lambda h: h.roll(1, 0),
    "sorted": lambda h: h.sort(dim=0).values,
    "swapped by a user's function": lambda h: ReluBackward0.apply(h),
    "weights made of the data": lambda h: functional.linear(h, h),
    "both factors": lambda h: h @ h,
    "a sample's number for a feature of all": lambda h: h * functional.linear(h, torch.ones(1, 6).double()).view(6),
    "pooled over the batch": lambda h: h + functional.max_pool1d(h.T[None], 2).mean(),
    "samples moved by padding": lambda h: functional.pad(h, (0, 0, 1, -1)),
    "sum over samples": lambda h: h.sum(0),
    "mean over samples": lambda h: h.mean(-2),
    "expanded in front": lambda h: h.expand(6, 6, 6).mean(1),
    "unsqueezed in front": lambda h: h.unsqueeze(0).expand(6, 6, 6).mean(1),
    "samples permuted": lambda h: h.view(6, 2, 3).permute(-2, 0, 2).reshape(6, 6),
    "one sample for all": lambda h: h + h.select(-2, 1),
    "one of as many samples as features": lambda h: outer(h).select(0, 1),
    "one of a list of samples": lambda h: outer(h).unbind(-3)[1],
    "samples exchanged with features": lambda h: outer(h).transpose(-3, 1).sum(-1),
    "copies stacked": lambda h: torch.stack(6 * [h]).sum(1),
    "copies joined": lambda h: torch.cat([h, h]).view(6, 12)[:, :6],
    "softmax over samples": lambda h: h.view(6, 2, 3).softmax(-3).view(6, 6),
    "samples joined": lambda h: torch.cat([h[3:], h[:3]]),
    "samples stacked": lambda h: torch.stack(h.unbind(0)[::-1]),
    "samples split": lambda h: torch.cat(h.split(3)[::-1]),
    "attention with the batch second": lambda h: (
        attention(h.view(6, 2, 3).transpose(0, 1)).transpose(0, 1).reshape(6, 6)
    ),
    "fused attention over the batch": lambda h: (
        functional.scaled_dot_product_attention(*3 * [h.view(6, 2, 1, 3).transpose(0, 2)]).transpose(0, 2).reshape(6, 6)
    ),
    "rows of two samples": lambda h: h.view(36).view(4, 9).softmax(1).view(6, 6),
    "masked in front": lambda h: h + h.masked_fill(h > 0, 0.0).cumsum(-2),
}
KEPT_APART = {
    "part of the features": lambda h: h + h[:, :1],
    "padded features": lambda h: functional.pad(h, (1, -1)),
    "minus the mean of features": lambda h: h - h.mean(-1, keepdim=True),
    "sums of features": lambda h: h + h.view(6, 2, 3).sum(-1)[:, 1:],
    "sums of all features": lambda h: h + h.view(6, 2, 3).sum((1, -1), keepdim=True).view(6, 1),
    "attention": lambda h: attention(h.view(6, 2, 3)).reshape(6, 6),
    "attention of linear maps of tokens": lambda h: attention(TOKENS(h.view(6, 3, 2))).flatten(1),
    "fused attention": lambda h: (
        functional.scaled_dot_product_attention(
            *h.view(6, 3, 1, 2).transpose(1, 2).repeat_interleave(2, 3).chunk(2, -1), h.view(6, 1, 3, 2), is_causal=True
        )
        .transpose(1, 2)
        .reshape(6, 6)
    ),
    "rms norm of tokens": lambda h: functional.rms_norm(h.view(6, 2, 3), (3,)).flatten(-2),
    "one feature and one token": lambda h: torch.cat(2 * [h.view(6, 2, 3)[:, 1]], 1) * h.select(-1, 0).unsqueeze(-1),
    "features apart and joined": lambda h: torch.cat([*h.split([2, 4], -1), h.unbind(1)[0].unsqueeze(1)], 1)[:, 1:],
    "features stacked": lambda h: torch.stack(h.chunk(2, 1), -1).flatten(1),
    "features permuted and masked": lambda h: h.view(6, 2, 3).permute(0, -1, 1).masked_fill(MASK, 0.0).reshape(6, 6),
    "softmax of features": lambda h: h.view(6, 1, 6).log_softmax(-1).squeeze(1),
}
APART = {
    "nothing": lambda h: h,
    "activation": lambda h: functional.gelu(h),
    "layer norm": lambda h: functional.layer_norm(h, (6,)),
    "fixed batch norm": lambda h: functional.batch_norm(
        h, torch.zeros(6).double(), torch.ones(6).double(), training=False
    ),
    "residual": lambda h: h + h.tanh() * 2,
    "dropout": lambda h: functional.dropout(h, 0.5),
    "images": lambda h: functional.avg_pool2d(h.view(6, 1, 2, 3), (2, 1)).repeat_interleave(2, 2).view(6, 6),
    "a gate of each sample": lambda h: h * h.sigmoid().mean(1, keepdim=True),
    **KEPT_APART,
}


def truth(model, x):
    J = torch.autograd.functional.jacobian(model, x)
    B = len(x)
    return any(bool(J[i][..., j, :].any()) for i in range(B) for j in range(B) if i != j)


@pytest.mark.parametrize("function", COUPLED.values(), ids=COUPLED.keys())
def test_coupled(function):
    # As many samples as features: shapes alone prove nothing.
    model, x = Function(function), noise(6, 6)
    assert truth(model, x)
    captured = gs.capture(model, x)
    assert not separate(captured.graph, 6)
    assert captured.coupled


@pytest.mark.parametrize("function", APART.values(), ids=APART.keys())
def test_apart(function):
    model, x = Function(function), noise(6, 6)
    assert not truth(model, x)
    assert not gs.capture(model, x).coupled


PROVED = {
    "perceptron": gs.models.MLP(depth=3, width=6, norm="layer").double(),
    "residual": gs.models.MLP(depth=3, width=6, residual="identity").double(),
    "fixed batch norm": gs.models.MLP(depth=3, width=6, norm="batch").double().eval(),
    **{name: Function(function) for name, function in KEPT_APART.items()},
}


@pytest.mark.parametrize("model", PROVED.values(), ids=PROVED.keys())
def test_proved_without_a_backward_pass(model):
    assert separate(gs.capture(model, noise(6, 6)).graph, 6)


def test_a_convolutional_network_is_proved():
    for model in (AlexNetA().eval(), gs.models.ResNet(depth=8, width=4).eval()):
        assert separate(gs.capture(model, torch.zeros(2, 3, 32, 32) + 0.1).graph, 2)


def test_transformers_are_proved():
    tokens = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"norm_kind": "rms", "mlp": "swiglu", "qk_norm": True}, {"norm": "post", "bias": True}):
        model = gs.models.GPT(depth=2, width=8, heads=2, length=8, **options)
        assert separate(gs.capture(model, tokens).graph, 4)


def test_coupling_inside_a_branch():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6, dtype=torch.float64), nn.BatchNorm1d(6, dtype=torch.float64)

        def forward(self, x):
            return x + self.norm(self.linear(x))

    assert gs.capture(Branch(), noise(5, 6)).coupled


class OneEdge(nn.Module):
    """Sample ``to`` receives a part of sample ``source``, and nothing else connects samples."""

    def __init__(self, source, to):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        self.source, self.to = source, to

    def forward(self, x):
        h = torch.tanh(self.first(x))
        passed = torch.zeros_like(h).index_copy(0, torch.tensor([self.to]), h[[self.source]])
        return self.last(h + 0.5 * passed)


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_every_single_coupling_is_found(batch_size):
    x = noise(batch_size, 3)
    for source, to in permutations(range(batch_size), 2):
        assert gs.capture(OneEdge(source, to), x).coupled, (source, to)


class Mixed(nn.Module):
    """Each sample receives the sum of all samples, weighted by a row of ``mix``."""

    def __init__(self, batch_size):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
        self.mix = torch.eye(batch_size, dtype=torch.float64)

    def forward(self, x):
        return self.last(self.mix @ self.first(x))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 33, 64])
def test_every_ordered_pair_of_a_large_batch_is_found(batch_size):
    model = Mixed(batch_size)
    captured = gs.capture(model, noise(batch_size, 2))
    rows = [layer for layer in captured.reached if layer.index != captured.target.index]
    assert not detected(captured.graph, rows, captured.target, batch_size)
    for source, to in permutations(range(batch_size), 2):
        model.mix.data[to, source] = 0.5  # the recorded graph keeps this tensor
        assert detected(captured.graph, rows, captured.target, batch_size), (source, to)
        model.mix.data[to, source] = 0.0


def test_a_single_coupling_counts_in_the_coefficient():
    model, x = OneEdge(1, 4), noise(6, 3)
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(12, 18)
    truth = jacobian.square().sum() / 18 * x.square().sum() / model(x).square().sum()
    profile = gs.gsc(model, x, probes="exact")
    assert profile.coupled and profile["input"].log10_value == pytest.approx(truth.log10().item(), abs=1e-12)


@pytest.mark.parametrize("batch_size", range(2, 65))
def test_splits_separate_every_ordered_pair(batch_size):
    inside = splits(batch_size)
    separated = (inside[:, :, None] & ~inside[:, None, :]).any(axis=0)
    assert (separated | np.eye(batch_size, dtype=bool)).all()
    assert len(inside) <= 12
