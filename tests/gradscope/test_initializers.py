"""Initial weights: moments, orthogonality, and a network that is linear on purpose."""

import math
import re

import numpy as np
import pytest
import scipy.integrate
import torch

from gradscope import initializers
from gradscope.models.mlp import ACTIVATIONS, MLP
from tests.helpers import noise, seeded


def filled(name: str, *shape: int, seed: int = 0, **options: bool) -> torch.Tensor:
    return initializers.BY_NAME[name](torch.empty(shape, dtype=torch.float64), generator=seeded(seed), **options)


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


def test_orthogonal_is_haar_distributed():
    matrices = torch.stack([filled("orthogonal", 3, 3, seed=seed) for seed in range(4000)])
    # Haar: each entry has mean 0 and mean square 1/3, and E[trace^2] = 1.  The fourth moments are at most 3/15 and 3,
    # so the standard errors are at most those below.  QR without its sign fix has E[trace] < 0.
    assert matrices.mean(0).abs().max() < 4.5 * math.sqrt(1 / 3 / 4000)
    assert (matrices.square().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt((3 / 15 - 1 / 9) / 4000)
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1)
    assert float(traces.square().mean()) == pytest.approx(1, abs=4.5 * math.sqrt((3 - 1) / 4000))
    # Both orientations are equally likely.
    assert float((torch.linalg.det(matrices) > 0).double().mean()) == pytest.approx(0.5, abs=4.5 / 2 / math.sqrt(4000))


def test_looks_linear_blocks_of_first_and_last_layer():
    first = filled("looks_linear", 6, 5, mirror_input=False)
    W = filled("orthogonal", 3, 5)
    torch.testing.assert_close(first, torch.cat([W, -W], 0), atol=0, rtol=0)
    last = filled("looks_linear", 5, 6, mirror_output=False)
    W = filled("orthogonal", 5, 3)
    torch.testing.assert_close(last, torch.cat([W, -W], 1), atol=0, rtol=0)
    assert torch.equal(
        filled("looks_linear", 5, 7, mirror_input=False, mirror_output=False), filled("orthogonal", 5, 7)
    )


@pytest.mark.parametrize(
    ("shape", "options"), [((5, 8), {"mirror_input": False}), ((8, 5), {"mirror_output": False}), ((8, 5), {})]
)
def test_looks_linear_names_an_odd_shape(shape, options):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]}"):
        filled("looks_linear", *shape, **options)


@pytest.mark.parametrize("name", initializers.BY_NAME)
def test_weights_are_filled_in_place_from_the_generator_alone(name):
    weight = torch.nn.Parameter(torch.full((4, 6), math.nan))
    before = torch.get_rng_state()
    assert initializers.BY_NAME[name](weight, generator=seeded(3)) is weight
    assert torch.equal(before, torch.get_rng_state())
    assert weight.isfinite().all()
    assert weight.requires_grad
    again = initializers.BY_NAME[name](torch.empty(4, 6), generator=seeded(3))
    assert torch.equal(weight, again)
    assert not torch.equal(weight, initializers.BY_NAME[name](torch.empty(4, 6), generator=seeded(4)))


def test_looks_linear_blocks():
    W = torch.empty(6, 8, dtype=torch.float64)
    initializers.looks_linear(W, generator=seeded())
    block = W[:3, :4]
    torch.testing.assert_close(W, torch.cat([torch.cat([block, -block], 1), torch.cat([-block, block], 1)], 0))
    torch.testing.assert_close(block @ block.T, torch.eye(3, dtype=torch.float64), atol=1e-13, rtol=0)
    with pytest.raises(ValueError, match="5 x 8"):
        initializers.looks_linear(torch.empty(5, 8))


# What one wide layer under `auto` makes of a mean square of 1, as the table of `auto` says.
MEAN_SQUARE = {
    "relu": 1, "leaky_relu": 1.0001, "elu": 1.2001, "gelu": 0.9221, "silu": 0.7992, "selu": 1, "linear": 1,
    "tanh": 0.3943, "sigmoid": 0.2934,
}  # fmt: skip


def test_auto_follows_the_activation():
    assert initializers.auto("relu") is initializers.he
    assert initializers.auto("tanh") is initializers.lecun
    assert set(MEAN_SQUARE) == set(ACTIVATIONS)
    with pytest.raises(ValueError, match=r"activation.*'relu'"):
        initializers.auto("rellu")


