"""The odd layer out among its siblings: which faults are named, in which networks, and what is no fault."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.checks.reading import UnreadableError
from gradscope.checks.segments import segments, siblings
from gradscope.checks.siblings import _numbers, _quiet
from gradscope.models import MLP
from tests.helpers import noise, seeded


def mlp(activation="relu", norm="layer", **options):
    return MLP(depth=8, width=50, activation=activation, norm=norm, generator=seeded(), **options)


def batch(*shape):
    return torch.randn(*(shape or (32, 50)), generator=seeded(1))


def test_a_forgotten_module_is_named_whatever_theory_says():
    for part, words in (("activation", "runs no ReLU"), ("norm", "runs no LayerNorm")):
        model = mlp()
        setattr(model.layers[5], part, nn.Identity())
        found = gs.compare(model, batch())
        assert found.first_deviation == "layers.5"
        assert words in str(found) and repr(found).endswith("most conspicuous: layers.5)")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_with_and_without_an_activation_are_two_designs(mode):
    """Every second layer ends in a ReLU, as in a residual branch: no layer is odd, and an odd one is still named."""
    parts = [p for n in range(10) for p in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), *[nn.ReLU()] * (n % 2))]
    model = getattr(nn.Sequential(*parts, nn.Conv2d(8, 8, 3)), mode)()
    with torch.no_grad():
        for n, layer in enumerate(m for m in model if isinstance(m, nn.Conv2d)):
            layer.weight.normal_(std=0.15, generator=seeded(n))
        assert gs.compare(model, batch(8, 8, 12, 12)).first_deviation is None
        model[10].weight.mul_(2)
    assert gs.compare(model, batch(8, 8, 12, 12)).first_deviation == "10"


def test_blocks_of_two_designs_are_not_compared_with_each_other():
    model = gs.models.ResNet(depth=14, width=8, generator=seeded()).eval()
    with pytest.raises(UnreadableError, match="The network has no four layers or blocks of one kind"):
        gs.compare(model, batch(8, 3, 32, 32))


class BasicBlock(nn.Module):
    """The block of a ResNet with functional activations; ``forgotten`` leaves out the one inside."""

    def __init__(self, num_in, num_out, forgotten=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out)
        self.conv2, self.bn2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out)
        self.skip = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()
        self.forgotten = forgotten

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y if self.forgotten else torch.relu(y)))
        return torch.relu(y + self.skip(x))


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_residual_network_of_several_stages_has_layers_of_two_designs(mode, blocks):
    torch.manual_seed(0)
    widths = [8] * blocks + [16] * blocks + [32] * blocks
    parts = [BasicBlock(num_in, num_out) for num_in, num_out in zip([8, *widths], widths, strict=False)]
    model = getattr(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *parts), mode)()
    assert gs.compare(model, batch(16, 3, 8, 8)).deviations == ()


class Functional(nn.Module):
    """Functional activations, which one layer may lack, with or without a sum behind them."""

    def __init__(self, skip=None, residual=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(7))
        self.skip, self.residual = skip, residual

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            h = layer(x) if number == self.skip else torch.tanh(layer(x))
            x = x + h if self.residual else h
        return x


@pytest.mark.parametrize("residual", [False, True])
def test_functional_code_between_layers_is_compared_too(residual):
    torch.manual_seed(0)
    found = gs.compare(Functional(3, residual), batch(16, 30))
    assert found.first_deviation == "layers.3" and "behind its siblings" in str(found)
    assert gs.compare(Functional(None, residual), batch(16, 30)).deviations == ()


class Dense(nn.Module):
    """Every layer also receives the input of the network, which the first layer receives transposed twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(6))

    def forward(self, x):
        h = x.t().t()
        for layer in self.layers:
            h = torch.tanh(layer(h)) + x
        return h


def test_the_copy_of_the_input_is_no_operation_between_layers():
    torch.manual_seed(0)
    (group,) = siblings(segments(Dense(), batch(16, 30)))
    assert {s.between for s in group} == {("AddBackward0", "TanhBackward0")}


class Inside(nn.Module):
    """A layer with a functional activation in its forward pass, which it may lack."""

    def __init__(self, plain=False):
        super().__init__()
        self.linear, self.plain = nn.Linear(30, 30), plain

    def forward(self, x):
        h = self.linear(x)
        return h if self.plain else nn.functional.silu(h) * 1.5


def test_a_functional_activation_that_one_layer_lacks_shows_in_its_curvature():
    torch.manual_seed(0)
    model = nn.Sequential(*(Inside(plain=n == 4) for n in range(8)))
    found = gs.compare(model, batch(16, 30))
    assert found.first_deviation == "4" and found.deviations[0].quantity == "curvature"


def test_half_dead_units_are_named_also_inside_a_residual_branch():
    torch.manual_seed(0)
    for model in (mlp(), mlp(residual="identity")):
        half = torch.arange(50) % 2 == 0
        model.layers[2].activation.register_forward_hook(lambda m, a, y, half=half: y * ~half)
        found = gs.compare(model, batch())
        assert found.first_deviation == "layers.2" and "share of quiet features" in str(found)


def test_a_detached_branch_is_named_with_its_parameters():
    model = mlp(residual="identity")
    model.layers[6].out.register_forward_hook(lambda m, a, y: y.detach())
    found = gs.compare(model, batch())
    assert found.first_deviation == "layers.6"
    assert "linear.weight" in found.deviations[0].text and "no gradient" in found.deviations[0].text


