"""The page of a model, as a browser shows it: complete, offline, and with the numbers of the measurements."""

import re
import sys
from contextlib import nullcontext
from types import FunctionType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradscope as gs
from gradscope.models import MLP
from gradscope.report.tables import of_layers
from tests.browser import Opened, needs_browser
from tests.helpers import noise, seeded

LIMIT = 2_000_000
NASTY = '</script><script>alert("x")</script><b>'


def losses(output, labels):
    return cross_entropy(output, labels, reduction="none")


def mlp(depth=12, width=8):
    return MLP(depth=depth, width=width, activation="tanh", generator=seeded()).double()


def drawn(opened):
    """Labels of the charts that were drawn."""
    return re.findall(r'<div class="chart[^>]*role="graphics-document"[^>]*aria-label="([^"]*)"[^>]*><svg', opened.dom)


def column(table, name):
    place = table[0].index(name)
    return {row[0]: float(row[place]) if row[place] else None for row in table[1:]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model, x = mlp(), noise(6, 8)
    data = x, torch.arange(6) % 8
    return model, data, gs.report(model, data, tmp_path_factory.mktemp("page") / "report.html", loss_fn=losses)


@pytest.fixture(scope="module")
def opened(written, tmp_path_factory):
    return Opened(written[2], tmp_path_factory.mktemp("browser"))


@needs_browser
def test_the_page_is_complete_quiet_and_offline(written, opened):
    assert opened.console == []
    assert opened.requests == []
    assert written[2].stat().st_size < LIMIT
    profile, pairs = drawn(opened)
    assert "log10 GSC of 13 layers" in profile and "mean-field theory" in profile
    assert "13 times 13" in pairs


@needs_browser
def test_a_page_that_loads_something_is_noticed(tmp_path):
    page = tmp_path / "loads.html"
    page.write_text('<body><img src="https://example.com/a.png"><script>nothing.here()</script></body>')
    seen = Opened(page, tmp_path)
    assert seen.requests == ["https://example.com/a.png"]
    assert any("nothing is not defined" in line for line in seen.console)


@needs_browser
def test_the_numbers_are_those_of_the_measurements(written, opened):
    model, (x, labels), _ = written
    pairs, layers, comparison, tests = opened.tables
    profile = gs.gsc(model, x).to_frame().set_index("layer")
    assert column(layers, "log10 GSC") == profile["log10_value"].to_dict()
    assert "95 % low" not in layers[0]  # exact values have no interval
    measured = gs.measure(model, (x, labels), loss_fn=losses)
    assert set(measured["quantity"].str.replace("_", " ")) <= set(layers[0])
    for quantity, rows in measured.groupby("quantity"):
        shown = column(layers, quantity.replace("_", " "))
        assert shown.pop("input") is None
        assert list(shown.values()) == rows["value"].to_list()
    matrix = gs.gsc_matrix(model, x)
    sources, rows = pairs[0][1:], pairs[1:]
    assert tuple(sources) == matrix.sources and tuple(row[0] for row in rows) == matrix.targets
    for place, row in enumerate(rows):  # three decimals
        np.testing.assert_allclose(np.array(row[1:], float), matrix.log10_values[: place + 1, place], atol=5.01e-4)
    assert [row[2] for row in tests[1:]] == ["passed"] * 6
    theory = gs.compare(model, x).to_frame().set_index("layer")["log10_gsc_theory"]
    assert column(comparison, "log10 GSC, theory") == theory.to_dict()
    assert "deviation" not in comparison[0]  # no layer deviates
    assert {name: column(layers, "log10 GSC, theory")[name] for name in theory.index} == theory.to_dict()


@needs_browser
def test_the_verdict_comes_first_and_says_what_to_do(written, opened):
    growth = gs.gsc(written[0], written[1][0]).growth()
    block = re.search(r'<section class="verdict (\w+)".*?</section>', opened.dom, re.DOTALL)
    assert block.start() < opened.dom.index("<figure") and block[1] == growth.verdict
    ends = re.search(r"multiplied by [\d.]+ \(95 % interval ([\d.]+) to ([\d.]+)\)", block[0])
    np.testing.assert_allclose([float(ends[1]), float(ends[2])], [growth.rate_low, growth.rate_high], rtol=0.01)
    for text in ("What to do", "Meaning", f"GSC of the network is {10**growth.total:#.4g}"):
        assert text in block[0]


@needs_browser
def test_how_it_was_made_is_said(opened):
    for text in (gs.__version__, torch.__version__, sys.version.split()[0], "cpu", "float64", "loss_fn=losses", "seed"):
        assert text in opened.dom[opened.dom.index("What the numbers rest on") :]


@needs_browser
def test_the_table_of_layers_sorts_and_filters_by_keyboard(written, tmp_path):
    script = """
        const section = document.querySelector(".filter").closest("section");
        const heads = Array.from(section.querySelectorAll("thead th"));
        const head = heads.find((each) => each.textContent === "log10 GSC");
        const state = () => [head.getAttribute("aria-sort"), document.activeElement.textContent,
            ...Array.from(section.querySelectorAll("tbody tr")).filter((row) => !row.hidden)
              .map((row) => row.cells[0].textContent)].join(",");
        const results = [];
        head.querySelector("button").focus();
        for (const _ of [1, 2]) { document.activeElement.click(); results.push(state()); }
        const input = section.querySelector("input");
        input.value = "LAYERS.1"; input.dispatchEvent(new Event("input"));
        results.push(state(), section.querySelector("output").textContent);
        document.body.insertAdjacentHTML("beforeend", `<pre id="results">${results.join(";")}</pre>`);
    """
    seen = Opened(written[2], tmp_path, script=script)
    up, down, filtered, count = re.findall(r'<pre id="results">(.*?)</pre>', seen.dom)[-1].split(";")
    profile = gs.gsc(written[0], written[1][0]).to_frame().sort_values("log10_value")
    names = profile["layer"].to_list()
    assert up.split(",") == ["ascending", "log10 GSC", *names]
    assert down.split(",") == ["descending", "log10 GSC", *names[::-1]]
    assert set(filtered.split(",")[2:]) == {"layers.1", "layers.10", "layers.11"} and count == "3 of 13 rows"


@needs_browser
def test_dark_screens_get_a_dark_page_and_paper_a_light_one(written, tmp_path):
    script = """document.body.dataset.seen = getComputedStyle(document.body).backgroundColor + " "
        + getComputedStyle(document.querySelector(".chart text")).fill;"""
    script = f"setTimeout(() => {{ {script} }}, 3000);"
    light, dark = (
        re.search(r'data-seen="([^"]*)"', Opened(written[2], tmp_path, flag, script=script).dom)[1]
        for flag in ("--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0")
    )
    assert light == "rgb(255, 255, 255) rgb(28, 31, 36)"
    assert dark == "rgb(20, 22, 26) rgb(230, 232, 235)"
    assert "@media screen and (prefers-color-scheme: dark)" in written[2].read_text()


@needs_browser
def test_names_are_escaped(tmp_path):
    model = nn.Sequential()
    for place in range(3):
        model.add_module(f"{NASTY}{place}", nn.Linear(3, 3))
    model.add_module("'act\"", nn.Tanh())
    page = gs.report(model.double(), noise(4, 3), tmp_path / "report.html", title=NASTY, check=False)
    seen = Opened(page, tmp_path)
    assert seen.console == [] and len(drawn(seen)) == 2
    assert [row[0] for row in seen.tables[1][1:]] == ["input", *(f"{NASTY}{place}" for place in range(3)), "'act\""]
    assert seen.tables[0][0][2] == f"{NASTY}0"
    assert "<script>alert" not in seen.dom


@needs_browser
def test_one_layer_has_no_verdict(tmp_path):
    page = gs.report(nn.Linear(3, 2).double(), noise(4, 3), tmp_path / "report.html")
    seen = Opened(page, tmp_path)
    assert seen.console == [] and len(drawn(seen)) == 2
    assert "No growth rate: GSC of the network is" in seen.dom and "A growth rate needs at least 6 layers" in seen.dom
    assert "Statistics of activations are missing. No nonlinearity module was called in model Linear" in seen.dom
    assert "Layers were not compared. No chain of linear layers" in seen.dom  # the reason in place of a measurement
    assert "Interval of the rate" not in seen.dom
    assert "mean-field" not in drawn(seen)[0]


class Cut(nn.Module):
    """Passes no gradient, so that GSC of every layer before is zero."""

    def forward(self, x):
        return 0 * x + 1


@needs_browser
@pytest.mark.filterwarnings("ignore")
def test_zero_coefficients_and_unknown_errors(tmp_path):
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), Cut(), *(nn.Linear(4, 4) for _ in range(3))]
    model, x = nn.Sequential(*layers).double(), noise(6, 4)
    profile = gs.gsc(model, x, probes=1).to_frame()
    assert np.isneginf(profile["log10_value"]).any() and profile["log10_low"].isna().any()  # what is tested here
    page = gs.report(model, x, tmp_path / "report.html", probes=1)
    seen = Opened(page, tmp_path)
    assert seen.console == [] and len(drawn(seen)) == 2
    shown = column(seen.tables[1], "log10 GSC")
    assert shown == profile.set_index("layer")["log10_value"].to_dict()
    assert "95 % low" not in seen.tables[1][0] and "the errors are unknown" in seen.dom
    assert "because GSC is zero or not finite: 4 layers" in drawn(seen)[0]


