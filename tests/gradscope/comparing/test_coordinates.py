"""Coordinate check: lengths by hand, exponents by SciPy, and verdicts on networks whose parametrization is known."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.optim import SGD, Adam

import gradscope as gs
from benchmarks.scaling import features, gpt, loss, mlp, residual_mlp, text
from gradscope.comparing.coordinates.parametrizations import Expectation, role_of
from tests.helpers import noise, seeded

X, Y = noise(5, 3), noise(5, 1, seed=2)


def squares(output, labels):
    return (output - labels).square().mean(1)


def small(width, *, middle=None, rate=0.1, make=SGD):
    """A network with one hidden layer, and optionally a module between hidden layer and readout."""
    modules = [nn.Linear(3, width, bias=False), nn.Tanh(), middle or nn.Identity(), nn.Linear(width, 1, bias=False)]
    model = nn.Sequential(*modules).double()
    return model, make(model.parameters(), lr=rate)


def check(factory, data=(X, Y), **options):
    given = {"loss_fn": squares, "widths": [4, 8, 16], "seeds": 3, "steps": 2} | options
    return gs.coordinate_check(factory, data, **given)


def by_hand(width, seed, steps):
    """log10 of all lengths of `small`, from matrix products alone."""
    torch.manual_seed(seed)
    first, _, _, last = small(width)[0]
    U, V = first.weight.detach().numpy().copy(), last.weight.detach().numpy().copy()
    x, y, start, found = X.numpy(), Y.numpy(), None, {}

    def rms(a):
        return math.log10(math.sqrt(np.mean(a**2)))

    for step in range(steps + 1):
        h = x @ U.T
        a = np.tanh(h)
        f = a @ V.T
        df = 2 * (f - y) / len(x)
        dh = df @ V * (1 - a**2)
        start = start or (U.copy(), V.copy(), h, a, f)
        found |= {("0", "activation_rms", step): rms(h), ("3", "activation_rms", step): rms(f)}
        found |= {("0", "activation_gradient_rms", step): rms(dh), ("3", "activation_gradient_rms", step): rms(df)}
        jacobian = V * (1 - a**2)
        gsc = (jacobian**2).sum() / h.size * (h**2).sum() / (f**2).sum()
        found |= {("0", "gsc", step): math.log10(gsc)}
        if step:
            U0, V0, h0, a0, f0 = start
            found |= {("0", "activation_change_rms", step): rms(h - h0), ("0", "update_rms", step): rms(U - U0)}
            found |= {("3", "activation_change_rms", step): rms(f - f0), ("3", "update_rms", step): rms(V - V0)}
            found |= {("0", "update_effect_rms", step): rms(x @ (U - U0).T)}
            found |= {("3", "update_effect_rms", step): rms(a0 @ (V - V0).T)}
        U, V = U - 0.1 * dh.T @ x, V - 0.1 * df.T @ a
    return found


def test_lengths_are_those_computed_by_hand():
    result = check(small, widths=[4, 6], seeds=[3, 8])
    gs.frames.check(result.frame)
    for (width, seed), part in result.frame.groupby(["width", "seed"]):
        expected = by_hand(width, seed, 2)
        rows = part.set_index(["layer", "quantity", "step"])["log10_value"]
        assert set(rows.index) == set(expected)
        np.testing.assert_allclose([rows[key] for key in expected], list(expected.values()), rtol=0, atol=1e-9)


def test_exponents_are_slopes_with_students_t_over_seeds():
    result = check(small)
    for row in result.exponents.itertuples():
        part = result.frame[
            (result.frame["layer"] == row.layer)
            & (result.frame["quantity"] == row.quantity)
            & (result.frame["step"] == row.step)
        ]
        own = [stats.linregress(np.log(p["width"]), p["log10_value"] * math.log(10)).slope
               for _, p in part.groupby("seed")]  # fmt: skip
        assert row.exponent == pytest.approx(np.mean(own), abs=1e-12)
        if np.ptp(own) > 1e-9:
            ends = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
            assert (row.low, row.high) == pytest.approx(ends, abs=1e-12)


@pytest.mark.parametrize(
    ("expectation", "interval", "cautious", "verdict"),
    [
        (Expectation("=", 0.5), (0.3, 0.7), (0.0, 1.0), "agrees"),
        (Expectation("=", 0.5), (0.8, 0.9), (0.76, 0.95), "differs"),
        (Expectation("=", 0.5), (0.8, 0.9), (0.7, 1.0), "undecided"),
        (Expectation("=", 0.5), (0.2, 0.5), (0.1, 0.6), "undecided"),
        (Expectation("=", 0.5), (0.1, 0.2), (0.0, 0.24), "differs"),
        (Expectation("<=", -1.0), (-9.0, -0.8), (-9.0, 0.0), "agrees"),
        (Expectation("<=", -1.0), (-0.9, -0.7), (-1.0, -0.5), "undecided"),
        (Expectation("<=", -1.0), (-0.6, -0.5), (-0.7, -0.3), "differs"),
        (Expectation("=", 0.0), (math.nan, math.nan), (math.nan, math.nan), "undecided"),
    ],
)
def test_verdicts_are_equivalence_tests(expectation, interval, cautious, verdict):
    assert expectation.verdict(interval, cautious, 0.25) == verdict


def test_differs_needs_a_simultaneous_interval():
    """Of 150 tables of 40 exponents at the edge of the margin, at most 5 %, with its error, have one that differs."""
    import pandas as pd

    from gradscope.comparing.coordinates.exponents import judged

    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        own = 0.25 + rng.normal(0, 0.1, (40, 5))
        stderr = own.std(1, ddof=1) / math.sqrt(5)
        half = stats.t.ppf(0.975, 4) * stderr
        columns = {"axis": "width", "layer": "a", "quantity": "update_effect_rms", "step": 1, "index": 1, "zero": False}
        table = pd.DataFrame({"exponent": own.mean(1), "stderr": stderr}).assign(**columns)
        table = table.assign(low=table["exponent"] - half, high=table["exponent"] + half)
        wrong += (judged(table, [Expectation("=", 0.0)] * 40, 5, 1, 0.25)["verdict"] == "differs").any()
    assert wrong / 150 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 150)


KNOWN = [
    (partial(mlp, kind="SGD"), "agrees", None),
    (partial(mlp, kind="Adam"), "agrees", None),
    (partial(mlp, kind="SGD", mup=False), "differs", "head"),
    (partial(mlp, kind="Adam", mup=False), "differs", "head"),
    (partial(mlp, kind="SGD", broken="head"), "differs", "head"),
    (partial(mlp, kind="Adam", broken="head"), "differs", "head"),
    (partial(mlp, kind="Adam", broken="layers.1.linear"), "differs", "layers.1.linear"),
]


@pytest.mark.parametrize(("factory", "verdict", "first"), KNOWN)
def test_known_parametrizations_are_recognized(factory, verdict, first):
    result = gs.coordinate_check(factory, features(), loss_fn=loss, widths=[64, 256], seeds=6, steps=1)
    assert (result.verdict, result.first) == (verdict, first), str(result)
    standard = factory.keywords.get("mup", True) is False
    assert result.against("standard").verdict == ("agrees" if standard else "differs")
    assert result.against("standard").against("mup").exponents.equals(result.exponents)


@pytest.fixture(scope="module")
def hidden_by_the_stream():
    """A GPT in mu-P, except for the learning rate of one layer."""
    factory = partial(gpt, broken="blocks.1.mlp.linear")
    return gs.coordinate_check(factory, text(), loss_fn=loss, widths=[64, 256], seeds=5, steps=1)


def test_the_effect_of_the_update_finds_a_layer_whose_change_is_mostly_passed_on(hidden_by_the_stream):
    result = hidden_by_the_stream
    rows = result.exponents[(result.exponents["step"] == 1) & (result.exponents["verdict"] == "differs")]
    assert set(rows.loc[rows["quantity"] == "update_effect_rms", "layer"]) == {"blocks.1.mlp.linear"}
    assert (result.verdict, result.first) == ("differs", "blocks.1.mlp.linear")
    exponent = result.exponents.set_index(["layer", "quantity", "step"])["exponent"]["blocks.1.mlp.linear"]
    assert exponent["activation_change_rms", 1] < 0.5 and exponent["update_effect_rms", 1] > 0.8


def test_depth():
    options = {"loss_fn": loss, "widths": [64], "depths": [4, 8, 16], "seeds": 6, "steps": 1}
    scaled = gs.coordinate_check(partial(residual_mlp, scaled=True), features(), **options)
    assert (scaled.parametrization, scaled.verdict) == ("depth_mup", "agrees"), str(scaled)
    unscaled = gs.coordinate_check(partial(residual_mlp, scaled=False), features(), **options)
    last = "layers.last"
    assert unscaled.verdict == "differs" and unscaled.layers.set_index("layer")["verdict"][last] == "differs"
    # A stream of independent branches grows with the root of the depth.
    growth = unscaled.exponents.set_index(["layer", "quantity", "step"])["exponent"]
    assert growth[last, "activation_rms", 0] == pytest.approx(0.5, abs=0.15)
    assert scaled.against("standard").verdict == ""


def test_width_and_depth_in_one_call():
    result = gs.coordinate_check(
        partial(residual_mlp, scaled=True), features(), loss_fn=loss, widths=[32, 64], depths=[4, 8], seeds=2, steps=0
    )
    sizes = result.frame.groupby("axis")[["width", "depth"]].agg(lambda column: sorted(set(column)))
    assert sizes.loc["width"].to_list() == [[32, 64], [4]] and sizes.loc["depth"].to_list() == [[32], [4, 8]]
    assert result.exponents["axis"].is_monotonic_decreasing  # width first


def zero_readout(width):
    model, optimizer = mlp(width, kind="Adam")
    nn.init.zeros_(model.head.weight)
    return model, optimizer


def test_a_zero_readout_agrees_and_has_no_gsc_at_first():
    result = gs.coordinate_check(zero_readout, features(), loss_fn=loss, widths=[64, 256], seeds=6, steps=2)
    rows = result.exponents.set_index(["layer", "quantity", "step"])
    assert result.verdict == "agrees", str(result)
    assert rows.loc[("head", "activation_rms", 0), "zero"] and "zero" in str(result)
    assert rows.loc[("layers.1.linear", "update_effect_rms", 1), "zero"]
    assert not (result.exponents["quantity"].eq("gsc") & result.exponents["step"].eq(0)).any()


def test_a_layer_that_never_changes_differs():
    def frozen(width):
        model, _ = mlp(width, kind="Adam")
        groups = [{"params": [p], "lr": 0.0 if "layers.1" in n else 1e-3} for n, p in model.named_parameters()]
        return model, Adam(groups)

    result = gs.coordinate_check(frozen, features(), loss_fn=loss, widths=[32, 64], seeds=3, steps=1)
    assert result.first == "layers.1.linear" and "Its effect of update at step 1 is zero against width" in str(result)


class Readout(nn.Module):
    """A readout whose multiplier stands outside the layer, so that only the output of the model has its right size."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.last, self.scale = nn.Linear(16, width), nn.Linear(width, 8, bias=False), 8 / width

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x))) * self.scale


