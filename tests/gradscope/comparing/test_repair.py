"""Repairs: which parameters are scaled, where the scales end up, and the way back."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.comparing.repair.solving import solve
from gradscope.comparing.repair.stages import find_stages
from gradscope.models import GPT, MLP, ResNet
from tests.helpers import noise, seeded

WIDTH, DEPTH = 300, 6


def network(activation, weight_variance, bias_variance=0.0, width=WIDTH, depth=DEPTH):
    return MLP(
        depth=depth, width=width, activation=activation, weight_variance=weight_variance,
        bias=bias_variance > 0, bias_variance=bias_variance, generator=seeded(),
    ).double()  # fmt: skip


def fingerprint(model):
    return [parameter.detach().clone() for parameter in model.state_dict().values()]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


# ---- the solver, against closed forms -------------------------------------------------------------------------------

CURVES = {
    # ln GSC and ln rms of a factor exp(t), wished ln rms, and the expected factor and outcome
    "zero": (lambda t: (0.4 + 0.5 * t, t), 0.0, math.exp(-0.8), "goal"),
    "zero beyond 64": (lambda t: (0.5 * (t - 5), t), 0.0, math.exp(5), "goal"),
    "homogeneous": (lambda t: (0.3, t - 1.5), 0.0, math.exp(1.5), "length"),
    "homogeneous, no wish": (lambda t: (0.3, t - 1.5), None, 1.0, "length"),
    "normalized": (lambda t: (0.3, 0.7), 0.0, 1.0, "no effect"),
    # Without branch, x + c f(x) has GSC 1; ln(1 + c^2) = slack at the end of what is allowed.
    "limit": (lambda t: (math.log1p(math.exp(2 * t)), 0.0), 0.0, None, "nearest"),
    "hardly moves": (lambda t: (0.05 + 0.01 * t, 0.0), 0.0, 1.0, "nearest"),
    "dead below 1": (lambda t: (math.nan, math.nan) if t < 0 else (-1 + t, t), None, math.e, "goal"),
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_solver(curve):
    measure, length, factor, outcome = curve
    found = solve(measure, 0.0, length, 0.01)
    assert found.outcome == outcome
    assert found.evaluations <= 30
    if factor is not None:
        assert found.log_factor == pytest.approx(math.log(factor), abs=1e-4)
    else:
        # GSC - 1 is at most `slack` above that of the compromise between GSC and factor.
        assert 0 < measure(found.log_factor)[0] < 0.1


# ---- which parameters -----------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """x + a(x) + b(x): two branches of one skip."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))

    def forward(self, x):
        return x + self.a(x) + self.b(x)


class Projected(nn.Module):
    """A residual block whose skip has a weight of its own."""

    def __init__(self):
        super().__init__()
        self.branch, self.skip = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.branch(x) + self.skip(x))


def gpt(**options):
    return GPT(vocabulary=11, depth=2, width=8, heads=2, length=5, generator=seeded(), **options)


def stack(*blocks):
    return nn.Sequential(nn.Linear(6, 6), *blocks)


WRITES = {f"blocks.{n}": (f"blocks.{n}.attention.out.weight", f"blocks.{n}.mlp.out.weight") for n in range(2)}
SCALES = {
    "plain, with biases": (network("tanh", 1.0, 0.1, width=6, depth=1), {"layers.0": ("layers.0.linear.weight",)}),
    "leaves": (
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()),
        {"0": ("0.weight",), "2": ("2.weight",), "3": ("3.weight", "3.bias")},
    ),
    "residual": (
        MLP(depth=2, width=6, norm="layer", residual="identity"),
        {f"layers.{n}": (f"layers.{n}.out.weight",) for n in range(2)},
    ),
    "parallel branches": (stack(Parallel(), Parallel()), {
        "0": ("0.weight",), **{n: (f"{n}.a.weight", f"{n}.b.2.weight") for n in "12"},
    }),
    "projected skip": (stack(Projected(), Projected()), {
        "0": ("0.weight",), **{n: (f"{n}.branch.2.weight",) for n in "12"},
    }),
    "pre-norm": (gpt(), WRITES | {"norm": ("norm.weight",), "head": ("head.weight",)}),
    "post-norm": (gpt(norm="post"), WRITES | {"head": ("head.weight",)}),
    "gated, rms norm": (
        gpt(norm="pre", norm_kind="rms", mlp="swiglu"), WRITES | {"norm": ("norm.weight",), "head": ("head.weight",)},
    ),
}  # fmt: skip


