"""Networks that use transforms of `torch.func` in their forward pass, against plain autograd."""

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap

import gradscope as gs
from tests.bruteforce import gsc_log10
from tests.helpers import noise


class Inside(nn.Module):
    """A small network that is called inside a transform, between two layers that are called as usual."""

    def __init__(self, transform):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.transform = transform
        self.double()

    def forward(self, x):
        return self.last(self.transform(lambda z: gs.tap(self.net(z), "inner").squeeze(-1), self.first(x)))


TRANSFORMS = {
    "vmap of jacrev": lambda f, h: vmap(jacrev(f))(h),
    "vmap of grad": lambda f, h: vmap(grad(f))(h),
    "vmap": lambda f, h: vmap(f)(h)[:, None] * h,
    "grad": lambda f, h: grad(lambda z: f(z).sum())(h),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_transform_inside_the_forward_pass(transform):
    model, x = Inside(transform), noise(3, 4)
    profile = gs.gsc(model, x, probes="exact")
    assert profile.layers == ("input", "first", "last")
    for name in ("input", "first"):
        assert profile[name].log10_value == pytest.approx(gsc_log10(model, name, x), abs=1e-9)
    assert "net.1" in gs.capture(model, x).uncalled
    assert gs.nlc(model, x).value > 0
    with pytest.raises(ValueError, match="No nonlinearity module was called"):
        gs.measure(model, x)
