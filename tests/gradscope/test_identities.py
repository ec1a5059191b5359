"""Exact identities: closed forms that any correct measurement keeps to rounding."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.initializers import orthogonal
from gradscope.models.mlp import MLP
from tests.helpers import linear, noise, seeded


@functools.cache
def haar(n: int, seed: int) -> torch.Tensor:
    weight = torch.empty(n, n, dtype=torch.float64)
    orthogonal(weight, generator=seeded(seed))
    return weight


def test_orthogonal_linear_layers_have_unit_gsc():
    model = nn.Sequential(*(linear(haar(12, seed)) for seed in range(6)))
    matrix = gs.gsc_matrix(model, noise(8, 12), probes="exact")
    upper = matrix.log10_values[np.triu_indices(7)]
    np.testing.assert_allclose(upper, 0, atol=1e-13)


def test_a_linear_layer_has_the_frobenius_form():
    A, x = noise(7, 12), noise(1, 12)
    expected = A.square().sum() / 12 * x.square().sum() / (A @ x[0]).square().sum()
    assert gs.gsc(linear_after(A), x)["input"].value == pytest.approx(float(expected), rel=1e-12)


def linear_after(A: torch.Tensor) -> nn.Module:
    return nn.Sequential(linear(A))


def test_a_diagonal_layer_at_a_unit_vector():
    a = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    for i in range(3):
        x = torch.eye(3, dtype=torch.float64)[i : i + 1]
        value = gs.gsc(linear_after(torch.diag(a)), x)["input"].value
        assert value == pytest.approx(float(gs.qm_norm(torch.diag(a)) ** 2 / a[i] ** 2), rel=1e-12)


def test_duplicating_the_width_block_diagonally_changes_nothing():
    blocks = [noise(6, 6, seed=seed) for seed in range(8)]
    x = noise(5, 6)
    narrow = nn.Sequential(*(nn.Sequential(linear(b), nn.Tanh()) for b in blocks))
    wide = nn.Sequential(*(nn.Sequential(linear(torch.block_diag(b, b)), nn.Tanh()) for b in blocks))
    for probe in ("exact",):
        a = gs.gsc(narrow, x, probes=probe, layers=[f"{i}" for i in range(8)])
        b = gs.gsc(wide, torch.cat([x, x], dim=1), probes=probe, layers=[f"{i}" for i in range(8)])
        np.testing.assert_allclose(a.log10_values, b.log10_values, atol=1e-12)


def test_compensated_rescaling_of_a_layer_leaves_every_gsc_unchanged():
    class Scaled(nn.Module):
        def __init__(self, weight: torch.Tensor, before: float, after: float):
            super().__init__()
            self.linear, self.before, self.after = linear(weight), before, after

        def forward(self, x):
            return torch.tanh(self.linear(x * self.before)) * self.after

    weights = [noise(9, 9, seed=seed) / 3 for seed in range(6)]
    factors = [1.0, 1e3, 1e-2, 7.0, 1e5, 0.3, 1.0]
    x = noise(4, 9)
    plain = nn.Sequential(*(Scaled(w, 1, 1) for w in weights))
    scaled = nn.Sequential(*(Scaled(w, 1 / factors[i], factors[i + 1]) for i, w in enumerate(weights)))
    torch.testing.assert_close(plain(x), scaled(x))
    a, b = gs.gsc_matrix(plain, x, probes="exact"), gs.gsc_matrix(scaled, x, probes="exact")
    np.testing.assert_allclose(a.log10_values, b.log10_values, atol=1e-12)


def test_input_scale_of_a_homogeneous_network_changes_nothing():
    model, x = MLP(depth=8, width=12, activation="relu", generator=seeded()).double(), noise(8, 12)
    a, b = gs.gsc(model, x).log10_values, gs.gsc(model, 1e-3 * x).log10_values
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_looks_linear_network_is_a_linear_map():
    # An isotropic linear map of orthogonal layers: GSC 1 from the first doubled layer to the last.
    model = MLP(depth=8, width=12, activation="relu", init="looks_linear", generator=seeded()).double()
    growth = gs.gsc(model, noise(8, 12)).growth()
    assert growth.rate == pytest.approx(1, abs=0.05)


class Affine(nn.Module):
    """f(x) = a Q (x - 1) + 1: the forward pass stays at 1, the Jacobian grows like a^L."""

    def __init__(self, a: float, seed: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter((a * haar(4, seed)).to(dtype))

    def forward(self, x):
        return (x - 1) @ self.weight.T + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "expected"), [(3, 1431.4), (1 / 3, -1431.4)])
def test_fifteen_hundred_affine_layers_neither_overflow_nor_underflow(a, expected, dtype):
    depth = 1500  # a^depth is far beyond the range of float64
    model = nn.Sequential(*(Affine(a, seed % 7, dtype) for seed in range(depth)))
    profile = gs.gsc(model, torch.ones(2, 4, dtype=dtype))
    assert profile["input"].log10_value == pytest.approx(
        2 * depth * math.log10(a), rel=2e-6 if dtype is torch.float32 else 1e-12
    )
    assert profile["input"].log10_value == pytest.approx(expected, abs=0.05)
    assert np.isfinite(profile.log10_values).all()
    assert profile.growth().verdict == ("exploding" if a > 1 else "vanishing")
    frame = profile.to_frame()
    assert frame["value"].iloc[0] == (math.inf if a > 1 else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("a", [2.0**7, 2.0**-7])
@pytest.mark.parametrize("probes", ["exact", 1])
def test_growth_beyond_the_range_within_one_stride(a, dtype, probes):
    # 2^7 a layer leaves float32 within nineteen layers and float16 within three, up or down.
    depth = 60
    model = nn.Sequential(*(Affine(1.0, seed % 7, torch.float64) for seed in range(depth)))
    for layer in model:
        layer.weight.data = a * torch.eye(4, dtype=torch.float64).roll(1, 0)
    profile = gs.gsc(model.to(dtype), torch.ones(2, 4, dtype=dtype), probes=probes)
    assert profile["input"].log10_value == pytest.approx(2 * depth * math.log10(a), rel=1e-12)
