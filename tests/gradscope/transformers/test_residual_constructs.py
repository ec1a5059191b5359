"""The residual ledger against NumPy on logged tensors, and its gradients against backward passes by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from tests.helpers import noise

LOG = []  # x, the skip of x (its gradient), and copies of skip operand, write and sum, of every residual addition


def logged(x, skip, write, total, *, values=None):
    LOG.append((x, skip, write, total, *(t.detach().clone() for t in values or (skip, write, total))))
    return total


class Branch(nn.Sequential):
    """A small nonlinear branch with a normalization, on the last dimension."""

    def __init__(self, width=4):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


class Mix(nn.Module):
    """Attention without weights: positions influence each other."""

    def __init__(self, width=4):
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, h):
        return self.out(functional.scaled_dot_product_attention(h, h, h))


class Net(nn.Module):
    """Two blocks of two branches and a head; a subclass says how a block adds its branches to the stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attn, self.mlp = nn.ModuleList([Mix(), Mix()]), nn.ModuleList([Branch(), Branch()])
        self.norm, self.drop = nn.LayerNorm(4), nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        x = self.embed(x)
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = self.block(x, attn, mlp)
        return self.head(x.mean(1))


def plain(x, f):
    return logged(x, x, f, x + f)


class PreNorm(Net):
    def block(self, x, attn, mlp):
        x = plain(x, attn(self.norm(x)))
        return plain(x, mlp(x))


class PostNorm(Net):
    def block(self, x, attn, mlp):
        x = self.norm(plain(x, attn(x)))
        return self.norm(plain(x, mlp(x)))


class ScaledWrite(Net):
    def block(self, x, attn, mlp):
        f = attn(x)
        x = logged(x, x, 0.5 * f, torch.add(x, f, alpha=0.5))
        f = self.scale * mlp(x)
        return logged(x, x, f, f + x)


class ScaledSkip(Net):
    def block(self, x, attn, mlp):
        y = 0.25 * x
        f = attn(x)
        x = logged(x, y, f, y + f)
        f = mlp(x)
        return logged(x, self.scale * x, f, x.mul(self.scale).add_(f))


class AlphaSkip(Net):
    def block(self, x, attn, mlp):
        f = attn(x)
        x = logged(x, 0.5 * x, f, torch.add(f, x, alpha=0.5))
        return plain(x, mlp(x))


class Parallel(Net):
    def block(self, x, attn, mlp):
        h = self.norm(x)
        f, g = attn(h), mlp(h)
        y = plain(x, f)
        return logged(x, x, g, y + g, values=(y, g, y + g))


class TogetherFirst(Net):
    """As GPT-NeoX: one residual addition, whose write is a sum."""

    def block(self, x, attn, mlp):
        h = self.norm(x)
        f = attn(h) + mlp(h)
        return logged(x, x, f, f + x)


class WithDropout(Net):
    def block(self, x, attn, mlp):
        x = plain(x, self.drop(attn(x)))
        return plain(x, functional.dropout(mlp(x), 0.2))


class Checkpointed(PreNorm):
    def block(self, x, attn, mlp):
        return checkpoint(super().block, x, attn, mlp, use_reentrant=False)


class Reshaped(Net):
    """The skip operand is a view and a cast of x."""

    def block(self, x, attn, mlp):
        y = x.reshape(-1, 4).view(x.shape).to(torch.float64).contiguous()
        f = attn(x)
        x = logged(x, y, f, y + f)
        return plain(x, mlp(x))


