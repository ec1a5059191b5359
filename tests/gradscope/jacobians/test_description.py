"""What a capture says of itself: each column on a model that has one of everything, and the closing sentences."""

import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.running, self.drop = nn.BatchNorm2d(4).eval(), nn.Dropout(0.3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.aside, self.head, self.unused = nn.Linear(4, 2), nn.Linear(4, 5), nn.Linear(3, 3)

    def forward(self, x):
        h = self.drop(self.running(self.relu(self.norm(self.conv(x)))))
        h = h.flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        self.aside(h)
        return self.head(h.mean(dim=1))


@pytest.fixture(scope="module")
def description():
    return gs.capture(Everything().double(), noise(4, 3, 6, 6)).describe()


def test_columns(description):
    frame = description.to_frame().set_index("layer")
    assert list(frame.index[:7]) == ["input", "conv", "norm", "relu", "running", "drop", "attention"]
    assert list(frame.index[frame["modified"].fillna(False)]) == ["norm"]
    assert frame["batch_norm"].dropna().to_dict() == {"norm": "batch", "running": "running"}
    assert list(frame.index[frame["dropout"].fillna(False)]) == ["drop"]
    assert not frame.loc["attention", "on_trunk"] and frame.loc["drop", "on_trunk"]
    assert frame.loc["drop", "backward"] == "loop"  # torch has no batching rule for attention's backward on a CPU
    assert frame.loc["conv", "backward"] == "vmap"
    assert frame.loc["head", "aliases"] == "output"
    assert frame.loc["conv", "bytes"] == 4 * 4 * 6 * 6 * 8
    assert set(frame.index[~frame["fired"]]) == {"attention.out_proj", "unused"}


def test_printed_table_ends_with_what_was_not_seen(description):
    text = str(description)
    assert "Samples influence each other" in text
    assert "Overwritten in place later; the earlier values are measured: norm." in text
    assert "running statistics, which are (0, 1) in a model that was never trained" in text
    assert "one by one through an operation above drop" in text
    assert "The forward pass drew random numbers" in text
    assert "Inside branches, so not in a default profile: attention." in text
    assert "the target does not depend on them: aside" in text
    assert "Never called as modules, so not recorded: attention.out_proj, unused." in text
    assert text.endswith("gs.tap.")


def test_a_plain_network_says_little():
    text = str(gs.capture(nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), noise(4, 3)).describe())
    assert "Samples are independent." in text and "3 of them on the trunk to '1'" in text
    for sentence in ("random", "Overwritten", "Never called", "branches", "depend on them", "one by one", "statistics"):
        assert sentence not in text


def test_describing_leaves_the_random_state_alone():
    model, x = Everything(), torch.randn(4, 3, 6, 6)
    state = torch.get_rng_state()
    gs.capture(model, x).describe()
    assert torch.equal(state, torch.get_rng_state())


class LeavesOut(nn.Module):
    """Modules whose outputs cannot be recorded, each for another reason."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.argmax, self.note, self.constant = Returning(lambda x: x.argmax(1)), Returning(str), Returning(detached)

    def forward(self, x):
        h = self.first(x)
        self.note(h)
        return self.last(gs.tap(h, "kept") + self.constant(h) + gs.tap(self.argmax(h), "best")[:, None])


class Returning(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def detached(x):
    return x.detach()


def test_every_module_without_a_record_is_listed_with_the_reason():
    description = gs.capture(LeavesOut().double(), noise(4, 3)).describe()
    frame = description.to_frame().set_index("layer")
    left_out = frame["left_out"].dropna()
    assert set(left_out.index) == {"argmax", "note", "constant", "best"} and frame.loc[left_out.index, "fired"].all()
    assert "no floating-point or complex" in left_out["argmax"] and left_out["best"] == left_out["argmax"]
    assert "returned str, in which torch's pytree finds no tensor" in left_out["note"]
    assert "carries no gradient" in left_out["constant"]
    text = str(description)
    assert "Called, but not recorded: argmax, best; returned no floating-point or complex numbers." in text
    assert "3 tensors recorded" in text


def test_complex_layers_are_listed_with_their_bytes():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.cdouble), nn.Flatten())
    frame = gs.capture(model, noise(4, 3).to(torch.cdouble)).describe().to_frame().set_index("layer")
    assert frame.loc["0", "dtype"] == "complex128" and frame.loc["0", "bytes"] == 4 * 2 * 16
