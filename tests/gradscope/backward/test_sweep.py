"""The backward sweep: scaling is exact, loops equal vectorized products, nothing overflows."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.backward.cotangents import Cotangents
from gradscope.backward.readings import lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import STRIDES, rescale, sweep
from gradscope.models.mlp import MLP


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def readings(captured: gs.Capture, cotangents: torch.Tensor, stride: int | None):
    start = Cotangents(captured.target, len(cotangents), 0, lambda a, b: cotangents[a:b].clone())
    route = TrunkRoute(captured.graph, captured.units[:-1])
    return sweep(route, [start], lengths(captured.batch_size), strides=[stride])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_scaled_and_unscaled_sweeps_are_bit_equal(norm, dtype):
    model = MLP(depth=30, width=16, norm=norm, activation="relu", generator=seeded()).to(dtype)
    x = torch.randn(8, 16, generator=seeded(1)).to(dtype)
    captured = gs.capture(model, x)
    cotangents = torch.randn(6, 8, 16, generator=seeded(2)).to(dtype)
    plain = readings(captured, cotangents, None)
    for every in (1, 3, 8):
        scaled = readings(captured, cotangents, every)
        assert (scaled[0].exponents != plain[0].exponents).any()
        for a, b in zip(plain, scaled, strict=True):
            np.testing.assert_array_equal(*(np.ldexp(r.values, r.exponents[:, None]) for r in (a, b)))


class Slope(nn.Module):
    """Maps ones to ones, with a slope of its own."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x):
        return x * self.slope + (1 - self.slope)


@pytest.mark.parametrize("power", [4, -4])
def test_a_sweep_that_leaves_the_range_is_repeated_with_a_shorter_stride(power):
    depth = 60  # 2^(+-240) is beyond float32
    captured = gs.capture(nn.Sequential(*(Slope(2.0**power) for _ in range(depth))), torch.ones(2, 3))
    assert len(captured.graph.edges) < STRIDES[0]
    ones = Cotangents(captured.target, 1, 1, lambda a, b: torch.ones(1, 2, 3))
    gaps = []

    class Spy(TrunkRoute):
        def cross(self, upper, lower, cotangents, read):
            gaps.append(upper - lower)
            return super().cross(upper, lower, cotangents, read)

    def log2_lengths(**options):
        gaps.clear()
        found = sweep(Spy(captured.graph, captured.units[:-1]), [ones], lengths(), **options)
        with np.errstate(divide="ignore"):
            return [np.log2(r.values[0, 0] / math.sqrt(6)) + r.exponents[0] for r in found]

    expected = [power * (depth - row) for row in range(depth)]
    assert log2_lengths() == pytest.approx(expected, abs=1e-5)
    assert gaps[0] > 8 >= max(gaps[1:])
    # Without the repetition the numbers are wrong, or an error.
    try:
        wrong = log2_lengths(strides=STRIDES[:1])
    except FloatingPointError:
        return
    assert wrong != pytest.approx(expected, abs=1e-5)


def test_one_scale_serves_all_samples_of_a_cotangent():
    bundle = torch.tensor([[[1e20, 1.0], [3e-5, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    scaled, exponents = rescale(bundle)
    assert exponents.tolist() == [66, 0]  # 2^65 < 1e20 / sqrt(4) < 2^66
    np.testing.assert_array_equal(torch.ldexp(scaled[0], torch.tensor(66)), bundle[0])
    assert not scaled[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rescaling_is_exact_over_the_whole_range(dtype):
    info = torch.finfo(dtype)
    for value in (info.max, info.tiny, 1.0, 3.1415):
        bundle = torch.full((1, 2, 2), value, dtype=dtype)
        scaled, exponents = rescale(bundle)
        assert 0.25 <= float(scaled[0, 0, 0]) <= 4
        assert float(scaled[0, 0, 0]) * 2.0 ** int(exponents[0]) == float(bundle[0, 0, 0])


def test_a_trunk_of_complex_tensors():
    class Spectral(nn.Module):
        """A filter in the frequency domain: a circular convolution, whose Jacobian is a circulant matrix."""

        def __init__(self, seed: int):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=seeded(seed)))

        def forward(self, x):
            return torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(self.kernel)).real

    model = nn.Sequential(*(Spectral(seed) for seed in range(4)))
    x = torch.randn(3, 6, dtype=torch.float64, generator=seeded(9))
    profile = gs.gsc(model, x, probes="exact")
    J = torch.eye(6, dtype=torch.float64)
    for depth in reversed(range(4)):
        J = J @ torch.stack([model[depth].kernel.detach().roll(i) for i in range(6)], dim=1)
        f_k = model[:depth](x).detach()
        expected = J.square().sum() / 6 * f_k.square().sum() / (f_k @ J.T).square().sum()
        assert profile["input" if depth == 0 else str(depth - 1)].value == pytest.approx(float(expected), rel=1e-9)


class NotVectorizable(torch.autograd.Function):
    """x^2 with a backward that branches on its data, which vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g if g.sum().item() == g.sum().item() else g


def test_a_backward_that_cannot_be_vectorized_is_looped_with_the_same_numbers():
    class Square(nn.Module):
        def __init__(self, custom: bool):
            super().__init__()
            self.custom, self.scale = custom, nn.Parameter(torch.ones(()))

        def forward(self, x):
            x = x * self.scale
            return NotVectorizable.apply(x) if self.custom else x.square()

    x = 1 + 0.1 * torch.randn(4, 5, dtype=torch.float64, generator=seeded())
    a, b = (gs.gsc(nn.Sequential(*(Square(c) for _ in range(3))).double(), x, probes=3) for c in (True, False))
    np.testing.assert_array_equal(a.log10_values, b.log10_values)


def test_a_gradient_that_is_not_finite_names_its_layer():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (self.scale * x).abs().sqrt()

    x = torch.tensor([[0.0, 1.0]])
    with pytest.raises(FloatingPointError, match=r"gradient at layer 'input' is NaN or Inf"):
        gs.gsc(nn.Sequential(Root()), x)


@pytest.mark.slow
def test_eight_hundred_layers_of_relu_and_batch_norm():
    def profile(dtype):
        model = MLP(depth=800, width=100, norm="batch", activation="relu", generator=seeded()).to(dtype)
        return gs.gsc(model, torch.randn(100, 100, generator=seeded(1)).to(dtype), probes=4)

    single, double = profile(torch.float32), profile(torch.float64)
    assert np.isfinite(single.log10_values).all()
    assert single["input"].log10_value == pytest.approx(134.4, abs=2.5)
    # The two forward passes decorrelate (that is the explosion), so only their rates agree: within three standard
    # errors of the difference of two sums of 800 increments, which are 1 % of the rate.
    increments = [np.diff(p.log10_values[:, 0]) for p in (single, double)]
    stderr = np.std(increments[0] - increments[1], ddof=1) / math.sqrt(800)
    rates = [10 ** -np.mean(i) for i in increments]
    assert math.log(10) * 3 * stderr < 1.1e-2
    assert abs(rates[0] / rates[1] - 1) < math.log(10) * 3 * stderr
