"""The two CIFAR networks: counts by hand, shapes of every leaf, weights, and errors."""

import math
import re

import pytest
import torch
from torch import nn

from gradscope.models import AlexNetA, AlexNetB
from tests.helpers import seeded

A_SAME = {
    "conv1": (64, 32, 32), "relu1": (64, 32, 32), "conv2": (64, 32, 32), "relu2": (64, 32, 32), "pool1": (64, 16, 16),
    "conv3": (128, 16, 16), "relu3": (128, 16, 16), "conv4": (128, 16, 16), "relu4": (128, 16, 16),
    "pool2": (128, 8, 8), "flatten": (8192,), "fc1": (256,), "relu5": (256,), "dropout": (256,), "fc2": (256,),
    "relu6": (256,), "fc3": (10,),
}  # fmt: skip
A_VALID = A_SAME | {
    "conv1": (64, 30, 30), "relu1": (64, 30, 30), "conv2": (64, 28, 28), "relu2": (64, 28, 28), "pool1": (64, 14, 14),
    "conv3": (128, 12, 12), "relu3": (128, 12, 12), "conv4": (128, 10, 10), "relu4": (128, 10, 10),
    "pool2": (128, 5, 5), "flatten": (3200,),
}  # fmt: skip
B = {
    "conv1": (96, 32, 32), "relu1": (96, 32, 32), "pool1": (96, 16, 16), "conv2": (80, 16, 16), "relu2": (80, 16, 16),
    "pool2": (80, 8, 8), "conv3": (96, 8, 8), "relu3": (96, 8, 8), "conv4": (64, 8, 8), "relu4": (64, 8, 8),
    "flatten": (4096,), "fc1": (256,), "relu5": (256,), "fc2": (10,),
}  # fmt: skip

NETWORKS = [
    (AlexNetA, {}, A_SAME),
    (AlexNetA, {"padding": "valid"}, A_VALID),
    (AlexNetB, {}, B),
]


@pytest.mark.parametrize(("network", "options", "expected"), NETWORKS)
def test_order_and_shape_of_every_leaf(network, options, expected):
    model = network(generator=seeded(), **options)
    x = torch.randn(2, 3, 32, 32, generator=seeded(1))
    y, shapes = model(x), {}
    for name, layer in model.named_children():
        before = x.clone()
        after = layer(x)
        assert torch.equal(x, before), f"{name} works in place"
        x, shapes[name] = after, (*after.shape[1:],)
    assert list(shapes) == list(expected)
    assert shapes == expected
    assert y.shape == (2, 10)


def test_parameter_counts():
    a = (3 * 9 * 64 + 64) + (64 * 9 * 64 + 64) + (64 * 9 * 128 + 128) + (128 * 9 * 128 + 128)
    dense = (256 * 256 + 256) + (256 * 10 + 10)
    b = (3 * 25 * 96 + 96) + (96 * 25 * 80 + 80) + (80 * 25 * 96 + 96) + (96 * 25 * 64 + 64)

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(AlexNetA()) == a + (8192 * 256 + 256) + dense
    assert count(AlexNetA(padding="valid")) == a + (3200 * 256 + 256) + dense
    assert count(AlexNetB()) == b + (4096 * 256 + 256) + (256 * 10 + 10)
    assert count(AlexNetB(num_classes=7)) == b + (4096 * 256 + 256) + (256 * 7 + 7)


def test_padding_is_with_zeros():
    x = torch.randn(1, 3, 32, 32, generator=seeded(1), dtype=torch.float64)
    conv = AlexNetB(generator=seeded()).double().conv1
    corner = (conv.weight[:, :, 2:, 2:] * x[0, :, :3, :3]).sum((1, 2, 3))
    torch.testing.assert_close(conv(x)[0, :, 0, 0], corner, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("network", [AlexNetA, AlexNetB])
@pytest.mark.parametrize(("init", "numerator"), [("he", 2), ("lecun", 1)])
def test_weights_have_their_variance_and_biases_are_zero(network, init, numerator):
    for layer in network(init=init, generator=seeded()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            variance = numerator / layer.weight[0].numel()
            error = variance * math.sqrt(2 / layer.weight.numel())
            assert float(layer.weight.detach().var()) == pytest.approx(variance, abs=4.5 * error)
            assert not layer.bias.any()


def test_dropout_acts_in_training_only():
    x = torch.randn(4, 256, generator=seeded(1)).abs()
    model = AlexNetA(dropout=0.25, generator=seeded())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model.dropout(x)
    assert torch.allclose(y[y != 0], (x / 0.75)[y != 0])
    # 1024 draws: the dropped share has a standard error of 0.0135.
    assert float((y == 0).double().mean()) == pytest.approx(0.25, abs=4 * 0.0135)
    assert torch.equal(model.eval().dropout(x), x)


@pytest.mark.parametrize("network", [AlexNetA, AlexNetB])
def test_weights_come_from_the_generator_and_nothing_else(network):
    before = torch.get_rng_state()
    a, b, other = (network(generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("network", [AlexNetA, AlexNetB])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (3, 32, 32), (2, 1, 32, 32), (2, 3072)])
def test_images_of_the_wrong_shape(network, shape):
    with pytest.raises(ValueError, match=rf"{network.__name__} .*got {re.escape(str(shape))}"):
        network()(torch.zeros(shape))


@pytest.mark.parametrize("network", [AlexNetA, AlexNetB])
def test_bad_arguments(network):
    with pytest.raises(ValueError, match=r"init.*'looks_linear'"):
        network(init="looks_linear")
    with pytest.raises(ValueError, match=r"num_classes.*0"):
        network(num_classes=0)
    with pytest.raises(TypeError, match=r"num_classes.*2\.5"):
        network(num_classes=2.5)


def test_bad_arguments_of_a_alone():
    with pytest.raises(ValueError, match=r"padding.*'full'"):
        AlexNetA(padding="full")
    with pytest.raises(ValueError, match=r"dropout.*1\.5"):
        AlexNetA(dropout=1.5)
