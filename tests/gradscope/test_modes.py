"""Every forward pass of a measurement runs as the recorded one, whatever the caller's grad mode."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.checks.segments import segments, siblings
from gradscope.checks.siblings import _numbers
from gradscope.initializers import lsuv
from gradscope.measures import argmax_agreement, contrast, equivariance_error, invariance_error
from tests.helpers import noise, seeded


class ModeDependent(nn.Module):
    """Another network without gradients, as some modules of torch are."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.act(h if torch.is_grad_enabled() and h.requires_grad else 100 + 0 * h))


class Plain(ModeDependent):
    def forward(self, x):
        return self.last(self.act(self.first(x)))


def losses(f, y):
    return nn.functional.cross_entropy(f, y, reduction="none")


def numbers(model, initial, x, y):
    """Every quantity of a model, as arrays."""
    captured = gs.capture(model, x)
    frames = {
        "gsc": gs.gsc(model, x, probes="exact"),
        "deflated": gs.gsc(model, x, probes=gs.Deflated(2, 2)),
        "matrix": gs.gsc_matrix(model, x),
        "parameters": gs.parameter_gsc(model, x),
        "depth": gs.effective_depth(model, x, initial=initial),
    }
    found = {name: frame.to_frame()["log10_value"].to_numpy() for name, frame in frames.items()}
    found["measure"] = gs.measure(model, (x, y), loss_fn=losses)["value"].to_numpy()
    found["taylor"] = gs.taylor_losses(model, (x, y), initial=initial, loss_fn=losses)["value"].to_numpy()
    found["nlc"] = np.array(gs.nlc(model, x, probes="exact").value)
    jacobian = captured.jacobian("input", "last")
    found["dense"] = jacobian.dense().numpy()
    found["product"] = jacobian.matvec(torch.ones(jacobian.shape[1], dtype=x.dtype)).numpy()
    found["value"] = jacobian.linearize()(torch.zeros_like(x)).numpy()
    found["coupled"] = np.array(captured.coupled)
    assert gs.check(model, x).passed, str(gs.check(model, x))
    str(captured.describe())
    return found


def same(found, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    initial = ModeDependent().double()
    model = copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    plain, before = Plain().double(), Plain().double()
    plain.load_state_dict(model.state_dict())
    before.load_state_dict(initial.state_dict())
    x, y = noise(6, 4), torch.randint(3, (6,))
    return model, initial, x, y, numbers(plain, before, x, y)


def test_no_pass_shows_the_network_without_gradients(networks):
    model, initial, x, y, expected = networks
    same(numbers(model, initial, x, y), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_changes_nothing(networks, mode):
    model, initial, x, y, expected = networks
    with mode():
        same(numbers(model, initial, x, y), expected)
        made_inside = x * 1, y * 1
        same(numbers(model, initial, *made_inside), expected)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    same(numbers(model, initial, *made_inside), expected)


def test_frozen_parameters_do_not_change_the_way_to_run(networks):
    model, _, x, _, expected = networks
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert gs.nlc(frozen, x, probes="exact").value == pytest.approx(float(expected["nlc"]), rel=1e-12)


def test_tokens_and_labels_made_under_inference_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens, labels = torch.randint(5, (4, 3)), torch.randint(3, (4,))
    expected = gs.gsc(model, (tokens, labels), loss_fn=losses, probes="exact").log10_values
    with torch.inference_mode():
        made = tokens * 1, labels * 1
    np.testing.assert_array_equal(gs.gsc(model, made, loss_fn=losses, probes="exact").log10_values, expected)
    assert made[0].is_inference()


def test_buffers_made_under_inference_mode_are_measured_and_parameters_are_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"Parameter '0.weight' was made under torch.inference_mode\(\)"):
        gs.gsc(model, torch.randn(4, 3))
    ordinary = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ordinary[1].running_mean = model[1].running_mean
    assert gs.gsc(ordinary.eval(), torch.randn(4, 3)).layers == ("input", "0", "1")


class Padded(nn.Module):
    """In eval mode and without gradients, torch zeroes padded positions by nested tensors."""

    def __init__(self, nested):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inp, self.act, self.head = nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x, pad):
        return self.head(self.act(self.encoder(self.inp(x), src_key_padding_mask=pad)))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_path_of_a_transformer_encoder_is_never_taken(frozen):
    torch.manual_seed(0)
    model, plain = Padded(True).double().eval(), Padded(False).double().eval()
    plain.load_state_dict(model.state_dict())
    model.requires_grad_(not frozen)
    pad = torch.arange(5) >= torch.tensor([5, 4, 3])[:, None]
    data = {"x": noise(3, 5, 3), "pad": pad}
    expected, found = (gs.nlc(network, data, probes="exact").value for network in (plain, model))
    assert found == pytest.approx(expected, rel=1e-10)
    statistics = [gs.measure(network, data)["value"].to_numpy() for network in (plain, model)]
    np.testing.assert_allclose(*statistics, rtol=1e-10, atol=1e-14)  # one mean is 0
    assert gs.check(model, data).passed