def test_the_output_of_the_model_is_judged_and_not_the_last_layer():
    def factory(width):
        model = Readout(width)
        return model, SGD(model.parameters(), lr=0.1)

    result = gs.coordinate_check(factory, features(), loss_fn=loss, widths=[32, 128], seeds=4, steps=1)
    roles = result.layers.set_index("layer")[["role", "verdict"]]
    assert roles.loc["last"].to_list() == ["finite", ""] and roles.loc["output", "role"] == "output"
    exponent = result.exponents.set_index(["layer", "quantity", "step"])["exponent"]
    assert exponent["output", "activation_rms", 0] == pytest.approx(exponent["last", "activation_rms", 0] - 1)


@pytest.mark.parametrize(
    ("output", "weight", "target", "role"),
    [
        (((2, 64), (2, 128)), ((64, 3), (128, 3)), False, "input"),
        (((2, 5, 64), (2, 5, 128)), ((50, 64), (50, 128)), False, "input"),  # embedding
        (((2, 64), (2, 128)), ((64, 64), (128, 128)), False, "hidden"),
        (((2, 64, 8, 8), (2, 128, 8, 8)), ((64, 1, 3, 3), (128, 1, 3, 3)), False, "input"),  # depthwise
        (((2, 64), (2, 128)), ((64,), (128,)), False, "wide"),
        (((2, 64), (2, 128)), ((), ()), False, "wide"),
        (((2, 7), (2, 7)), ((7, 64), (7, 128)), True, "output"),
        (((2, 7), (2, 7)), ((7, 64), (7, 128)), False, "finite"),
    ],
)
def test_roles_follow_from_shapes(output, weight, target, role):
    assert role_of((output[0], weight[0]), (output[1], weight[1]), target=target) == role


