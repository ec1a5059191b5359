"""Two models: the layer that differs, changes against brute force, what rounding explains, and intervals."""

import contextlib
import copy
import html
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.comparing.differences.conditions import first
from gradscope.comparing.differences.paired import influence
from gradscope.comparing.differences.simultaneous import half_widths
from gradscope.forward.inputs import as_batch
from tests.helpers import noise, seeded

X = noise(12, 6).float()


def mlp(activation=nn.Tanh, depth=4, width=6, seed=0, dtype=torch.float32):
    generator = seeded(seed)
    model = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), activation())])
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(width)
    return model.to(dtype)


def scaled(model, name="4", factor=1.05):
    other = copy.deepcopy(model)
    layer = other.get_submodule(name)
    layer.weight.data.mul_(factor)
    layer.bias.data.mul_(factor)
    return other


def diff(a, b, x=X, **options):
    return gs.diff(a, b, x, **{"measures": [], "probes": "exact"} | options)


def column(found, quantity, name="value"):
    rows = found.rows(quantity)
    return dict(zip(rows["layer"], rows[name], strict=True))


def test_distances_and_lengths_are_those_of_the_outputs():
    a = mlp(dtype=torch.float64)
    b, x = scaled(a), X.double()
    found = diff(a, b, x)
    assert found.first == "4" and not found.equal
    held, free, length = (column(found, name) for name in ("local_distance", "distance", "log10_length_change"))
    assert held == pytest.approx({str(n): 0.05 * (n == 4) for n in range(8)} | {"input": 0.0}, abs=1e-12)
    f, g = x, x
    for number in range(8):
        f, g = a[number](f).detach(), b[number](g).detach()
        assert free[str(number)] == pytest.approx(float((g - f).norm() / f.norm()), rel=1e-12, abs=1e-15)
        assert length[str(number)] == pytest.approx(float((g.norm() / f.norm()).log10()), rel=1e-9, abs=1e-15)
    assert {layer for layer, differs in column(found, "local_distance", "differs").items() if differs} == {"4"}


def jacobian_gsc(model, x):
    """GSC of the input to the output of a batch of independent samples, from Jacobians of `torch.func`."""
    found, out = torch.func.vmap(torch.func.jacrev(model))(x), model(x)
    found, out = found.detach(), out.detach()
    return float(found.square().sum() / x.numel() * x.square().sum() / out.square().sum())


@pytest.mark.parametrize("other", [lambda a: scaled(a), lambda a: scaled(a, "0", 2.0)], ids=["4", "0"])
def test_change_of_gsc_is_that_of_the_jacobians(other):
    a = mlp(dtype=torch.float64)
    b, x = other(a), X.double()
    expected = math.log10(jacobian_gsc(b, x) / jacobian_gsc(a, x))
    assert column(diff(a, b, x), "log10_gsc_change")["input"] == pytest.approx(expected, rel=1e-9)


class Functional(nn.Module):
    def __init__(self, activations):
        super().__init__()
        self.layers, self.activations = nn.ModuleList(nn.Linear(6, 6) for _ in activations), activations

    def forward(self, x):
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
        return x


@pytest.mark.parametrize("place, expected", [(0, "input of layers.1"), (1, "input of layers.2"), (2, "output")])
def test_functional_code_is_named_after_the_call_that_receives_its_value(place, expected):
    a = Functional([torch.tanh] * 3)
    b = copy.deepcopy(a)
    b.activations = [functional.gelu if number == place else torch.tanh for number in range(3)]
    assert diff(a, b).first == expected


def test_a_module_may_replace_functional_code():
    a = Functional([torch.tanh] * 3)
    b = copy.deepcopy(a)
    b.activations = [nn.Tanh() for _ in range(3)]
    b.more = nn.ModuleList(b.activations)
    found = diff(a, b)
    assert found.first is None and found.matching.only_second == ("more.0", "more.1", "more.2")
    b.more[1] = b.activations[1] = nn.Hardtanh()
    assert diff(a, b).first == "input of layers.2"
    assert diff(b, a).first == "more.1"


class Permuted(nn.Linear):
    """Sums over the inputs in another order."""

    def forward(self, x):
        order = torch.arange(self.in_features - 1, -1, -1)
        return functional.linear(x[:, order], self.weight[:, order], self.bias)


