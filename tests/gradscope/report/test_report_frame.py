"""The page of a sweep holds the numbers of its frame."""

import numpy as np
import pandas as pd
import pytest

import gradscope as gs
from experiments.archive import reference
from experiments.reports import growth, networks_page
from gradscope.models import MLP
from tests.browser import Opened, Tables, needs_browser
from tests.helpers import ROOT, noise, seeded


def sweep(seeds=3, **columns):
    parts = []
    for activation in ("tanh", "relu"):
        for seed in range(seeds):
            model = MLP(depth=8, width=6, activation=activation, generator=seeded(seed)).double()
            frame = pd.concat([gs.gsc(model, noise(6, 6)).to_frame(), gs.measure(model, noise(6, 6))])
            parts.append(frame.assign(network=activation, seed=seed, **columns))
    return pd.concat(parts, ignore_index=True)


@needs_browser
def test_the_page_of_a_sweep(tmp_path):
    frame = sweep()
    seen = Opened(gs.report_frame(frame, tmp_path / "report.html", title="<sweep>"), tmp_path)
    assert seen.console == [] and seen.requests == []
    assert seen.dom.count('class="marks"') == 2 and "<title>&lt;sweep&gt;</title>" in seen.dom
    rates, layers = seen.tables
    for name, low, high in [[row[0], row[3], row[4]] for row in rates[1:]]:
        own = gs.growth(frame[frame["network"] == name])
        assert (float(low), float(high)) == (own.rate_low, own.rate_high)
    places = [layers[0].index(name) for name in ("network", "layer", "log10 GSC", "low", "high", "sign diversity")]
    gsc, diversity = (frame[frame["quantity"] == name] for name in ("gsc", "sign_diversity"))
    assert len(layers) == 1 + 2 * 9
    for row in layers[1:]:
        network, layer, *numbers = (row[place] for place in places)
        values = gsc[(gsc["network"] == network) & (gsc["layer"] == layer)]["log10_value"]
        mean, spread = values.mean(), values.std()
        np.testing.assert_allclose(np.array(numbers[:3], float), [mean, mean - spread, mean + spread], atol=1e-12)
        own = diversity[(diversity["network"] == network) & (diversity["layer"] == f"{layer}.activation")]["value"]
        assert (float(numbers[3]) if numbers[3] else None) == (pytest.approx(own.mean()) if len(own) else None)


def test_the_last_step_of_training_is_shown(tmp_path):
    frame = sweep(1)
    early = frame.assign(log10_value=frame["log10_value"] + 1, value=frame["value"] * 10, step=0)
    both = pd.concat([early, frame.assign(step=7)], ignore_index=True)
    late, all_steps = (
        Tables(gs.report_frame(rows, tmp_path / "report.html").read_text()).tables for rows in (frame, both)
    )
    assert all_steps == late


def test_committed_results_have_a_page(tmp_path):
    collected = reference.load(ROOT / "results" / "architectures")
    page = networks_page.write("architectures", collected, tmp_path / "report.html")
    assert page.stat().st_size < 2_000_000
    rates, layers = Tables(page.read_text()).tables
    table = growth.growth_table(collected.frame, ["activation", "norm"])
    shown = {
        name: sorted(float(row[rates[0].index(name)]) for row in rates[1:])
        for name in ("rate per layer", "rate, theory")
    }
    assert shown == {"rate per layer": sorted(table["rate"]), "rate, theory": sorted(table["theory"])}
    assert len(layers) == 1 + len(table) * 51


def test_a_long_table_is_thinned_and_says_so(tmp_path):
    frame = gs.gsc(MLP(depth=8, width=4, generator=seeded()).double(), noise(4, 4)).to_frame()
    many = pd.concat([frame.assign(network=f"net {number}") for number in range(300)], ignore_index=True)
    growth = pd.DataFrame({"network": ["net 0"], "rate": [np.nan], "verdict": ["too few layers"], "theory": [np.nan]})
    text = gs.report_frame(many, tmp_path / "report.html", growth=growth).read_text()
    assert len(text.encode()) < 2_000_000 and "<svg" not in text
    assert "1166 of 2700 rows are shown, evenly spread" in text


def test_a_frame_without_gsc_is_refused(tmp_path):
    frame = gs.measure(MLP(depth=3, width=4), noise(4, 4).float())
    with pytest.raises(ValueError, match="no rows of quantity 'gsc', so there is nothing to report"):
        gs.report_frame(frame, tmp_path / "report.html")