def test_dropout_and_running_statistics_do_not_count_as_change():
    class Noisy(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Dropout(0.5), nn.BatchNorm1d(6, affine=False, dtype=torch.float64))

    def factory(width):
        return small(width, middle=nn.Sequential(nn.Dropout(0.5)), rate=0.0)

    result = check(factory)
    changes = result.frame[result.frame["quantity"].isin(["activation_change_rms", "update_effect_rms", "update_rms"])]
    assert len(changes) and np.isneginf(changes["log10_value"]).all()


def test_the_random_state_and_the_data_are_as_before():
    torch.manual_seed(3)
    before, data = torch.get_rng_state(), (X.clone(), Y.clone())
    check(small, data, steps=1)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(data[0], X) and data[0].grad is None


def test_printing_and_figures():
    result = gs.coordinate_check(
        partial(mlp, broken="layers.1.linear"), features(), loss_fn=loss, widths=[64, 256], seeds=6, steps=1
    )
    assert repr(result) == "CoordinateCheck(mup: differs, first at 'layers.1.linear', 6 seeds)"
    assert "the network differs from mu-P" in str(result) and "expected = 0" in str(result)
    assert "<table" in result._repr_html_()
    printed = [
        ("activation_rms", 0),
        ("activation_gradient_rms", 0),
        ("update_effect_rms", 1),
        ("activation_change_rms", 1),
    ]
    rows = result.exponents.set_index(["quantity", "step"]).loc[printed]
    marks = {line.split()[1]: (line.count("*"), line.count("?")) for line in str(result).splitlines() if "±" in line}
    assert marks == {
        layer: (sum(verdicts == "differs"), sum(verdicts == "undecided"))
        for layer, verdicts in rows.groupby("layer")["verdict"]
    }
    assert marks["layers.0.linear"] == (0, 0) and marks["layers.1.linear"][0] > 0
    ax = result.plot("update_effect_rms")
    exponent = result.exponents.set_index(["layer", "quantity", "step"]).loc[
        ("layers.1.linear", "update_effect_rms", 1), "exponent"
    ]
    assert f"layers.1.linear: {exponent:.2f}, differs" in [text.get_text() for text in ax.texts]
    line = ax.lines[1]
    rows = result.frame[result.frame["quantity"].eq("update_effect_rms") & result.frame["layer"].eq("layers.1.linear")]
    np.testing.assert_allclose(line.get_ydata(), rows.groupby("width")["log10_value"].mean())
    assert line.get_linewidth() > ax.lines[0].get_linewidth()
    assert gs.plots.coordinates(result.frame, "gsc", step=0).get_ylabel().endswith("at initialization")
    with pytest.raises(ValueError, match="no rows of 'gsc' for axis='depth' and step=0"):
        result.plot("gsc", axis="depth", step=0)
    with pytest.raises(ValueError, match="no rows of 'gsc' for axis='depth' and step=1"):
        result.plot("gsc", axis="depth")


