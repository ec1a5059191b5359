"""Multilayer perceptrons against their definitions, written out from the weights."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.models import MLP
from tests.helpers import noise, seeded

PHI = {
    "linear": lambda h: h,
    "relu": lambda h: h.clamp(min=0),
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    "elu": lambda h: torch.where(h > 0, h, h.exp() - 1),
    "selu": lambda h: 1.0507009873554805 * torch.where(h > 0, h, 1.6732632423543772 * (h.exp() - 1)),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "silu": lambda h: h / (1 + (-h).exp()),
    "tanh": lambda h: 1 - 2 / (1 + (2 * h).exp()),
    "sigmoid": lambda h: 1 / (1 + (-h).exp()),
}
NORM = {
    "none": lambda h: h,
    "batch": lambda h: (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt(),
    "layer": lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt(),
}


def mlp(**options) -> MLP:
    return MLP(**{"depth": 2, "width": 4, "generator": seeded(), **options}).double()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shift_biases(model: nn.Module) -> None:
    """Biases begin at zero; a formula is only tested where they are not."""
    for number, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("bias"):
            p.data = noise(*p.shape, seed=50 + number)


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("norm", NORM)
@pytest.mark.parametrize("residual", ["none", "identity"])
def test_every_layer_by_hand(activation, norm, residual):
    model = mlp(depth=3, width=6, activation=activation, norm=norm, residual=residual, skip_weight=0.7, bias=True,
                in_features=5, out_features=2)  # fmt: skip
    shift_biases(model)
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    x = noise(8, 5)
    y = model(x)
    f = x if residual == "none" else affine(model.stem, x)
    for layer, output in zip(model.layers, outputs, strict=True):
        branch = PHI[activation](NORM[norm](affine(layer.linear, f)))
        f = branch if residual == "none" else 0.7 * f + affine(layer.out, branch)
        torch.testing.assert_close(output, f, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(y, affine(model.head, f), rtol=1e-11, atol=1e-12)


def test_names_of_the_children():
    children = {norm: [name for name, _ in mlp(norm=norm).layers[0].named_children()] for norm in NORM}
    normed = ["linear", "norm", "activation"]
    assert children == {"none": ["linear", "activation"], "batch": normed, "layer": normed}
    assert [name for name, _ in mlp(residual="identity").layers[0].named_children()] == ["linear", "activation", "out"]
    assert [name for name, _ in mlp(depth=3).named_children()] == ["layers"]
    model = mlp(depth=3, residual="identity", in_features=6, out_features=2)
    assert sorted(name for name, _ in model.named_children()) == ["head", "layers", "stem"]
    assert len(model.layers) == 3


def test_no_activation_works_in_place():
    for activation in PHI:
        layer = mlp(activation=activation).layers[0]
        h = noise(3, 4)
        before = h.clone()
        layer.activation(h)
        assert torch.equal(h, before)


def test_parameter_counts():
    assert num_parameters(mlp(depth=3, width=10)) == 300
    assert num_parameters(mlp(depth=3, width=10, norm="batch")) == 300
    assert num_parameters(mlp(depth=3, width=10, norm="layer")) == 300
    assert num_parameters(mlp(depth=3, width=10, in_features=7, out_features=2, bias=True)) == 70 + 200 + 20 + 30 + 2
    assert num_parameters(mlp(depth=3, width=10, residual="identity")) == 600
    assert num_parameters(mlp(depth=3, width=10, residual="identity", in_features=4)) == 640


def test_shapes():
    assert mlp(in_features=12)(noise(3, 2, 6)).shape == (3, 4)
    assert mlp(in_features=12, out_features=5)(noise(3, 2, 2, 3)).shape == (3, 5)
    assert mlp(residual="identity", in_features=12)(noise(3, 12)).shape == (3, 4)


@pytest.mark.parametrize(("norm", "dim"), [("batch", 0), ("layer", 1)])
def test_a_norm_gives_its_own_axis_mean_zero_and_variance_one(norm, dim):
    received = []
    model = mlp(depth=3, width=32, norm=norm, activation="tanh")
    for layer in model.layers:
        layer.activation.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    model(noise(64, 32))
    for h in received:
        assert h.mean(dim).abs().max() < 1e-14
        # Variance v becomes v / (v + 1e-5); v is above 0.01 here.
        assert ((h.var(dim, correction=0) - 1).abs() < 1e-3).all()


def test_a_he_relu_network_keeps_the_mean_square():
    ratios = []
    for seed in range(30):
        x = noise(50, 100, seed=100 + seed)
        with torch.no_grad():
            y = mlp(depth=6, width=100, generator=seeded(seed))(x)
        ratios.append(float(y.square().mean() / x.square().mean()))
    # He: each layer's ReLU halves the mean square that its weights have doubled.
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios, ddof=1) / math.sqrt(30))
    # The error bar is small enough to see the factor 2 a layer that another variance would bring.
    assert np.std(ratios, ddof=1) / math.sqrt(30) < 0.1


def test_a_residual_branch_is_as_long_as_its_input():
    ratios = []
    for seed in range(30):
        x = noise(50, 100, seed=100 + seed)
        with torch.no_grad():
            branch = mlp(depth=1, width=100, residual="identity", skip_weight=0.0, generator=seeded(seed))(x)
        ratios.append(float(branch.square().mean() / x.square().mean()))
    # He doubles, ReLU halves, and V with variance 1 / width keeps.
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios, ddof=1) / math.sqrt(30))


def test_orthogonal_reaches_every_linear_map():
    model = mlp(residual="identity", init="orthogonal", in_features=3, out_features=2)
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(maps) == 6
    for linear in maps:
        W = linear.weight if linear.out_features <= linear.in_features else linear.weight.T
        # Weights are stored in float32.
        torch.testing.assert_close(W @ W.T, torch.eye(len(W)).double(), atol=1e-6, rtol=0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_a_looks_linear_network_is_linear(depth, float64):
    model = mlp(depth=depth, width=8, init="looks_linear", in_features=5, out_features=3, bias=True)
    x, y = noise(4, 5), noise(4, 5, seed=2)
    torch.testing.assert_close(model(x), -model(-x), atol=1e-13, rtol=0)
    torch.testing.assert_close(model(2 * x - 3 * y), 2 * model(x) - 3 * model(y), atol=1e-13, rtol=0)
    ordinary = mlp(depth=depth, width=8, in_features=5, out_features=3)
    assert not torch.allclose(ordinary(-x), -ordinary(x))


def test_a_looks_linear_network_without_a_head_is_linear_in_the_difference_of_its_halves(float64):
    model = mlp(depth=5, width=8, init="looks_linear", in_features=4)
    x = noise(4, 4)
    difference = model(x)[:, :4] - model(x)[:, 4:]
    torch.testing.assert_close(difference, model(-x)[:, 4:] - model(-x)[:, :4], atol=1e-13, rtol=0)
    # Orthogonal square blocks keep lengths.
    torch.testing.assert_close(difference.norm(dim=1), x.norm(dim=1), atol=1e-13, rtol=0)


@pytest.mark.parametrize("init", ["auto", "he", "lecun", "xavier", "orthogonal", "looks_linear"])
def test_weights_come_from_the_generator_and_nothing_else(init):
    def build(seed: int) -> list[Tensor]:
        return list(mlp(init=init, bias=True, in_features=3, out_features=2, generator=seeded(seed)).parameters())

    before = torch.get_rng_state()
    a, b, other = build(3), build(3), build(4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(p, q) == (p.ndim == 1) for p, q in zip(a, other, strict=True))  # biases are all zero
    assert all(not p.any() for p in a if p.ndim == 1)


@pytest.mark.parametrize("residual", ["none", "identity"])
@pytest.mark.parametrize(
    "weights",
    [{"init": init} for init in ("auto", "he", "lecun", "xavier", "orthogonal")] + [{"weight_variance": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("activation", ["linear", "tanh", "relu"])
def test_biases_before_activations_have_their_variance_and_others_are_zero(activation, weights, residual):
    model = MLP(
        depth=3, width=900, activation=activation, residual=residual, bias=True, bias_variance=0.25,
        in_features=20, out_features=30, generator=seeded(), **weights,
    )  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            before = name.startswith("layers.") and not name.endswith("out")
            # 0.25 within five standard errors of a sample variance of 900 numbers
            assert float(module.bias.detach().var()) == (
                pytest.approx(0.25, rel=5 * math.sqrt(2 / 900)) if before else 0
            ), name


def test_without_a_generator_the_global_seed_decides():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a = mlp(generator=None)
        torch.manual_seed(3)
        b = mlp(generator=None)
        c = mlp(generator=None)
    assert torch.equal(a.layers[0].linear.weight, b.layers[0].linear.weight)
    assert not torch.equal(b.layers[0].linear.weight, c.layers[0].linear.weight)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("activation", "rellu", "relu"), ("norm", "bach", "batch"), ("norm", "None", "none"),
        ("residual", "yes", None), ("init", "lecum", "lecun"), ("init", "kaiming", None),
    ],
)  # fmt: skip
def test_for_unknown_names_the_nearest_is_suggested(name, value, nearest):
    with pytest.raises(ValueError, match=name) as caught:
        mlp(**{name: value})
    rest = str(caught.value).partition("; ")[2]
    assert repr(value) in rest and (repr(nearest) in rest) == (nearest is not None)


@pytest.mark.parametrize("name", ["depth", "width", "in_features", "out_features"])
def test_sizes(name):
    for value, error in ((0, ValueError), (-2, ValueError), (2.5, TypeError), ("8", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"^{name} .*got {value!r}"):
            mlp(**{name: value})
    assert isinstance(mlp(**{name: np.int64(4)}), MLP)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_skip_weight(value):
    with pytest.raises(ValueError, match=f"^skip_weight .*got {value!r}"):
        mlp(residual="identity", skip_weight=value)


@pytest.mark.parametrize(
    "options", [{"activation": "tanh"}, {"norm": "batch"}, {"residual": "identity"}, {"width": 5}], ids=str
)
def test_looks_linear_says_what_it_got(options):
    with pytest.raises(ValueError, match="looks_linear") as caught:
        mlp(init="looks_linear", **options)
    got = {"activation": "relu", "norm": "none", "residual": "none", "width": 4} | options
    assert all(f"{name}={value!r}" in str(caught.value).partition("got ")[2] for name, value in got.items())


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"bias_variance": 0.1}, "bias_variance"),
        ({"bias_variance": -1.0, "bias": True}, "bias_variance.*-1"),
        ({"weight_variance": 1.0, "init": "he"}, "weight_variance.*'he'"),
    ],
)
def test_variances(options, culprit):
    with pytest.raises(ValueError, match=culprit):
        mlp(**options)


def test_inputs_of_the_wrong_size():
    with pytest.raises(ValueError, match=r"4 features.*got 6"):
        mlp()(noise(3, 2, 3))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        mlp()(noise(4))