@pytest.mark.parametrize("activation", MEAN_SQUARE)
def test_table_of_auto_by_quadrature_and_by_networks(activation):
    phi, scale = ACTIVATIONS[activation](), math.sqrt(2 if initializers.auto(activation) is initializers.he else 1)

    def density(z: float) -> float:
        return float(phi(torch.tensor(scale * z, dtype=torch.float64))) ** 2 * math.exp(-z * z / 2)

    half = [scipy.integrate.quad(density, *ends)[0] / math.sqrt(2 * math.pi) for ends in ((-12, 0), (0, 12))]
    assert sum(half) == pytest.approx(MEAN_SQUARE[activation], abs=5e-5)
    assert f"{MEAN_SQUARE[activation]}" in next(
        line for line in (initializers.auto.__doc__ or "").splitlines() if line.split()[:1] == [activation]
    )
    squares = []
    for seed in range(20):
        model = MLP(depth=1, width=256, activation=activation, generator=seeded(seed)).double()
        x = noise(64, 256, seed=100 + seed)
        with torch.no_grad():
            squares.append(float(model(x / x.square().mean(1, keepdim=True).sqrt()).square().mean()))
    assert np.mean(squares) == pytest.approx(sum(half), abs=4 * np.std(squares, ddof=1) / math.sqrt(20))


@pytest.mark.parametrize("name", ["he", "lecun", "xavier", "orthogonal"])
def test_a_vector_and_an_empty_weight_have_no_fans(name):
    for shape in ((3,), (3, 0)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            initializers.BY_NAME[name](torch.empty(shape), generator=seeded())


def test_looks_linear_fills_matrices_only():
    with pytest.raises(ValueError, match=r"\(4, 4, 3, 3\)"):
        initializers.looks_linear(torch.empty(4, 4, 3, 3))


def outputs_of(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every layer with weights, in the order of the calls."""
    kept = {}
    for name, layer in initializers.weighted(model).items():
        layer.register_forward_hook(lambda _, args, output, name=name: kept.update({name: output.detach()}))
    model(x)
    return kept


def test_lsuv_of_two_layers_by_hand():
    model, x = MLP(depth=2, width=6, activation="tanh", generator=seeded()).double(), noise(40, 6)
    found = initializers.lsuv(model, x, tolerance=1e-6, generator=seeded(5))
    generator = seeded(5)
    first, second = (initializers.orthogonal(torch.empty(6, 6).double(), generator=generator).numpy() for _ in range(2))
    h = x.numpy() @ first.T
    first = first / h.std()
    np.testing.assert_allclose(model.layers[0].linear.weight.detach(), first, rtol=1e-12)
    h = np.tanh(x.numpy() @ first.T) @ second.T
    np.testing.assert_allclose(model.layers[1].linear.weight.detach(), second / h.std(), rtol=1e-10)
    assert found == pytest.approx({"layers.0.linear": 1, "layers.1.linear": 1}, abs=1e-12)


@pytest.mark.parametrize("tolerance", [0.1, 0.5])
def test_lsuv_makes_unit_variance_of_convolutions_and_biases_in_the_order_of_calls(tolerance):
    class Backwards(torch.nn.Module):
        """Defined in another order than called."""

        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(36, 4)
            self.first = torch.nn.Conv2d(2, 4, 3)
            self.norm = torch.nn.BatchNorm2d(4)

        def forward(self, x):
            return self.last(self.norm(torch.relu(self.first(x))).flatten(1))

    model, x = Backwards().double(), noise(30, 2, 5, 5)
    with torch.no_grad():
        model.first.bias.copy_(torch.tensor([0.5, -0.5, 0.3, 0.0]))
        model.last.bias.zero_()
    before = model.norm.running_mean.clone()
    found = initializers.lsuv(model, x, tolerance=tolerance, generator=seeded())
    assert list(found) == ["first", "last"]
    assert torch.equal(model.norm.running_mean, before) and model.training
    deviations = {name: float(output.std(correction=0)) for name, output in outputs_of(model, x).items()}
    assert found == pytest.approx(deviations, rel=1e-12)
    assert all(abs(deviation**2 - 1) <= tolerance for deviation in deviations.values())
    weight = model.last.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_lsuv_leaves_a_layer_that_is_within_the_tolerance():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).double(), noise(64, 8)
    x = 1.04 * x / x.std(correction=0)
    initializers.lsuv(model, x, generator=seeded())
    weight = model[0].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_lsuv_keeps_what_the_first_call_of_a_shared_layer_made():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(3 * x)))

    model, x = Twice().double(), noise(20, 6)
    found = initializers.lsuv(model, x, generator=seeded())
    assert found == {"layer": pytest.approx(1, abs=1e-12)}
    assert float((3 * x @ model.layer.weight.T).detach().std(correction=0)) == pytest.approx(1)


def test_lsuv_names_the_layer_that_it_cannot_scale():
    dead = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Threshold(1e9, 0.0), torch.nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"'2'.* 0 divisions"):
        initializers.lsuv(dead, noise(9, 4).float(), generator=seeded())
    ruled = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        ruled.bias.copy_(torch.tensor([-9.0, 9.0]))
    with pytest.raises(ValueError, match=r"'the model'.* 10 divisions"):
        initializers.lsuv(ruled, noise(9, 2), generator=seeded())
    assert not ruled._forward_hooks
    with pytest.raises(ValueError, match="Sequential"):
        initializers.lsuv(torch.nn.Sequential(torch.nn.Tanh()), noise(9, 2))
    with pytest.raises(ValueError, match="tolerance"):
        initializers.lsuv(ruled, noise(9, 2), tolerance=0)