def data_of(model):
    return torch.randint(11, (12, 5), generator=seeded()) if isinstance(model, GPT) else noise(12, 6).float()


def scales_of(model, data):
    captured = gs.capture(model, data)
    return {stage.layer: set(stage.parameters) for stage in find_stages(captured, captured.units)}


@pytest.mark.parametrize(("model", "scales"), SCALES.values(), ids=SCALES)
def test_scales(model, scales):
    model = model.float()
    assert scales_of(model, data_of(model)) == {unit: set(names) for unit, names in scales.items()}


def test_the_last_normalization_of_a_branch_is_its_scale():
    found = scales_of(ResNet(depth=8, width=4, generator=seeded()), noise(4, 3, 8, 8).float())
    blocks = {unit: names for unit, names in found.items() if unit.startswith("stage")}
    assert len(blocks) == 3
    assert all(names == {f"{unit}.0.norm2.weight", f"{unit}.0.norm2.bias"} for unit, names in blocks.items())


def test_tied_and_frozen_parameters_are_named_and_stay():
    model = gpt(tied=True)
    model.blocks[0].attention.out.weight.requires_grad_(False)
    plan = gs.repair(model, data_of(model), probes=2)
    assert plan.table.set_index("unit").loc["head", "outcome"] == "embedding.tokens.weight is used in several places"
    assert "embedding.tokens.weight" not in plan.factors
    assert "'head' is not scaled: embedding.tokens.weight is used in several places." in plan.remarks
    assert any("Frozen" in line and "blocks.0.attention.out.weight" in line for line in plan.remarks)
    assert "blocks.0.attention.out.weight" not in plan.factors


# ---- what is reached ------------------------------------------------------------------------------------------------


def variances(model):
    return [WIDTH * float(layer.linear.weight.detach().square().mean()) for layer in model.layers]


def test_he_is_recovered():
    model = network("relu", 0.3)
    plan = gs.repair(model, noise(256, WIDTH), probes=4)
    assert set(plan.table["outcome"]) == {"length"}
    plan.apply()
    found = variances(model)
    # The mean square of a ReLU layer of width n has the variance 5 / n, relative to its square; six layers.
    assert np.mean(found) == pytest.approx(2, abs=2 * 3 * math.sqrt(5 / WIDTH / DEPTH))
    np.testing.assert_allclose(plan.table["rms"], float(noise(256, WIDTH).square().mean().sqrt()), rtol=1e-4)


@pytest.mark.parametrize(
    ("activation", "start", "bias_variance"),
    [("tanh", 0.2, 0.1), ("tanh", 5.0, 0.1), ("selu", 3.0, 0.1), ("sigmoid", 1.0, 0.0)],
)
def test_critical_points_are_recovered(activation, start, bias_variance):
    """GSC = 1 makes the length constant, so from the second layer on the weights have the critical variance."""
    model = network(activation, start, bias_variance)
    plan = gs.repair(model, noise(256, WIDTH), probes=4)
    assert set(plan.table["outcome"]) == {"goal"}
    plan.apply()
    found = variances(model)[1:]
    point = gs.meanfield.critical_point(activation, bias_variance)
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert np.mean(found) == pytest.approx(point.weight_variance, abs=4 * error)
    assert error < 0.15 * point.weight_variance


def test_intervals_on_fresh_data_contain_the_goal():
    model = network("tanh", 3.0, 0.1, width=100, depth=4)
    plan = gs.repair(model, noise(800, 100), goal={"layers.1": 1.3}, fresh=noise(100, 100, seed=5), probes=24)
    table = plan.table
    assert table["goal"].tolist() == [1, 1.3, 1, 1]
    assert (table["low"] < table["goal"]).all() and (table["goal"] < table["high"]).all()
    assert ((table["gsc_before"] > 1.05 * table["goal"]) | (table["gsc_before"] < table["goal"] / 1.02)).all()


def test_local_gsc_is_that_of_a_dense_jacobian():
    model = network("tanh", 3.0, width=5, depth=3)
    x = noise(4, 5)
    frame = gs.repair(model, x, probes="exact").to_frame()
    before = frame[~frame["repaired"]]
    inputs = x
    for layer, value in zip(model.layers, before["value"], strict=True):
        jacobian = torch.autograd.functional.jacobian(layer, inputs).reshape(20, 20)
        outputs = layer(inputs).detach()
        expected = jacobian.square().sum() / 20 * inputs.square().sum() / outputs.square().sum()
        assert value == pytest.approx(float(expected), rel=1e-9)
        inputs = outputs
    gs.frames.check(frame)