def reordered(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.__class__ = Permuted
    return model


@contextlib.contextmanager
def once():
    yield


EQUAL = {
    "the same": lambda model: model,
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "changed in place": lambda model: model.half() and None,
    "another order": reordered,
    "wrapped": lambda model: nn.Sequential(),
    "autocast": torch.autocast("cpu", torch.bfloat16),
    "a context that can be entered once": once(),
}


@pytest.mark.parametrize("change", EQUAL.values(), ids=EQUAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rounding_explains_what_differs_between_equal_models(change, dtype):
    model = mlp(width=40, depth=6, dtype=dtype)
    if change is EQUAL["wrapped"]:
        change = Wrapper(model)
    found = gs.diff(model, change, noise(12, 40).to(dtype), probes=3)
    assert found.first is None and found.equal, str(found)
    assert not found.matching.only_first


@pytest.mark.parametrize("factor, expected", [(1.0, None), (1.05, "7")])
def test_only_the_output_of_a_compiled_model_is_compared(factor, expected):
    def backend(graph, _):
        return lambda *inputs: [factor * output for output in graph(*inputs)]

    found = diff(mlp(), lambda model: torch.compile(model, backend=backend))
    assert found.first == expected
    assert column(found, "compiled_distance")["7"] == pytest.approx(factor - 1, abs=1e-6)
    assert not found.rows("local_distance")["differs"].any()


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_what_rounding_explains_is_the_distance_of_the_copy_in_float64():
    model, x = nn.Sequential(nn.Linear(300, 40)), noise(12, 300).float()
    found = diff(model, copy.deepcopy(model), x).rows("local_distance").set_index("layer")
    f, exact = model(x).detach().double(), copy.deepcopy(model).double()(x.double()).detach()
    expected = 4 * max(2 * float((exact - f).norm() / f.norm()), torch.finfo(torch.float32).eps)
    assert found.loc["0", "rounding"] == pytest.approx(expected, rel=1e-6)
    assert found.loc["0", "rounding"] > 4 * torch.finfo(torch.float32).eps  # more than the least


@pytest.mark.parametrize("size, found", [(1e-3, "4"), (1e-9, None)])
def test_a_change_below_rounding_is_not_found(size, found):
    a = mlp()
    b = scaled(a, factor=1.0).double()
    b[4].weight.data.mul_(1 + size)
    assert diff(a, b).first == found


class Stubborn(nn.Module):
    """Runs in float32 only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)) @ torch.eye(6))


def test_a_model_that_refuses_float64_shows_its_rounding_by_moved_parameters():
    a = Stubborn()
    found = diff(a, scaled(a, "two", 1.0))
    assert found.first is None and "changed by one unit in the last place" in " ".join(found.remarks)
    moved = found.rows("local_distance").set_index("layer")["rounding"]
    assert 1e-7 < moved["two"] < 1e-5
    assert diff(a, scaled(a, "two")).first == "two"


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


class Wrong(nn.Module):
    def forward(self, x):
        return WrongBackward.apply(x)


def test_a_backward_pass_that_differs_is_found_by_gsc():
    a = mlp()
    b = copy.deepcopy(a)
    b[3] = Wrong()
    found = diff(a, b)
    assert found.first is None and not found.equal
    differs = column(found, "log10_gsc_change", "differs")
    assert [layer for layer, differ in differs.items() if differ] == ["input", "0", "1", "2"]
    assert "The outputs agree, but GSC differs up to '2': look at this layer" in str(found)


def test_dropout_draws_the_same_masks_for_both():
    model = mlp(width=40)
    model.insert(2, nn.Dropout(0.5))
    assert diff(model.train(), copy.deepcopy(model), noise(12, 40).float()).first is None


def test_models_are_left_as_they_were():
    a = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(6, 3))
    b = copy.deepcopy(a)
    before, state = [copy.deepcopy(model.state_dict()) for model in (a, b)], torch.get_rng_state()
    found = gs.diff(a, b, X, probes=2)
    assert found.equal and torch.equal(torch.get_rng_state(), state)
    for model, known in zip((a, b), before, strict=True):
        assert all(torch.equal(value, known[name]) for name, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_without_a_partner_are_listed():
    a, b = mlp(), mlp()
    b.insert(3, nn.LayerNorm(6))
    found = diff(a, b)
    assert found.first == "input of 3" and found.matching.only_second == ("3",)
    differs = column(found, "local_distance", "differs")
    assert [layer for layer, differ in differs.items() if differ] == ["input of 3"]
    assert found.headline == "Layers without a partner: 0 of a, 1 of b. First layer that differs: 'input of 3'."
    assert "Layers of b without a partner: '3'." in str(found)
    back = diff(b, a)
    assert back.first == "3" and back.matching.only_first == ("3",)


def test_a_layer_that_overflows_is_named():
    a = mlp()
    b = copy.deepcopy(a)
    b[4].weight.data[0, 0] = math.inf
    found = diff(a, b)
    assert found.first == "4" and math.isinf(column(found, "local_distance")["4"])
    assert any("GSC was not measured" in remark and "'4'" in remark for remark in found.remarks)


def test_paired_probes_cancel():
    a = mlp(width=60, seed=3)
    b, x = scaled(a, "0", 1.01), noise(8, 60).float()
    truth = column(diff(a, b, x), "log10_gsc_change")
    paired = column(diff(a, b, x, probes=2), "log10_gsc_change")
    one, other = (gs.gsc(model, x, probes=2, generator=seeded(n)) for n, model in ((1, a), (2, b)))
    independent = dict(zip(one.layers, (other.log10_values - one.log10_values)[:, 0], strict=True))
    errors = [[each[layer] - truth[layer] for layer in truth] for each in (paired, independent)]
    assert np.std(errors[0]) < np.std(errors[1]) / 10


def test_statistics_are_those_of_measure():
    a = mlp()
    b = scaled(a)
    found = gs.diff(a, b, X, probes=2)
    one, other = (gs.measure(model, X).set_index(["quantity", "layer"])["value"] for model in (a, b))
    for (quantity, layer), value in (other - one).items():
        assert column(found, f"{quantity}_change")[layer] == pytest.approx(value, abs=1e-12)
    std = column(found, "preactivation_std_change", "differs")
    assert next(layer for layer in std if std[layer]) == "5"


@pytest.mark.parametrize("coupled", [False, True])
def test_intervals_of_coupled_samples_are_for_the_probes(coupled):
    a = mlp(width=20, depth=3)
    if coupled:
        a.insert(1, nn.BatchNorm1d(20))
    found = diff(a, scaled(a, "0"), noise(12, 20).float(), probes=8)
    rows = found.frame[found.frame["quantity"].isin(["log10_gsc_change", "log10_length_change"])]
    known = rows.groupby("quantity")["low"].apply(lambda low: low.notna().all())
    assert known.to_dict() == {"log10_gsc_change": True, "log10_length_change": not coupled}
    assert ("probes of this batch" in found.population) == coupled


def test_influence_is_the_derivative_with_respect_to_the_weight_of_a_sample():
    a, b = (np.exp(noise(9, seed=seed).numpy()) for seed in (1, 2))
    step = 1e-6
    for i, found in enumerate(influence(a, b)):
        weights = np.ones(9)
        weights[i] += step
        moved = math.log10((b * weights).sum() / (a * weights).sum()) - math.log10(b.sum() / a.sum())
        assert found == pytest.approx(9 * moved / step, rel=1e-4, abs=1e-6)


def test_one_row_has_the_interval_of_student():
    u = np.random.default_rng(1).normal(size=(12, 1))
    error, half = half_widths(u)
    assert error[0] == pytest.approx(stats.sem(u[:, 0]))
    assert half[0] == pytest.approx(stats.t.ppf(0.975, 11) * error[0], rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.7, 0.99])
def test_intervals_hold_together_in_95_percent(rho):
    random, covered = np.random.default_rng(2), 0
    root = np.linalg.cholesky(np.full((8, 8), rho) + (1 - rho) * np.eye(8))
    for _ in range(400):
        u = random.standard_normal((16, 8)) @ root.T
        covered += bool((np.abs(u.mean(axis=0)) <= half_widths(u)[1]).all())
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize("units", [np.zeros((12, 2)), np.full((3, 2), 1.0)], ids=["no spread", "few units"])
def test_intervals_without_spread_or_with_few_units(units):
    error, half = half_widths(units)
    expected = 0.0 if len(units) > 5 else np.nan
    np.testing.assert_array_equal([error, half], np.full((2, 2), expected))


def test_saved_results(tmp_path):
    a = mlp(width=40)
    b, x = scaled(a, "0", 1.5), noise(40, 40).float()
    one, other = gs.gsc(a, x, probes="exact"), gs.gsc(b, x, probes="exact")
    found = gs.diff(one, other.save(tmp_path / "b.csv"))
    expected = (other.log10_values - one.log10_values)[:, 0]
    np.testing.assert_allclose(found.rows("log10_gsc_change")["value"], expected, atol=1e-12)
    assert found.first is None and "do not show which layer is the cause" in found.headline
    num = int(found.frame["differs"].sum())
    assert num > 0 and found.headline.startswith(f"GSC differs in {num} of {len(found.frame)} rows, last in ")
    measured = gs.diff(gs.measure(a, x), gs.measure(b, x))
    assert measured.first == "1" and not measured.equal
    assert "First layer whose numbers differ: '1'. Saved results do not show" in measured.headline
    same = gs.diff(one, one.to_frame())
    assert same.equal and "No layer differs" in str(same)


def test_errors_of_saved_results_add_up():
    frame = gs.frames.tidy(
        {"layer": ["a", "b"], "index": [1, 2], "depth_from_output": [1, 0], "quantity": "gsc", "target": "b",
         "log10_value": [1.0, 0.0], "log10_low": [0.7, 0.0], "log10_high": [1.3, 0.0], "num_samples": 8}
    )  # fmt: skip
    row = gs.diff(frame, frame.assign(value=100.0, log10_value=2.0, log10_low=1.6, log10_high=2.4)).frame.iloc[0]
    wider = stats.norm.ppf(1 - 0.025 / 2) / stats.norm.ppf(0.975)
    assert row["high"] - row["low"] == pytest.approx(2 * math.hypot(0.3, 0.4) * wider)
    assert row["value"] == 1.0 and row["differs"]


def test_layers_that_all_differ_in_size_are_not_compared():
    models = [nn.Sequential(nn.Embedding(9, width), nn.Linear(width, width)) for width in (4, 5)]
    found = diff(*models, torch.arange(9).reshape(3, 3))
    assert found.first is None and not found.equal
    assert found.headline == "Layers without a partner: 3 of a, 3 of b. No outputs of layers were compared."


ERRORS = {
    "number": (lambda: diff(mlp(), 3), "b must be a model .* a function that changes a copy of a .* got 3"),
    "state of a": (lambda: diff(mlp().state_dict(), mlp()), r"a must be a model \(load a checkpoint into one first\)"),
    "state of b": (lambda: diff(mlp(), mlp().state_dict()), r"b must be a model \(load a checkpoint into one first\)"),
    "checkpoint": (lambda: gs.diff("a.pt", "b.pt"), r"a must be a model \(load a checkpoint .* \.csv\), got 'a\.pt'"),
    "function": (
        lambda: diff(mlp(), lambda model: 3),
        "b changed a copy of the model and must return the model, got 3",
    ),
    "no data": (lambda: gs.diff(mlp(), mlp()), "data must be a tensor, or a mapping.*NoneType"),
    "data of saved": (lambda: gs.diff(gs.gsc(mlp(), X), gs.gsc(mlp(), X), X), "a is a saved result, so data would be"),
    "one saved": (lambda: gs.diff(gs.gsc(mlp(), X), mlp()), "so b must be one too: a Profile, .* got Sequential"),
    "shared": (lambda: gs.diff(gs.gsc(mlp(), X), gs.measure(mlp(), X)), "Both frames share no quantity of a layer"),
    "several": (
        lambda: gs.diff(pd.concat([gs.measure(mlp(), X)] * 2, ignore_index=True), gs.measure(mlp(), X)),
        "a holds several rows of 'preactivation_mean' for layer '1': keep one network",
    ),
    "a": (lambda: gs.diff(3, mlp(), X), "a must be a model .* got 3"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_loss_is_compared_too():
    a, labels = mlp(), torch.arange(12) % 6
    loss = lambda output, y: functional.cross_entropy(output, y, reduction="none")  # noqa: E731
    found = gs.diff(a, scaled(a), (X, labels), loss_fn=loss, probes="exact")
    one, other = (gs.gsc(model, (X, labels), loss_fn=loss, probes="exact") for model in (a, scaled(a)))
    expected = (other.log10_values - one.log10_values)[:-1, 0]
    np.testing.assert_allclose(found.rows("log10_gsc_change")["value"], expected, atol=1e-9)
    assert "gradient_norm_change" in set(found.frame["quantity"])


def test_the_batch_follows_to_the_dtype_of_the_model():
    subject = first(mlp(dtype=torch.float64), as_batch(X.double(), forward=None, loss_fn=None))
    assert subject.dtype == torch.float64
    assert diff(mlp(), lambda model: model.double()).first is None


def test_prints_and_tables():
    found = diff(mlp(), scaled(mlp()))
    assert "\n" not in repr(found) and "First layer that differs: '4'." in str(found)
    assert "<table" in found._repr_html_() and found.to_frame() is found.frame
    gs.frames.check(found.frame)


def test_the_figure_shows_the_distances_and_fills_those_that_differ():
    found = diff(mlp(), scaled(mlp()))
    ax = found.plot()
    held = found.rows("local_distance")
    lines = [line for line in ax.lines if len(line.get_xdata())]
    assert ax.get_yscale() == "log"
    filled = [line for line in lines if line.get_linestyle() == "None" and line.get_markerfacecolor() != "none"]
    assert filled[0].get_xdata().tolist() == held.loc[held["differs"], "index"].tolist()
    assert filled[0].get_ydata().tolist() == pytest.approx(held.loc[held["differs"], "value"].tolist())


def test_the_page_holds_the_finding_and_all_rows(tmp_path):
    found = diff(mlp(), scaled(mlp()))
    text = found.report(tmp_path / "page.html").read_text()
    assert found.headline in html.unescape(text) and "local distance" in text
    assert len(text) < 2_000_000 and "http://" not in text.partition("<script>")[0]
