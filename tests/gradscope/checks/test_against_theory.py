"""Reading a network, and holding it against theory: what is read, what is refused, and which layer is blamed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
import gradscope.meanfield as mf
from gradscope.checks.reading import UnreadableError, read
from gradscope.models import MLP
from tests.helpers import noise, seeded


def test_a_plain_network_is_read():
    model = MLP(depth=3, width=20, activation="tanh", norm="layer", bias=True, generator=seeded(), out_features=5)
    model = model.double()
    x = noise(8, 20)
    reading = read(model, x)
    assert [layer.name for layer in reading.layers] == ["layers.0", "layers.1", "layers.2", "head"]
    assert [layer.spec.norm for layer in reading.layers] == ["layer"] * 3 + ["none"]
    assert [layer.spec.activation.name for layer in reading.layers] == ["Tanh"] * 3 + ["linear"]
    weight = model.layers[1].linear.weight.detach()
    assert reading.layers[1].spec.weight_variance == pytest.approx(20 * float(weight.square().mean()))
    assert (reading.layers[3].fan_in, reading.layers[3].width) == (20, 5)
    assert reading.mean_square == pytest.approx(float(x.square().mean()))
    cosine = (x @ x.T).numpy()
    off = (cosine.sum() - np.trace(cosine)) / 56
    assert reading.correlation == pytest.approx(off / (np.trace(cosine) / 8))
    h = model.layers[0].linear(x).detach()
    units = h / h.norm(dim=1, keepdim=True)
    weights = np.outer(h.square().sum(1), h.square().sum(1))
    assert reading.layers[0].overlap == pytest.approx(
        float((((units @ units.T) ** 2).numpy() * weights).sum() / weights.sum())
    )


def test_residual_blocks_are_read():
    model = MLP(
        depth=3, width=20, residual="identity", skip_weight=0.7, activation="gelu", norm="batch", generator=seeded()
    )
    reading = read(model.double(), noise(8, 20))
    assert [layer.name for layer in reading.layers] == ["layers.0", "layers.1", "layers.2"]
    block = reading.layers[1].spec
    assert block.skip_weight == pytest.approx(0.7, rel=1e-5)
    assert block.branch_variance == pytest.approx(20 * float(model.layers[1].out.weight.detach().square().mean()))


@pytest.mark.parametrize(
    ("module", "kinks"),
    [
        (nn.LeakyReLU(0.3), (0.0,)),
        (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0)),
        (nn.GELU(approximate="tanh"), ()),
        (nn.ELU(0.4), (0.0,)),
    ],
)
def test_nonlinearities_are_taken_from_the_module(module, kinks):
    (layer, _) = read(nn.Sequential(nn.Linear(6, 9), module, nn.Linear(9, 2)).double(), noise(5, 6)).layers
    phi, h = layer.spec.activation, np.linspace(-3, 3, 11) + 0.01
    np.testing.assert_allclose(phi(h), module(torch.from_numpy(h)).numpy(), rtol=1e-12)
    np.testing.assert_allclose(phi.derivative(h), (phi(h + 1e-6) - phi(h - 1e-6)) / 2e-6, atol=1e-8)
    assert phi.kinks == kinks


class Skewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):
        return self.b(2 * self.act(self.a(x)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()), "'0' is of class Conv1d; a layer should begin with a Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4).eval()), "'2' uses running statistics"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Hardshrink()), "Nonlinearity '2' is a Hardshrink"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(12, 4), Skewed()),
            "Layer '2.b' is not a linear map of the layer before",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 12), *[nn.Linear(12, 12)] * 2), "Module '2' is called twice"),
    ],
)
def test_what_cannot_be_read(model, message):
    with pytest.raises(UnreadableError, match=message):
        gs.compare(model.double(), noise(6, 3, 4))


def test_trained_scales_of_a_normalization_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()).double()
    nn.init.constant_(model[1].weight, 2.0)
    with pytest.raises(UnreadableError, match="Layer '1' is not a normalization without trained scale and shift"):
        read(model, noise(6, 4))


def test_a_single_sample_is_refused():
    with pytest.raises(UnreadableError, match="give at least two"):
        read(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), noise(1, 4))


def network(activation, seed, fault=None, norm="none", width=200, depth=30):
    generator = torch.Generator().manual_seed(seed)
    model = MLP(depth=depth, width=width, activation=activation, norm=norm, generator=generator)
    if fault is not None:
        with torch.no_grad():
            model.layers[fault].linear.weight.mul_(1.3)
    return model, torch.randn(16, width, generator=generator)


@pytest.mark.parametrize(("activation", "fault"), [("tanh", 0), ("tanh", 11), ("selu", 20), ("selu", 29)])
def test_a_planted_fault_is_named(activation, fault):
    found = gs.compare(*network(activation, 1, fault), probes=gs.Deflated(2, 2))
    assert found.first_deviation == f"layers.{fault}" == found.first_weight_outlier
    assert str(found).startswith(f"most conspicuous layer: layers.{fault}: ")
    assert len(found.to_frame()) == 30


def test_healthy_networks_raise_no_alarm_and_scores_are_standard():
    z = []
    for activation, norm in (("tanh", "none"), ("selu", "none"), ("tanh", "layer"), ("relu", "none")):
        found = gs.compare(*network(activation, 2, norm=norm, depth=50), probes=gs.Deflated(2, 2))
        assert found.first_deviation is None and found.first_weight_outlier is None, str(found)
        assert str(found).startswith("no layer deviates") and len(found.judged) == 50
        z.append(found.z_length)
    assert 0.8 < np.std(z) < 1.25


def test_where_coefficients_do_not_see_a_gain_the_weights_are_reported():
    for activation, norm in (("relu", "batch"), ("tanh", "layer")):
        found = gs.compare(*network(activation, 3, 20, norm=norm), probes=gs.Deflated(2, 2))
        assert found.first_weight_outlier == "layers.20"


def test_measured_variances_explain_a_fault_away():
    found = gs.compare(*network("tanh", 1, 11), expected={"initialization": "measured"}, probes=gs.Deflated(2, 2))
    assert found.first_deviation is None and found.first_weight_outlier is None
    with pytest.raises(ValueError, match="initialization must be"):
        gs.compare(*network("tanh", 1), expected={"initialization": "he"})


def test_too_large_a_batch_for_batch_normalization():
    model = MLP(depth=8, width=20, norm="batch", generator=seeded())
    with pytest.warns(UserWarning, match="Batch normalization of 30 samples at width 20"):
        gs.compare(model, noise(30, 20).float())


def test_critical_initialization():
    model = nn.Sequential(*(m for _ in range(40) for m in (nn.Linear(300, 300), nn.Tanh()))).double()
    for orthogonal in (False, True):
        point = gs.initializers.critical(
            model, "tanh", bias_variance=0.05, orthogonal_weights=orthogonal, generator=seeded()
        )
        scales = mf.MeanField("tanh", point.weight_variance, 0.05).depth_scales()
        assert scales.chi_1 == pytest.approx(1)
        found = gs.compare(
            model, noise(16, 300), expected={"initialization": point.weight_variance}, probes=gs.Deflated(2, 2)
        )
        assert found.first_deviation is None
        lengths = [layer.received for layer in found.reading.layers[10:]]
        assert np.mean(lengths) == pytest.approx(point.length, rel=0.1)
    with pytest.raises(ValueError, match="Sequential"):
        gs.initializers.critical(nn.Sequential(nn.Tanh()), "tanh")


def test_nlc_of_affine_and_elementwise_maps():
    x = noise(300, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    affine = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    assert gs.nlc(affine, x, probes="exact").value == pytest.approx(1, rel=1e-12)
    shifted = gs.nlc(affine, x, probes=8)
    assert abs(shifted.value - 1) < 4 * shifted.stderr
    for module, expected in ((nn.ReLU(), 1.21117), (nn.Tanh(), 1.08527)):
        found = gs.nlc(module, noise(1500, 10), probes="exact")
        assert abs(found.value - expected) < 4 * found.stderr < 0.05


def test_nlc_by_brute_force_in_any_batching():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.SELU()).double(), 2 * noise(30, 5)
    J = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
    centred = x - x.mean(0)
    numerator = torch.einsum("bij,cj->bci", J, centred).square().sum(2).mean()
    f = model(x).detach()
    expected = math.sqrt(float(numerator / (f - f.mean(0)).square().sum(1).mean()))
    whole = gs.nlc(model, x, probes="exact")
    assert whole.value == pytest.approx(expected, rel=1e-10) and whole.num_probes == 0
    assert gs.nlc(model, [x[:4], x[4:]], probes="exact").value == pytest.approx(expected, rel=1e-10)
    assert gs.nlc(model, iter(x.split(3)), probes="exact").stderr == pytest.approx(whole.stderr, rel=1e-10)
    assert gs.nlc(model, x[:29], probes="exact").stderr is None  # too few samples
    # An affine map of the data before it changes nothing.
    mixed = nn.Sequential(nn.Linear(5, 5).double(), model)
    moved = torch.linalg.solve(mixed[0].weight.detach(), (x - mixed[0].bias.detach()).T).T
    assert gs.nlc(mixed, moved, probes="exact").value == pytest.approx(expected, rel=1e-8)


def test_the_error_of_nlc_is_what_repetitions_show():
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2)).double()
    found = [gs.nlc(model, noise(100, 4, seed=seed), probes="exact") for seed in range(60)]
    assert np.mean([e.stderr for e in found]) == pytest.approx(np.std([e.value for e in found]), rel=0.3)


def test_nlc_where_samples_are_coupled_and_deep():
    x = noise(20, 12)
    model = MLP(depth=400, width=12, norm="batch", activation="tanh", generator=seeded()).double()
    found = gs.nlc(model, x, probes=2)
    assert math.isfinite(found.log10_value) and found.log10_value > 10


def test_nlc_refusals():
    model = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match="it needs at least two samples"):
        gs.nlc(model, noise(1, 3))
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="The target is the same for all samples"):
        gs.nlc(model, noise(4, 3))
    with pytest.raises(ValueError, match=r'probes must be a whole number >= 1, "exact" or "auto"; got 0'):
        gs.nlc(model, noise(4, 3), probes=0)