class Basic(nn.Module):
    """As in torchvision: the sum overwrites the branch, and the activation overwrites the sum."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, stride, 1), nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.bn, self.relu = nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))

    def forward(self, x):
        out = self.bn(self.conv2(self.relu(self.conv1(x))))
        identity = x if self.downsample is None else self.downsample(x)
        write, value = get_gradient_edge(out), out.detach().clone()
        out += identity
        logged(x, identity, write, get_gradient_edge(out), values=(identity, value, out))
        return self.relu(out)


class Images(nn.Sequential):
    def __init__(self):
        super().__init__(Basic(2, 2, 1), Basic(2, 4, 2), nn.Flatten(), nn.Linear(16, 2))


class UNet(nn.Module):
    """A long concatenation leads from the stream before the inner block to the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.outer, self.inner = nn.Linear(3, 4), Branch(), Branch()
        self.merge, self.last, self.head = nn.Linear(8, 4), Branch(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = plain(x, self.outer(x))
        y = plain(x, self.inner(x))
        y = self.merge(torch.cat([x, y], -1))
        y = plain(y, self.last(y))
        return self.head(y.mean(1))


CASES = {
    PreNorm: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    PostNorm: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    ScaledWrite: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    ScaledSkip: ("scaled", "attn.0 mlp.0 attn.1 mlp.1"),
    AlphaSkip: ("scaled identity scaled identity", "attn.0 mlp.0 attn.1 mlp.1"),
    Parallel: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    TogetherFirst: ("identity", "attn.0+mlp.0 attn.1+mlp.1"),
    WithDropout: ("identity", "drop mlp.0 drop#2 mlp.1"),
    Checkpointed: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    Reshaped: ("identity", "attn.0 mlp.0 attn.1 mlp.1"),
    Images: ("identity projection", "0.bn 1.bn"),
    UNet: ("identity", "outer inner last"),
}


def built(kind):
    torch.manual_seed(0)
    return kind().double(), noise(3, 2, 4, 4) if kind is Images else noise(3, 5, 3)


def run(model, x):
    """The output of a pass by hand, and what it logged."""
    LOG.clear()
    torch.manual_seed(1)
    output = model(x.clone().requires_grad_())
    return output, list(LOG)


def measured(model, x, **options):
    torch.manual_seed(1)  # the same dropout masks
    return gs.residual(model, x, **options)


def numbers(skip, write, total):
    """All quantities of the stream, by NumPy, for samples along the first dimension."""
    x, f, s = (np.asarray(t.detach().double()).reshape(len(t), -1) for t in (skip, write, total))
    rms = np.sqrt((s**2).mean(1))
    deviations = s - s.mean(1, keepdims=True)
    largest = np.abs(s).max(1) / rms
    return {
        "stream_rms": np.sqrt((x**2).mean()),
        "write_rms": np.sqrt((f**2).mean()),
        "sum_rms": np.sqrt((s**2).mean()),
        "write_ratio": np.linalg.norm(f) / np.linalg.norm(x),
        "write_cosine": (x * f).sum() / np.linalg.norm(x) / np.linalg.norm(f),
        "sum_largest": largest.mean(),
        "sum_p99": (np.percentile(np.abs(s), 99, axis=1) / rms).mean(),
        "sum_kurtosis": ((deviations**4).mean(1) / (deviations**2).mean(1) ** 2).mean(),
    }


def channel(total, dim):
    s = np.asarray(total.detach().double())
    rms = np.sqrt((s.reshape(len(s), -1) ** 2).mean(1))
    return np.unravel_index(np.argmax(np.abs(s) / rms.reshape(-1, *[1] * (s.ndim - 1))), s.shape)[dim]


def shares(output, entry, cotangents):
    """|S|^2, |W|^2 and 2 <S, W> over their sum, by backward passes along each of the two ways."""
    x, skip, write, total, *_ = entry
    parts = np.zeros(3)
    for v in cotangents:
        (out,) = torch.autograd.grad(output, total, v, retain_graph=True)
        s, w = (torch.autograd.grad(way, x, out, retain_graph=True)[0] for way in (skip, write))
        parts += [float((s * s).sum()), float((w * w).sum()), float(2 * (s * w).sum())]
    return parts / parts.sum()


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_every_construct_against_numpy_and_autograd(kind):
    model, x = built(kind)
    output, entries = run(model, x)
    found = measured(model, x, probes="exact")
    skips, writes = CASES[kind]
    assert [write.replace(" ", "") for write in found.writes] == writes.split()
    assert list(found.skips) == (skips.split() if " " in skips else [skips] * len(entries))
    basis = torch.eye(output.numel(), dtype=output.dtype).reshape(-1, *output.shape)
    for number, entry in enumerate(entries):
        for quantity, expected in numbers(*entry[4:]).items():
            assert found.estimates[quantity][number].value == pytest.approx(expected, rel=1e-12), quantity
        assert found.channels[number] == channel(entry[-1], 1 if kind is Images else -1)
        values = [found.estimates[f"{name}_share"][number].value for name in ("skip", "branch", "cross")]
        np.testing.assert_allclose(values, shares(output, entry, basis), rtol=1e-10, atol=1e-12)
        assert sum(values) == pytest.approx(1, abs=1e-12)
