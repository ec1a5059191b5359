"""Equivariance and invariance under translation, against modules whose symmetry is known."""

import math

import pytest
import torch
from torch import nn

from gradscope.measures import argmax_agreement, contrast, equivariance_error, invariance_error, shifted
from gradscope.measures.symmetry import FILLS, _interior, _nearest

ROUNDING = 1e-14


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def images(num=6, channels=2, side=12):
    return torch.randn(num, channels, side, side, dtype=torch.float64)


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs, dtype=torch.float64)


def ring(channels=2, **kwargs):
    """A convolution on a torus."""
    return conv(channels, 3, 3, padding=1, padding_mode="circular", **kwargs)


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (-3, 1), (0, -4)])
@pytest.mark.parametrize("fill", FILLS)
def test_shifted_moves_every_pixel_by_hand(shift, fill):
    x, (dx, dy) = images(side=6), shift
    moved = shifted(x, shift, fill)
    for row in range(6):
        for column in range(6):
            source = [row - dy, column - dx]
            if fill == "circular":
                source = [place % 6 for place in source]
            elif fill == "reflect":
                source = [abs(place) if place < 6 else 10 - place for place in source]
            inside = all(0 <= place < 6 for place in source)
            expected = x[:, :, source[0], source[1]] if inside else torch.zeros_like(x[:, :, 0, 0])
            assert torch.equal(moved[:, :, row, column], expected)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 2)])
def test_a_convolution_on_a_torus_is_equivariant(shift, circular):
    module = nn.Sequential(ring(), nn.ReLU(), ring(3))
    assert equivariance_error(module, images(), shift, circular=circular).value < ROUNDING


def test_a_strided_convolution_is_equivariant_for_multiples_of_its_stride_only():
    module = ring(stride=2)
    for shift, exact in (((2, 0), True), ((-4, 2), True), ((1, 0), False), ((2, 1), False), ((3, 0), False)):
        for circular in (False, True):
            error = equivariance_error(module, images(), shift, circular=circular).value
            assert error < ROUNDING if exact else error > 0.5


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, stride=3)])
def test_pooling_is_equivariant_for_multiples_of_its_stride(pool):
    stride = pool.stride
    assert equivariance_error(pool, images(), (stride, -stride)).value < ROUNDING
    assert equivariance_error(pool, images(), (1, 0)).value > 0.1


def test_zero_padding_breaks_it_at_the_border_only():
    module = conv(2, 3, 3, padding=1)
    assert equivariance_error(module, images(), (1, 1)).value < ROUNDING
    assert equivariance_error(module, images(), (1, 1), circular=True).value > 0.05


