"""Reference networks against their definitions, written out from the weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.models import MLP, AlexNetA, AlexNetB
from tests.helpers import noise, seeded


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


PHI = {
    "linear": lambda h: h,
    "relu": lambda h: h.clamp(min=0),
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    "elu": lambda h: torch.where(h > 0, h, h.exp() - 1),
    "selu": lambda h: 1.0507009873554805 * torch.where(h > 0, h, 1.6732632423543772 * (h.exp() - 1)),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "silu": lambda h: h / (1 + (-h).exp()),
    "tanh": torch.tanh,
    "sigmoid": lambda h: 1 / (1 + (-h).exp()),
}
NORM = {
    "none": lambda h: h,
    "batch": lambda h: (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt(),
    "layer": lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt(),
}


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("norm", NORM)
@pytest.mark.parametrize("residual", ["none", "identity"])
def test_mlp_by_hand(activation, norm, residual):
    model = MLP(depth=3, width=6, activation=activation, norm=norm, residual=residual, skip_weight=0.7, bias=True,
                in_features=5, out_features=2, generator=seeded()).double()  # fmt: skip
    x = noise(8, 5)
    h = x if residual == "none" else model.stem(x)
    for layer in model.layers:
        branch = PHI[activation](NORM[norm](h @ layer.linear.weight.T + layer.linear.bias))
        h = branch if residual == "none" else 0.7 * h + branch @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(model(x), h @ model.head.weight.T + model.head.bias, rtol=1e-11, atol=1e-12)


def test_mlp_sizes():
    assert num_parameters(MLP(depth=3, width=10)) == 300
    assert num_parameters(MLP(depth=3, width=10, in_features=7, out_features=2, bias=True)) == 70 + 200 + 20 + 30 + 2
    assert num_parameters(MLP(depth=3, width=10, residual="identity")) == 600
    assert num_parameters(MLP(depth=3, width=10, residual="identity", in_features=4)) == 640
    assert MLP(depth=2, width=4, in_features=12)(torch.randn(3, 2, 6)).shape == (3, 4)


def test_alexnet_sizes():
    convolutions = 3 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 128 * 128 * 9 + 128
    linear = 256 * 256 + 256 + 2560 + 10
    assert num_parameters(AlexNetA()) == convolutions + 8192 * 256 + 256 + linear
    assert num_parameters(AlexNetA(padding="valid")) == convolutions + 3200 * 256 + 256 + linear
    expected = 3 * 96 * 25 + 96 + 96 * 80 * 25 + 80 + 80 * 96 * 25 + 96 + 96 * 64 * 25 + 64 + 4096 * 256 + 256 + 2570
    assert num_parameters(AlexNetB()) == expected
    for model in (AlexNetA(), AlexNetA(padding="valid"), AlexNetB()):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_he_relu_network_keeps_the_mean_square():
    ratios = []
    for seed in range(30):
        model = MLP(depth=6, width=100, generator=seeded(seed)).double()
        x = noise(50, 100, seed=100 + seed)
        with torch.no_grad():
            ratios.append(float(model(x).square().mean() / x.square().mean()))
    # He: each layer's ReLU halves the mean square that its weights have doubled.
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios) / math.sqrt(30))


def test_a_looks_linear_network_is_linear():
    model = MLP(depth=6, width=8, init="looks_linear", in_features=5, out_features=3, generator=seeded()).double()
    x, y = noise(4, 5), noise(4, 5, seed=2)
    torch.testing.assert_close(model(2 * x - 3 * y), 2 * model(x) - 3 * model(y), atol=1e-12, rtol=0)
    ordinary = MLP(depth=6, width=8, in_features=5, out_features=3, generator=seeded()).double()
    assert not torch.allclose(ordinary(-x), -ordinary(x))


@pytest.mark.parametrize("build", [lambda g: MLP(depth=2, width=4, generator=g), lambda g: AlexNetA(generator=g)])
def test_weights_come_from_the_generator_and_nothing_else(build):
    before = torch.get_rng_state()
    a, b = build(seeded(3)), build(seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rellu"}, "activation must be one of .*got 'rellu'; did you mean 'relu'"),
        ({"norm": "bach"}, "norm must be one of none, batch, layer; got 'bach'; did you mean 'batch'"),
        ({"residual": "yes"}, "residual must be one of none, identity; got 'yes'"),
        ({"init": "kaiming"}, "init must be one of auto, he"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"init": "looks_linear", "norm": "batch"}, "looks_linear' needs activation='relu', norm='none'"),
        ({"init": "looks_linear", "width": 5}, "even width, got .*width=5"),
    ],
)
def test_bad_arguments_of_the_mlp(options, message):
    with pytest.raises(ValueError, match=message):
        MLP(**{"depth": 2, "width": 4, **options})


def test_bad_inputs_and_arguments():
    with pytest.raises(ValueError, match="takes 4 features a sample, got 5"):
        MLP(depth=2, width=4)(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"AlexNetA takes images of shape \(B, 3, 32, 32\), got \(2, 3, 28, 28\)"):
        AlexNetA()(torch.randn(2, 3, 28, 28))
    with pytest.raises(ValueError, match="padding must be 'same' or 'valid', got 'full'"):
        AlexNetA(padding="full")
    with pytest.raises(ValueError, match="init must be one of he, lecun, xavier, orthogonal; got 'looks_linear'"):
        AlexNetB(init="looks_linear")
