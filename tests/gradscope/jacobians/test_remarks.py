"""What a result says about itself: statistics of normalization, random numbers, which output, rows inside branches."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gradscope as gs
from tests.helpers import noise


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.branch, self.last = (
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2),
        )  # fmt: skip

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.last(h + torch.tanh(self.branch(h)))


def test_statistics_of_batch_normalization():
    model, x = Block().double(), noise(6, 4)
    profile = gs.gsc(model, x)
    assert "Batch normalization used the statistics of this batch." in profile.remarks and profile.coupled
    profile = gs.gsc(model.eval(), x)
    assert any("running statistics, which are (0, 1)" in remark for remark in profile.remarks) and not profile.coupled
    assert "running statistics" in profile.summary()


def test_rows_inside_a_branch():
    profile = gs.gsc(Block().double(), noise(6, 4), layers=["first", "branch"])
    assert any("only the paths through this layer: branch" in remark for remark in profile.remarks)
    assert not any("Inside a branch" in remark for remark in gs.gsc(Block().double(), noise(6, 4)).remarks)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Structured(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body, self.make = Block(), make

    def forward(self, x):
        return self.make(self.body(x))


@pytest.mark.parametrize(
    ("make", "remark"),
    [
        (lambda y: Output(y.sum(), 2 * y), "The model returned Output; its .logits is measured."),
        (lambda y: {"n": torch.tensor(3), "y": y}, "The model returned dict; its first floating-point tensor, 'y', is"),
        (lambda y: (y, 2 * y), "The model returned tuple; its first floating-point tensor is measured."),
    ],
    ids=["dataclass", "dict", "tuple"],
)
def test_which_output_is_measured(make, remark):
    profile = gs.gsc(Structured(make).double(), noise(6, 4), layers="body.*")
    assert any(found.startswith(remark) for found in profile.remarks), profile.remarks


def test_random_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    assert any("drew random numbers" in remark for remark in gs.gsc(model, noise(6, 4)).remarks)
    assert gs.gsc(model.eval(), noise(6, 4)).remarks == ()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.middle, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, a, b):
        return self.last(self.middle(gs.tap(self.first(a) + self.second(b), "sum")))


def test_layers_before_several_inputs_meet_are_named():
    model, a, b = TwoInputs().double(), noise(6, 4), noise(6, 4, seed=1)
    both = gs.gsc(model, (a, b), forward=lambda model, inputs: model(*inputs))
    assert both.layers[0] == "sum" and any("begins at 'sum', where the paths" in remark for remark in both.remarks)
    one = gs.gsc(model, a, forward=lambda model, a: model(a, b))
    assert one.layers[0] == "input" and one.remarks == ()


class Tokens(nn.Module):
    """The first row is the sum of both embeddings, of which only one reads the data."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.last = Embeddings(), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.last(self.embeddings(tokens))


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.LayerNorm(4)

    def forward(self, tokens):
        return self.norm(self.words(tokens) + self.places(torch.arange(5)))


def test_a_sum_of_embeddings_is_no_meeting_of_several_inputs():
    captured = gs.capture(Tokens(), torch.arange(10).reshape(2, 5) % 9)
    assert captured.units[0].name == "embeddings" and captured.source_names == ("embeddings.words",)
    assert captured.remarks == ()
