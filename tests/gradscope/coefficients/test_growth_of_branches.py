"""Layers inside branches have no part in the growth of GSC along the trunk."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs

BLOCKS = [f"blocks.{number}" for number in range(8)]


class Block(nn.Module):
    """x + b(tanh(a(norm(x)))), a block of a pre-norm residual network."""

    def __init__(self, gain):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)
        with torch.no_grad():
            self.b.weight.mul_(gain)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(self.norm(x))))


class Net(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(gain) for _ in BLOCKS))

    def forward(self, x):
        return self.blocks(x)


def network(seed=0, gain=1.0):
    torch.manual_seed(seed)
    return Net(gain)


X = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def both():
    """A profile of blocks and of the layers inside them, and one of the blocks only."""
    model = network().double()
    return gs.gsc(model, X, layers="blocks.*"), gs.gsc(model, X, layers=BLOCKS)


def numbers(growth):
    return growth.rate, growth.rate_low, growth.rate_high, growth.total, growth.num_rows


def test_the_rate_is_that_of_the_blocks_alone(both):
    mixed, blocks = both
    assert len(mixed.layers) == 32 and len(blocks.layers) == 8 and sum(mixed.on_trunk) == 8
    assert numbers(mixed.growth()) == pytest.approx(numbers(blocks.growth()), rel=1e-12)
    assert mixed.growth().verdict == blocks.growth().verdict
    assert numbers(gs.growth([mixed, mixed])) == pytest.approx(numbers(gs.growth([blocks, blocks])), rel=1e-12)
    assert "blocks.0.norm" in mixed.remarks[0] and "rate leaves these layers out" in mixed.remarks[0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_saved_frame_keeps_which_layers_are_on_the_trunk(both, suffix, tmp_path):
    mixed, blocks = both
    frame = gs.frames.load(mixed.save(tmp_path / f"mixed.{suffix}"))
    assert frame["on_trunk"].tolist() == list(mixed.on_trunk)
    assert numbers(gs.growth(frame)) == pytest.approx(numbers(blocks.growth()), rel=1e-9)
    assert "on_trunk" not in blocks.to_frame()


def test_layers_inside_branches_have_a_rate_of_their_own_if_no_others_are_chosen():
    profile = gs.gsc(network().double(), X, layers="blocks.*.a")
    inner = np.array([profile.log10_values[row, 0] for row, name in enumerate(profile.layers) if name.endswith(".a")])
    assert len(inner) == 8 and profile.growth().total == pytest.approx(inner[0])


def test_comparisons_and_assertions_use_the_same_rows():
    factories = {f"gain {gain}": lambda gain=gain: Net(gain).double() for gain in (1.0, 3.0)}
    rates = [
        gs.compare_models(factories, X, seeds=3, layers=layers).table["rate"].to_numpy()
        for layers in ("blocks.*", BLOCKS)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    messages = []
    for layers in ("blocks.*", BLOCKS):
        with pytest.raises(AssertionError, match="First layer outside") as caught:
            gs.testing.assert_growth(network().double(), X, low=2.0, high=3.0, layers=layers)
        messages.append(re.search(r"First layer outside.*", str(caught.value))[0])
    assert messages[0] == messages[1]
