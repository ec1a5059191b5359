"""Coefficients of parameters against Jacobians by brute force, closed forms, and tied, frozen and unused weights."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from gradscope.backward.cotangents import signs
from gradscope.coefficients.growth import fit_growth
from tests.helpers import noise


class Branched(nn.Module):
    """A residual branch, batch normalization, a module called twice, one that is never used and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.norm = nn.Linear(5, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.last, self.unused, self.frozen = nn.Linear(6, 3), nn.Linear(2, 2), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.twice(h))
        return self.frozen(self.last(torch.tanh(self.twice(self.norm(h)))))


class Tied(nn.Module):
    """An embedding whose weights are also those of the head; integers go in."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(checkpoint(lambda h: torch.tanh(self.b(h)), h, use_reentrant=False))


def brute_force(model, x, owners):
    """GSC and qm norm from the Jacobian with respect to all parameters at once."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    output = model(x).detach()
    jacobians = torch.autograd.functional.jacobian(
        lambda *values: functional_call(model, dict(zip(parameters, values, strict=True)), (x,)),
        tuple(parameters.values()),
    )
    jacobians = dict(zip(parameters, jacobians, strict=True))
    for owner in owners:
        own = [n for n in parameters if n.rpartition(".")[0] == owner]
        square, num = sum(float(jacobians[n].square().sum()) for n in own), sum(parameters[n].numel() for n in own)
        weight = sum(float(parameters[n].square().sum()) for n in own)
        yield owner, square / num * weight / float(output.square().sum()), math.sqrt(square / num)


