"""Initial weights: moments, orthogonality, and a network that is linear on purpose."""

import math

import pytest
import torch

from gradscope import initializers
from tests.helpers import seeded


@pytest.mark.parametrize(("name", "variance"), [("he", 2 / 300), ("lecun", 1 / 300), ("xavier", 2 / (300 + 200))])
def test_variance_of_gaussian_weights(name, variance):
    weight = torch.empty(200, 300)
    initializers.BY_NAME[name](weight, generator=seeded())
    error = variance * math.sqrt(2 / weight.numel())
    assert float(weight.var()) == pytest.approx(variance, abs=4 * error)
    assert abs(float(weight.mean())) < 4 * math.sqrt(variance / weight.numel())


def test_fans_of_a_convolution():
    weight = torch.empty(64, 32, 3, 3)
    initializers.he(weight, generator=seeded())
    variance = 2 / (32 * 9)
    assert float(weight.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / weight.numel()))
    initializers.xavier(weight, generator=seeded())
    assert float(weight.var()) == pytest.approx(2 / (96 * 9), rel=0.05)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (4, 2, 3, 3)])
def test_orthogonal_rows_or_columns(shape):
    weight = torch.empty(shape, dtype=torch.float64)
    initializers.orthogonal(weight, gain=2.0, generator=seeded())
    W = weight.reshape(shape[0], -1)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    torch.testing.assert_close(gram, 4 * torch.eye(len(gram), dtype=torch.float64), atol=1e-12, rtol=0)


def test_looks_linear_blocks():
    W = torch.empty(6, 8, dtype=torch.float64)
    initializers.looks_linear(W, generator=seeded())
    block = W[:3, :4]
    torch.testing.assert_close(W, torch.cat([torch.cat([block, -block], 1), torch.cat([-block, block], 1)], 0))
    torch.testing.assert_close(block @ block.T, torch.eye(3, dtype=torch.float64), atol=1e-13, rtol=0)
    with pytest.raises(ValueError, match="mirrored sides must be even; got a weight of 5 x 8"):
        initializers.looks_linear(torch.empty(5, 8))


def test_auto_follows_the_activation():
    assert initializers.auto("relu") is initializers.he
    assert initializers.auto("tanh") is initializers.lecun


def test_a_vector_has_no_fans():
    with pytest.raises(ValueError, match=r"at least two dimensions .* got shape \(3,\)"):
        initializers.he(torch.empty(3))