def other_optimizer(width):
    return small(width)[0], small(width)[1]


def renamed(width):
    layers = {"first": nn.Linear(3, width), f"last{width}": nn.Linear(width, 1)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer.double())
    return model, SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("factory", "options", "error", "message"),
    [
        (lambda width: small(5), {}, ValueError, "factory ignores the width: all layers of widths 4 and 8 have equal"),
        (lambda width, depth: small(5), {"depths": [2, 3], "widths": [4]}, ValueError, "factory ignores the depth"),
        (renamed, {}, ValueError, "other layers at width 8 than at width 4: 'last4', 'last8'"),
        (
            other_optimizer,
            {},
            ValueError,
            "At width 4 and seed 0: The optimizer does not own '0.weight', '3.weight'",
        ),
        (lambda width: small(width)[0], {}, ValueError, "^factory returned a model without an opt.* or give steps=0"),
        (nn.Linear(3, 1), {}, TypeError, r"factory is a model, Linear: .* called as factory\(width\)"),
        (lambda: None, {}, TypeError, r"factory must be a function that is called as factory\(width\)"),
        (small, {"depths": [2, 3]}, TypeError, r"called as factory\(width=, depth=\): got an unexpected .* 'depth'"),
        (lambda width: 3, {}, TypeError, r"factory must return .* a pair \(model, optimizer\); got int"),
        (lambda width: (small(width)[0], 0.1), {}, TypeError, "got Sequential, float"),
        (
            partial(small, rate=1e300),
            {},
            ValueError,
            "At width 4 and seed 0: '.' is NaN or Inf at step .: use a sm",
        ),
        (small, {"widths": [8]}, ValueError, r"at least two widths, got \[8\]; or give depths="),
        (small, {"widths": [8, 8]}, ValueError, "widths must be different"),
        (small, {"widths": [8], "depths": [2]}, ValueError, "at least two depths and one width"),
        (small, {"seeds": 1}, ValueError, "at least two different seeds"),
        (small, {"steps": -1}, ValueError, "steps must be"),
        (small, {"parametrization": "mu-P"}, ValueError, "parametrization must be one of standard, mup, depth_mup"),
        (small, {"loss_fn": lambda output, labels: 0.5}, ValueError, "loss_fn must return a tensor of losses"),
    ],
)
def test_mistakes(factory, options, error, message):
    with pytest.raises(error, match=message):
        check(factory, **options)


def test_a_factory_that_seeds_itself():
    def seeded_factory(width):
        model, optimizer = small(width)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded(1), dtype=parameter.dtype)
        return model, optimizer

    with pytest.raises(ValueError, match="All 3 seeds gave the same network"):
        check(seeded_factory)


def test_initialization_only():
    result = check(lambda width: small(width)[0], steps=0)
    assert set(result.exponents["step"]) == {0} and result.optimizer is None and "change" not in str(result)


def test_rows_are_in_the_order_of_a_training_step():
    """Forward from the input, then backward from the output; so the first row that differs is the cause."""
    rows = check(small, steps=1).exponents
    forward = ["update_effect_rms", "activation_rms", "activation_change_rms"]
    rows = rows[rows["quantity"].isin([*forward, "activation_gradient_rms"])]
    expected = [(0, "0", "activation_rms"), (0, "3", "activation_rms")]
    expected += [(0, "3", "activation_gradient_rms"), (0, "0", "activation_gradient_rms")]
    expected += [(1, layer, quantity) for layer in "03" for quantity in forward]
    expected += [(1, "3", "activation_gradient_rms"), (1, "0", "activation_gradient_rms")]
    assert list(zip(rows["step"], rows["layer"], rows["quantity"], strict=True)) == expected