@needs_browser
@pytest.mark.slow
def test_a_deep_model_stays_small(tmp_path):
    page = gs.report(mlp(300, 2), noise(2, 2), tmp_path / "report.html", check=False)
    assert page.stat().st_size < LIMIT
    seen = Opened(page, tmp_path)
    assert seen.console == [] and len(drawn(seen)) == 2
    pairs, layers, _ = seen.tables
    assert len(pairs) == len(layers) == 302 and len(pairs[-1]) == 302


@needs_browser
def test_training_is_shown_with_its_warnings(tmp_path):
    model, x = mlp(8, 6), noise(6, 6)
    with gs.Monitor(model, x, every=1, max_overhead=None) as monitor:
        for step in range(3):
            with nullcontext() if step < 2 else pytest.warns(gs.MonitorWarning, match="weight growth"):
                monitor.step(1.0 + step)
            with torch.no_grad():
                model.layers[3].linear.weight *= 5
    page = gs.report(model, x, tmp_path / "report.html", monitor=monitor, check=False, compare=False, matrix=False)
    seen = Opened(page, tmp_path)
    assert seen.console == [] and len(drawn(seen)) == 2
    frame = monitor.to_frame()
    last = frame[(frame["step"] == 2) & (frame["quantity"] == "gsc")]
    assert all(f"<td>{value:.3f}</td>" in monitor._repr_html_() for value in last["log10_value"].iloc[1:])
    rows = frame[frame["quantity"] == "gsc"].pivot(index="layer", columns="step", values="log10_value")
    table = seen.tables[1]
    assert table[0] == ["layer", "0", "1", "2"]
    for name, *values in table[1:]:
        np.testing.assert_allclose(np.array(values, float), rows.loc[name], atol=5.01e-4)
    assert "3 steps, 3 records" in seen.dom and "Warning at step 2: weight growth, layers.3.linear." in seen.dom


