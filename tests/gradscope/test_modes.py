"""Every forward pass of a measurement runs as the recorded one, whatever the caller's grad mode."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise


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