def test_convolutions_and_attention_have_siblings():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(6)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    blocks = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 6, enable_nested_tensor=False
    )
    for model, x, name in ((conv, batch(16, 3, 6, 6), "4.0"), (blocks, batch(8, 5, 32), "layers.3.linear1")):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert gs.compare(model, x).deviations == ()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(1.3)
        found = gs.compare(model, x)
        assert name.startswith(found.first_deviation) and "not compared with theory" in str(found)
        assert list(found.to_frame().columns) == ["layer", "deviation"]


def test_what_follows_the_last_layer_is_no_fault():
    torch.manual_seed(0)
    for end in ([nn.Linear(30, 30)], [nn.Linear(30, 5)], [nn.LayerNorm(30)], [nn.LayerNorm(30), nn.Linear(30, 30)]):
        model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(30, 30), nn.ReLU())), *end)
        found = gs.compare(model, batch(16, 30))
        assert found.deviations == () and found.judged == ("0", "2", "4", "6", "8", "10")


def test_two_designs_in_one_network_are_no_fault():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for n in range(10) for m in (nn.Linear(30, 30), *([nn.LayerNorm(30)] if n % 2 else []), nn.ReLU()))
    )
    assert not [d for d in gs.compare(model, batch(16, 30)).deviations if d.quantity == "structure"]


def test_a_wrong_layer_does_not_make_later_layers_look_wrong():
    model = mlp("tanh", "none")
    model.layers[1].activation.register_forward_hook(lambda m, a, y: 50 * y)
    found = gs.compare(model, batch())
    assert {d.layer for d in found.deviations if "siblings" in d.text} == {"layers.1"}


def test_expected_activation_and_normalization():
    model = mlp("gelu", "layer")
    x = batch()
    assert gs.compare(model, x, expected={"activation": "gelu", "normalization": nn.LayerNorm}).deviations == ()
    for expected, words in (
        ({"activation": "relu"}, "activation: expected relu, but it runs GELU"),
        ({"normalization": "batch"}, "normalization: expected batch, but it runs LayerNorm"),
        ({"normalization": "none"}, "normalization: expected none, but it runs LayerNorm"),
    ):
        found = gs.compare(model, x, expected=expected)
        assert found.first_deviation == "layers.0" and words in str(found)
        assert len({d.layer for d in found.deviations}) == 8
    # Most layers are what they should not be: the one that is as expected is not blamed first.
    model.layers[0].norm = None
    assert gs.compare(model, x, expected={"normalization": "none"}).first_deviation != "layers.0"


def test_expectations_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="unknown key 'width'; use activation, normalization, initialization"):
        gs.compare(mlp(), batch(), expected={"width": 3})
    with pytest.raises(ValueError, match="must be a module class or its name, got 3"):
        gs.compare(mlp(), batch(), expected={"activation": 3})
    with pytest.raises(ValueError, match="no layer runs a module of torch"):
        gs.compare(Functional(), batch(16, 30), expected={"activation": "tanh"})
    with pytest.raises(gs.UnreadableError, match="The network has no four layers or blocks of one kind"):
        gs.compare(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()), batch(4, 1, 3))
    with pytest.raises(gs.UnreadableError, match="No chain of linear layers"):
        gs.compare(nn.Linear(6, 3), batch(4, 6))
    conv = nn.Sequential(*(nn.Conv1d(4, 4, 1) for _ in range(5)))
    with pytest.raises(gs.UnreadableError, match="Conv1d; a layer should begin with a Linear"):
        gs.compare(conv, batch(4, 4, 3), expected={"initialization": 1.0})


def test_every_pair_gets_the_statistics_of_a_plain_calculation():
    model, x = mlp("tanh", "none").double(), noise(16, 50)
    (group,) = siblings(segments(model, x))
    given, other = group[3], group[5]
    inputs = model.layers[:3](x).detach()
    assert torch.equal(given.received, inputs)
    numbers = _numbers(other, given)
    y = model.layers[5](inputs).detach()
    assert numbers["length of the output"][0] == pytest.approx(math.log(float(y.square().sum(0).mean())))
    squares = y.square().sum(0)
    error = float((squares / squares.mean()).std(correction=0)) / math.sqrt(50)
    assert numbers["length of the output"][1] == pytest.approx(error)
    twice = float((model.layers[5](2 * inputs).detach() - y).square().sum() / y.square().sum())
    assert numbers["response to twice the input"][0] == pytest.approx(math.log(twice))


def test_the_share_of_quiet_features_by_hand():
    y = torch.zeros(4, 10)
    y[:, :6] = noise(4, 6).float()
    y[:, 6] = 3.0
    share, error = _quiet(y, -1)
    assert share == pytest.approx(0.4) and error == pytest.approx(math.sqrt(5 / 12 * 7 / 12 / 10))


def test_dead_networks_and_single_samples_are_compared():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(30, 30, bias=False), nn.ReLU())))
    nn.init.zeros_(model[4].weight)
    found = gs.compare(model, batch(16, 30))
    assert found.first_deviation == "4" and "not compared with theory" in str(found)
    assert gs.compare(Functional(2), batch(1, 30)).first_deviation == "layers.2"


def test_the_model_and_its_random_state_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(6) for m in (nn.Linear(30, 30), nn.BatchNorm1d(30), nn.ReLU(inplace=True), nn.Dropout(0.1)))
    )
    model.insert(0, nn.Hardtanh(-0.5, 0.5, inplace=True))
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    x = batch(16, 30)
    kept = x.clone()
    gs.compare(model, x)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert np.isfinite(gs.compare(model, x).log10_gsc).all()