@pytest.mark.parametrize(
    "module",
    [
        conv(2, 2, 5),
        conv(2, 2, 5, padding=2),
        conv(2, 2, 3, dilation=2, padding=2),
        nn.Sequential(conv(2, 2, 3, padding=1), nn.MaxPool2d(2), conv(2, 2, 3, padding=1)),
    ],
    ids=["valid", "same", "dilated", "two"],
)
def test_the_interior_is_all_that_does_not_see_the_border(module):
    # Pixels outside are what a larger picture has there: an interior position must not notice them.
    large = torch.randn(4, 2, 48, 48, dtype=torch.float64)
    x, shift = large[:, :, 16:32, 16:32], (2, 0)
    assert equivariance_error(module, x, shift).value < ROUNDING
    with torch.no_grad():
        small, whole = module(x), module(large)
    stride = 1 if not isinstance(module, nn.Sequential) else 2
    whole = whole[:, :, 16 // stride :, 16 // stride :][:, :, : small.shape[2], : small.shape[3]]
    free = (small - whole).abs().amax(dim=(0, 1)) < 1e-12
    found = _interior(module, x, (0, 0), (0, 0), (stride, stride), small.shape[2:])
    assert torch.equal(found, free)


def test_a_map_moves_by_the_nearest_whole_number_of_positions():
    pairs = {(0, 2): 0, (1, 2): 0, (2, 2): 1, (3, 2): 1, (-1, 2): 0, (-3, 2): -1, (2, 4): 0, (3, 4): 1, (-3, 4): -1}
    assert {pair: _nearest(*pair) for pair in pairs} == pairs


def test_what_the_map_moves_over_must_be_inside_too():
    # Position i sees columns 4 i - 1 to 4 i + 4 of 16.  Moved by 3, columns 0 to 2 are brought in, so that 0 and 3 drop
    # out; the map moves by one position, and 1 would be compared with 0, which sees column -1.
    module = conv(2, 1, 6, stride=4, padding=1)
    inside = _interior(module, images(side=16), (3, 0), (1, 0), (4, 4), (4, 4))
    assert inside.any(dim=0).tolist() == [False, False, True, False]


def test_a_gain_that_depends_on_the_position_is_not_equivariant_by_hand():
    class Gain(nn.Module):
        def forward(self, x):
            return x * torch.arange(1, x.shape[3] + 1, dtype=x.dtype)

    x = torch.ones(3, 1, 4, 6, dtype=torch.float64)
    # Moved by 1, columns 1 .. 5 of f(T x) are 2 .. 6 and those of T' f(x) are 1 .. 5.
    expected = math.sqrt(5 / (1 + 4 + 9 + 16 + 25))
    assert equivariance_error(Gain(), x, (1, 0)).value == pytest.approx(expected, rel=1e-12)


def test_global_pooling_after_it_is_invariant_and_a_linear_layer_is_not():
    pooled = nn.Sequential(ring(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert invariance_error(pooled, images(), (3, 1), fill="circular").value < ROUNDING
    assert argmax_agreement(pooled, images(), (3, 1), fill="circular").value == 1
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12 * 12, 5, dtype=torch.float64))
    # Pixels are independent, so that a moved image is another one: |A (Tx - x)|^2 is 2 |A x|^2 but for the bias.
    assert invariance_error(linear, images(64), (1, 0), fill="circular").value == pytest.approx(math.sqrt(2), rel=0.15)


def test_values_and_errors_by_hand():
    class Scale(nn.Module):
        """Twice the pixel in the upper left corner."""

        def forward(self, x):
            return 2 * x[:, :, 0, 0]

    x = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    x[0, 0, 0], x[1, 0, 0] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    # Moved around, f goes from 2 to 4 and from 4 to 8: differences 2 and 4, lengths 2 and 4.
    found = invariance_error(Scale(), x, (1, 0), fill="circular")
    assert (found.value, found.stderr) == (1.0, None)  # two images do not show an error
    # f is 2 and 4: the distance of two of them is 2, mean |f|^2 is 10.
    assert contrast(Scale(), x).value == pytest.approx(2 / math.sqrt(10), rel=1e-12)
    found = argmax_agreement(nn.Flatten(), torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]]), (1, 0), fill="zeros")
    assert (found.value, found.stderr) == (0.5, None)


def test_the_standard_error_covers():
    model = nn.Sequential(conv(2, 3, 3), nn.ReLU(), nn.Flatten())
    truth = invariance_error(model, images(4000), (1, 0)).value
    found = [invariance_error(model, images(40), (1, 0)) for _ in range(100)]
    covered = sum(abs(estimate.value - truth) < 2 * estimate.stderr for estimate in found)
    assert covered >= 88  # 95 expected; fewer than 88 has a probability of 0.2 %


def test_the_module_is_left_as_it_was():
    model = nn.Sequential(conv(2, 3, 3), nn.BatchNorm2d(3, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="border"):  # batch statistics mix all
        equivariance_error(model, images(), (1, 0))
    invariance_error(model, images(), (1, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert equivariance_error(model.eval(), images(), (1, 0)).value < ROUNDING


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        shifted(torch.ones(2, 3), (1, 0))
    with pytest.raises(ValueError, match=r"fill.*'edge'"):
        shifted(images(), (1, 0), "edge")
    with pytest.raises(ValueError, match="12 x 12"):
        shifted(images(), (0, 12))
    with pytest.raises(ValueError, match=r"\(6, 288\).*invariance_error"):
        equivariance_error(nn.Flatten(), images(), (1, 0))
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d.*stride"):
        equivariance_error(nn.AdaptiveAvgPool2d(2), images(), (1, 0))
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(288, 288, dtype=torch.float64), nn.Unflatten(1, (2, 12, 12)))
    with pytest.raises(ValueError, match=r"Sequential.*one image size"):
        equivariance_error(fixed, images(), (1, 0))
    with pytest.raises(ValueError, match="circular"):
        equivariance_error(conv(2, 2, 3), images(), (1, 0), circular=True)
    with pytest.raises(ValueError, match="border"):
        equivariance_error(conv(2, 2, 7, padding=3), images(side=8), (3, 0))
    with pytest.raises(ValueError, match="two images"):
        invariance_error(nn.Flatten(), images(1), (1, 0))
    with pytest.raises(ValueError, match="zero"):
        invariance_error(nn.Flatten(), torch.zeros(2, 1, 4, 4), (1, 0))
    with pytest.raises(ValueError, match="num_classes"):
        argmax_agreement(nn.ReLU(), images(), (1, 0))