def test_a_wrong_model_is_named_first(tmp_path):
    model = mlp()
    model.layers[5].activation = nn.Identity()
    text = gs.report(model, noise(6, 8), tmp_path / "report.html", check=False, matrix=False).read_text()
    assert text.index("Odd layer") < text.index("What to do") and "layers.5: runs no Tanh" in text


def test_several_modules_of_one_layer_have_rows_of_their_own(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Tanh(), nn.ReLU()

        def forward(self, x):
            return x + self.b(self.a(x) + x)

    model = nn.Sequential(nn.Linear(4, 4), Block(), Block()).double()
    profile, statistics = gs.gsc(model, noise(5, 4)), gs.measure(model, noise(5, 4))
    table, errors = of_layers(profile.rows_to(), statistics)
    assert table["layer"].to_list() == ["input", "0", "1", "1.a", "1.b", "2", "2.a", "2.b"]
    spread = statistics[statistics["quantity"] == "sign_diversity"].set_index("layer")["value"]
    assert table.set_index("layer")["sign diversity"].dropna().to_dict() == spread.to_dict()
    assert len(errors) == len(table)


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_a_missing_package_is_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "gradscope-toolkit\[report\]"'):
        gs.report(mlp(), noise(6, 8), tmp_path / "report.html")


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one batch, but data is a stream of batches \(list\)"):
        gs.report(mlp(), [noise(6, 8), noise(6, 8), noise(6, 8)], tmp_path / "report.html")


def test_records_without_gsc_are_refused(tmp_path):
    frame = gs.gsc(mlp(), noise(6, 8)).to_frame()
    with pytest.raises(ValueError, match="no rows of quantity 'gsc' with a column 'step'"):
        gs.report(mlp(), noise(6, 8), tmp_path / "report.html", monitor=frame)


def test_the_model_is_left_alone_and_a_given_result_is_shown(tmp_path):
    model, x = mlp(), noise(6, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check = gs.check(model, x)
    state = torch.get_rng_state()
    page = gs.report(model, x, tmp_path / "report.html", check=check, compare=False, matrix=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert check.checks[0].detail in page.read_text()


def test_the_function_is_not_hidden_by_its_folder():
    assert "gradscope.report.page" in sys.modules
    assert isinstance(gs.report, FunctionType)