def test_memory_of_a_pass_is_released(networks):
    model, _, x, _, _ = networks
    kept = gs.capture(model, x).replay.outputs({"first"}, {})["first"]
    assert not kept.requires_grad


class Block(nn.Module):
    """Without gradients another function of the same parameters."""

    def __init__(self, moded, layer):
        super().__init__()
        self.moded, self.layer = moded, layer

    def forward(self, x):
        h = self.layer(x)
        return torch.tanh(h) if not self.moded or (torch.is_grad_enabled() and h.requires_grad) else torch.tanh(50 * x)


def blocks(moded):
    torch.manual_seed(0)
    maps = Block(moded, nn.Conv2d(2, 2, 3, padding=1))
    chain = nn.Sequential(*(Block(moded, nn.Linear(4, 4)) for _ in range(5)))
    return [model.double().requires_grad_(False) for model in (maps, chain)]


def block_numbers(maps, chain, images, x):
    """Symmetry of a convolution, LSUV, and the numbers by which siblings are compared."""
    model = nn.Sequential(maps, nn.Flatten())
    found = [
        equivariance_error(maps, images, (1, 2)).value,
        equivariance_error(maps, images, (1, 2), circular=True).value,
        invariance_error(maps, images, (1, 2)).value,
        contrast(model, images).value,
        argmax_agreement(model, images, (3, 0)).value,
        *lsuv(chain, x, tolerance=1e-3, generator=seeded()).values(),
        *(float(block.layer.weight.norm()) for block in chain),
    ]
    for group in siblings(segments(chain, x)):
        found += [number for pair in _numbers(group[0], group[1]).values() for number in pair]
    return found


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_symmetry_initialization_and_siblings_run_as_every_measurement(mode):
    images, x, moded = noise(4, 2, 12, 12), noise(9, 4), blocks(True)
    expected = block_numbers(*blocks(False), images, x)
    with mode():
        found = block_numbers(*moded, images, x)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert len(found) > 20
    assert not images.requires_grad


def test_every_measurement_refuses_parameters_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh()).requires_grad_(False)
    images = torch.randn(3, 2, 9, 9)
    for measure in (
        gs.gsc,
        gs.measure,
        gs.first_nonfinite,
        gs.Monitor,
        gs.check,
        gs.compare,
        lsuv,
        contrast,
        lambda model, x: equivariance_error(model, x, (1, 0)),
    ):
        with pytest.raises(ValueError, match=r"'0.weight' was made under torch.inference_mode\(\), .* build or load"):
            measure(model, images)


def test_a_frozen_model_is_compared_with_its_siblings():
    model = gs.models.MLP(depth=6, width=20, generator=seeded())
    expected = str(gs.compare(model, noise(9, 20).float()))
    assert str(gs.compare(model.requires_grad_(False), noise(9, 20).float())) == expected