def test_a_cancelled_scale_is_named_with_its_value():
    model = MLP(depth=3, width=40, norm="batch", generator=seeded()).double()
    plan = gs.repair(model, noise(64, 40), probes=4)
    assert set(plan.table["outcome"]) == {"no effect"} and plan.factors == {}
    gsc = plan.table["gsc"]
    expected = f"No scale of these units changes their output or their local GSC, which is {gsc.min():.4g} to"
    assert plan.remarks[0].startswith(expected)


def test_dropout_masks_are_the_same_for_all_factors():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3)]).double()
    for layer in model:
        nn.init.normal_(layer[0].weight, std=0.7, generator=seeded())
    before = torch.get_rng_state()
    first, second = (gs.repair(model, noise(32, 20), goal=1.6, probes=4).factors for _ in range(2))
    assert first == second and first
    assert torch.equal(before, torch.get_rng_state())


# ---- there and back -------------------------------------------------------------------------------------------------


def test_nothing_changes_before_apply_and_undo_restores_all_bits():
    model = network("tanh", 3.0, 0.1, width=20, depth=3)
    before = fingerprint(model)
    plan = gs.repair(model, noise(16, 20), probes=2)
    assert unchanged(model, before) and not plan.applied
    plan.apply()
    weights = dict(model.named_parameters())
    for (name, factor), old in zip(plan.factors.items(), before[::2], strict=True):
        torch.testing.assert_close(weights[name].detach(), old * factor)
    assert plan.applied
    with pytest.raises(ValueError, match="already applied"):
        plan.apply()
    plan.undo()
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="nothing to undo"):
        plan.undo()


def test_a_repair_does_not_overwrite_training():
    model = network("tanh", 3.0, 0.1, width=20, depth=2)
    plan = gs.repair(model, noise(16, 20), probes=2)
    plan.apply()
    with torch.no_grad():
        model.layers[1].linear.weight.add_(0.1)
    with pytest.raises(ValueError, match=r"'layers.1.linear.weight' has changed since apply\(\)"):
        plan.undo()
    stale = gs.repair(model, noise(16, 20), probes=2, goal=1.2)
    with torch.no_grad():
        model.layers[0].linear.weight.mul_(2)
    with pytest.raises(ValueError, match=r"'layers.0.linear.weight' has changed since the repair was computed"):
        stale.apply()


def test_a_failure_restores_the_model():
    model = network("tanh", 3.0, width=20, depth=3)
    before = fingerprint(model)

    def stop(fraction):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        gs.repair(model, noise(16, 20), probes=2, progress=stop)
    assert unchanged(model, before)


# ---- text and errors ------------------------------------------------------------------------------------------------


def test_text():
    plan = gs.repair(network("tanh", 3.0, width=20, depth=2), noise(16, 20), probes=2)
    assert repr(plan) == "Repair(2 units, 2 factors, not applied)"
    assert str(plan).startswith("2 units, 2 parameters with a factor other than 1; GSC on the batch of the solution")
    assert "layers.1" in str(plan) and "give fresh= to prove" in str(plan)
    assert "<table" in plan._repr_html_()


ERRORS = {
    "goal": ({"goal": {"layers.7": 1.2}}, "goal names 'layers.7', which is no unit with a scale"),
    "negative goal": ({"goal": -1.0}, "goal must be"),
    "length": ({"length": "output"}, "length must be a positive number"),
    "few": ({"fresh": noise(4, 20)}, "fresh is too small for intervals: give at least 10 samples"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        gs.repair(network("tanh", 3.0, width=20, depth=2), noise(16, 20), probes=2, **options)


def test_data_must_be_one_batch():
    with pytest.raises(ValueError, match="data must be one batch"):
        gs.repair(network("tanh", 3.0, width=20, depth=2), iter([noise(16, 20)]))


def test_fresh_batches_of_coupled_samples():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()).double()
    with pytest.raises(ValueError, match="give at least 10 batches as a loader or list, because samples"):
        gs.repair(model, noise(16, 6), fresh=[noise(16, 6, seed=n) for n in range(9)], probes=2)


def test_a_model_without_scales():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return torch.tanh(x) + self.shift

    with pytest.raises(ValueError, match="No unit has a trainable parameter that scales its output"):
        gs.repair(nn.Sequential(Shift(), Shift()), noise(8, 6).float())


def test_rows_must_lie_on_the_trunk():
    model = MLP(depth=2, width=6, residual="identity").double()
    with pytest.raises(ValueError, match="lies inside a branch"):
        gs.repair(model, noise(8, 6), layers=["input", "layers.0.linear", "layers.1"])