MODELS = {
    "branched": (Branched, noise(4, 5)),
    "tied": (Tied, torch.tensor([[1, 2, 0], [4, 4, 6]])),
    "checkpointed": (Checkpointed, noise(3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_against_brute_force(name):
    make, x = MODELS[name]
    torch.manual_seed(1)
    model = make().double()
    frame = gs.parameter_gsc(model, x, probes="exact").to_frame()
    values = frame.set_index(["quantity", "layer"])["value"]
    owners = list(dict.fromkeys(frame["layer"]))
    assert "frozen" not in owners
    for owner, expected, qm_norm in brute_force(model, x, owners):
        assert values["parameter_gsc", owner] == pytest.approx(expected, rel=1e-10), owner
        assert values["parameter_qm_norm", owner] == pytest.approx(qm_norm, rel=1e-10), owner
    assert (frame["num_probes"] == 0).all() and (frame["log10_stderr_probe"] == 0).all()


def test_probes_agree_within_their_errors():
    torch.manual_seed(1)
    model, x = Branched().double(), noise(16, 5)
    exact = gs.parameter_gsc(model, x, probes="exact").to_frame()
    probed = gs.parameter_gsc(model, x, probes=400).to_frame()
    live = exact["value"] > 0
    z = (probed["log10_value"] - exact["log10_value"])[live] / probed["log10_stderr_probe"][live]
    assert z.abs().max() < 4 and z.abs().max() > 0
    assert (probed["log10_stderr_probe"][live] < 0.05).all()


@pytest.mark.parametrize("num", [2, 6])
def test_the_interval_of_the_qm_norm_in_closed_form(num):
    # f = w x has the Jacobian x with respect to w, so |T^T v|^2 = (v . x)^2 for the signs v of each probe.
    model, x = nn.Linear(1, 1, bias=False).double(), noise(5, 1)
    profile = gs.parameter_gsc(model, x, probes=num, generator=torch.Generator().manual_seed(3))
    rows = profile.to_frame().set_index("quantity")
    captured = gs.capture(model, x)
    v = signs(captured.target, num, torch.Generator().manual_seed(3)).draw(0, num).reshape(num, 5)
    squares = (v @ x)[:, 0].square().numpy()
    mean, relative = squares.mean(), squares.var(ddof=1) / num / squares.mean() ** 2
    assert rows.loc["parameter_qm_norm", "value"] == pytest.approx(math.sqrt(mean), rel=1e-10)
    assert profile.relative_error == pytest.approx(math.sqrt(relative), rel=1e-10)
    # A scaled chi-square with the same relative variance, widened by Student's t.
    k, wider = 2 / relative, stats.t.ppf(0.975, num - 1) / stats.norm.ppf(0.975)
    for end, quantile in (("log10_low", 0.975), ("log10_high", 0.025)):
        factor = (k / stats.chi2.ppf(quantile, k)) ** wider
        assert rows.loc["parameter_qm_norm", end] == pytest.approx(math.log10(mean * factor) / 2, abs=1e-8)
        weight = float(model.weight.detach().square() / model(x).detach().square().sum())
        assert rows.loc["parameter_gsc", end] == pytest.approx(math.log10(mean * factor * weight), abs=1e-8)


def test_a_linear_layer_in_closed_form():
    # f = W x with orthonormal W: |T|_F^2 = d |X|^2, so GSC = d |X|^2 / (d d') * |W|^2 / |X|^2 = 1.
    model = nn.Linear(4, 4, bias=False).double()
    nn.init.orthogonal_(model.weight)
    frame = gs.parameter_gsc(model, noise(3, 4), probes="exact").to_frame()
    assert frame["layer"].iloc[0] == "Linear"
    assert frame["value"].iloc[0] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("a", [2.0, 0.5])
def test_no_overflow_at_any_depth(a):
    # Slopes of a at every one of 700 layers while the outputs stay at 1: a^(2 k) for the layer k below the target.
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.full((1,), 1 - a))

        def forward(self, x):
            return a * x + self.bias

    depth = 700
    model = nn.Sequential(*(Layer() for _ in range(depth)))
    frame = gs.parameter_gsc(model, torch.ones(2, 1), probes="exact").to_frame()
    gsc = frame[frame["quantity"] == "parameter_gsc"]["log10_value"].to_numpy()
    slope = 2 * math.log10(a) * np.arange(depth)[::-1]
    np.testing.assert_allclose(gsc, slope + 2 * math.log10(abs(1 - a)), atol=1e-6 * abs(slope).max() + 1e-12)


def test_with_a_loss_and_a_target_inside():
    torch.manual_seed(1)
    model, x, y = Branched().double(), noise(5, 5), torch.arange(5) % 3

    def losses(output, labels):
        return functional.cross_entropy(output, labels, reduction="none")

    frame = gs.parameter_gsc(model, (x, y), loss_fn=losses, probes="exact").to_frame()
    assert set(frame["target"]) == {"loss"}
    inside = (
        gs.parameter_gsc(model, x, target="norm", probes="exact").to_frame().set_index(["quantity", "layer"])["value"]
    )
    assert inside["parameter_gsc", "last"] == 0 < inside["parameter_gsc", "first"]


def test_the_result_is_a_profile_of_modules_without_the_target():
    model = gs.models.MLP(depth=12, width=8, activation="selu", generator=torch.Generator().manual_seed(0)).double()
    exact = gs.parameter_gsc(model, noise(6, 8), probes="exact")
    assert len(exact.layers) == 12 and exact.target == "layers.11" and exact.target not in exact.layers
    values = exact.log10_values[:, 0]
    expected = fit_growth(values, np.arange(12, 0, -1), log10_total=(values[0], values[0]))
    assert exact.growth() == expected
    np.testing.assert_array_equal(exact.interval()[0], exact.log10_values)
    probed = gs.parameter_gsc(model, noise(6, 8), probes=64)
    low, high = probed.interval()
    assert ((low < exact.log10_values) & (exact.log10_values < high)).mean() > 0.8
    assert probed.relative_error > 0 == exact.relative_error


def test_running_out_of_memory_and_links_change_no_number(monkeypatch):
    """The promises of the one sweep hold for parameters, too."""
    model = gs.models.MLP(depth=4, width=8, activation="tanh", generator=torch.Generator().manual_seed(0)).double()
    whole = gs.parameter_gsc(model, noise(3, 8), probes="exact").log10_values
    monkeypatch.setattr("gradscope.backward.sweep.batch_bytes", lambda device: 1)
    np.testing.assert_allclose(gs.parameter_gsc(model, noise(3, 8), probes="exact").log10_values, whole, atol=1e-12)
    monkeypatch.setattr("gradscope.backward.route.WORTHWHILE", 10**9)
    np.testing.assert_allclose(gs.parameter_gsc(model, noise(3, 8), probes="exact").log10_values, whole, atol=1e-12)


def test_refusals():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="probes must be"):
        gs.parameter_gsc(model, torch.randn(2, 3), probes=0)
    with pytest.raises(ValueError, match=r"No parameter of the model requires a gradient.*requires_grad_\(\)"):
        gs.parameter_gsc(model.requires_grad_(False), torch.randn(2, 3))


def test_an_output_of_zero_has_no_parameter_gsc():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    with pytest.raises(gs.ZeroOutputError, match="The output of layer '1' is zero for the whole batch"):
        gs.parameter_gsc(model, torch.ones(4, 3))
