"""Networks of a sweep are told apart, named, and each drawn: no two that differ share a row or a curve."""

import itertools
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments import figures, measure
from experiments.archive import collecting, labels
from experiments.config import command_line
from experiments.reports import growth as report_growth
from experiments.reports import sweep_figures
from gradscope import frames, plots
from tests.gradscope.plots.test_plots import profile

mpl.use("Agg")
SMALL = ("model.depth=8", "model.width=8", "data.batch_size=8", "probes=2")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def networks(**columns):
    """A frame of one row a network, with these columns of its configuration."""
    return pd.DataFrame({"quantity": "gsc", "seed": 0, "model": "mlp", "data": "noise"} | columns)


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"seed": [0, 1], "depth": 10}, ["model"]),
        ({"weight_variance": [None, 1.0, 3.0]}, ["weight_variance"]),
        ({"model": "custom", "model._target_": ["a.B", "a.C"]}, ["model._target_"]),
        ({"model": ["b", "c"], "model._target_": ["a.B", "a.C"]}, ["model"]),
        ({"model": ["b", "c"], "depth": [1, 2]}, ["depth"]),
        # A key that only one model has says nothing more than the model, unless it varies.
        ({"model": ["mlp", "alexnet"], "width": [100, None]}, ["model"]),
        ({"model": ["mlp", "mlp", "alexnet"], "depth": [10, 50, None]}, ["model", "depth"]),
        ({"model": ["a", "a", "b"], "data": ["n", "m", "m"]}, ["model", "data"]),
    ],
)
def test_keys_tell_networks_apart(columns, keys):
    assert labels.network_keys(networks(**columns)) == keys


@pytest.mark.parametrize("seed", range(20))
def test_no_two_networks_have_the_same_keys(seed):
    random = np.random.default_rng(seed)
    choices = {"model": ["a", "b"], "data": ["n", "m"], "x": [1, 2, None], "y": ["u", None], "z._target_": ["p", "q"]}
    every = pd.DataFrame(itertools.product(*choices.values()), columns=list(choices))
    some = every.iloc[random.choice(len(every), size=random.integers(2, 9), replace=False)].assign(seed=0)
    keys = labels.network_keys(some)
    names = labels.with_networks(some, keys)["network"]
    assert names.nunique() == len(some), (keys, some)


def test_names_that_would_be_alike_say_their_keys():
    frame = networks(before=["batch", "none"], after=["none", "batch"])
    assert list(labels.with_networks(frame, ["before", "after"])["network"]) == [
        "before=batch+after=none", "before=none+after=batch",
    ]  # fmt: skip


def test_numbers_are_in_order_and_words_as_they_come():
    frame = networks(depth=[100, 10, 50, 10], norm=["none", "batch", "none", "none"], value=[1, 2, 3, 4])
    assert list(labels.in_order(frame, ["depth", "norm"])["value"]) == [4, 2, 3, 1]
    assert list(labels.in_order(frame.assign(depth=[3.0, None, 2.0, None]), ["depth"])["value"]) == [3, 1, 2, 4]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("activation", "relu", "relu"), ("model.depth", 10.0, "depth=10"), ("bias", True, "bias=true"),
        ("bias", np.False_, "bias=false"), ("x", None, "x=null"), ("x", np.nan, "x=null"), ("lr", 0.001, "lr=0.001"),
        ("model._target_", "a.B", "a.B"), ("model._target_", None, "model._target_=null"),
    ],
)  # fmt: skip
def test_names_say_what_a_value_alone_does_not(key, value, name):
    assert labels.label(key, value) == name


def many(num_seeds=2):
    """27 networks, of rates that are their depth's."""
    parts = [
        profile(seed, slope, gain=slope, activation=activation, norm=norm, model="mlp", data="none")
        for seed in range(num_seeds)
        for slope in (0.1, 0.0, -0.1)
        for activation in ("relu", "tanh", "selu")
        for norm in ("none", "batch", "layer")
    ]
    return pd.concat(parts, ignore_index=True)


def test_many_networks_are_panels_and_rates():
    frame = many()
    keys = labels.network_keys(frame)
    frame = labels.in_order(frame, keys)
    made = sweep_figures.draw(frame, keys, report_growth.growth_table(frame, keys), "title")
    assert set(made) == {"gsc", "rates", "rate_over_gain"}
    panels = [ax for ax in made["gsc"].axes if ax.get_title()]
    assert len(panels) == 9 and all("=" in ax.get_title() for ax in panels)
    for ax in panels:  # three slopes each, by their ends
        ends = sorted(round(float(line.get_ydata()[-1])) for line in ax.lines if len(line.get_xdata()) == 11)
        assert ends == [-1, 0, 1]
    (ax,) = made["rates"].axes
    assert [text.get_text() for text in ax.get_yticklabels()][:2] == ["gain=-0.1, relu", "gain=-0.1, relu+batch"]
    assert len(ax.get_yticklabels()) == 27


def test_rates_show_verdicts_by_shape_and_theory():
    growth = pd.DataFrame(
        {"network": ["a", "b", "c"], "rate": [1.2, 1.0, 0.8], "rate_low": [1.15, 0.9, 0.7],
         "rate_high": [1.3, 1.1, 0.9], "verdict": ["exploding", "stable", "vanishing"],
         "theory": [1.25, np.nan, np.nan]}
    )  # fmt: skip
    ax = plots.rates(growth)
    at = {container.get_label(): container for container in ax.containers}
    assert {name: (line.get_marker(), *line.get_data()) for name, (line, *_) in at.items()} == {
        "exploding": ("^", [1.2], [0]), "stable": ("o", [1.0], [1]), "vanishing": ("v", [0.8], [2]),
    }  # fmt: skip
    bars = at["exploding"][2][0].get_segments()[0]
    np.testing.assert_allclose(bars[:, 0], [1.15, 1.3])
    assert ax.get_ylim() == (2.5, -0.5)  # the first above
    (strokes,) = [line for line in ax.lines if line.get_label() == "mean field"]
    assert strokes.get_xdata()[0] == 1.25


def swept(tmp_path, monkeypatch, *arguments):
    """Run a sweep, collect it, and return what `figures` prints, and its frame."""
    monkeypatch.setattr(sys, "argv", ["measure", "-m", *SMALL, f"results={tmp_path}", "sweep=s", *arguments])
    measure.main()
    return collecting.collect(tmp_path / "s").frame


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["reduction=batch,mean"], ["batch", "mean"]),
        (["model.weight_variance=null,3.0"], ["weight_variance=3", "weight_variance=null"]),
        (["target=null,layers.6"], ["layers.6", "target=null"]),
    ],
)
def test_settings_of_a_measurement_are_networks_of_their_own(tmp_path, monkeypatch, capsys, arguments, names):
    frame = swept(tmp_path, monkeypatch, *arguments)
    figures.main(figures.Config(study="s", results=str(tmp_path)))
    printed = capsys.readouterr().out
    keys = labels.network_keys(frame.drop(columns="run"))
    table = labels.with_networks(report_growth.growth_table(labels.in_order(frame, keys), keys), keys)
    assert sorted(table["network"]) == names and all(name.split("=")[0] in printed for name in names)
    for run, rows in labels.with_networks(frame, keys).groupby("run"):  # each of one seed: the truth is its own frame
        farthest = frames.to_last_target(rows[rows["quantity"] == "gsc"]).sort_values("depth_from_output").iloc[-1]
        of_network = table.set_index("network").loc[rows["network"].iloc[0]]
        assert of_network["log10_gsc"] == pytest.approx(farthest["log10_value"]), run


def test_figures_ask_what_to_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures"])
    with pytest.raises(SystemExit, match="Error: Name what to draw: study=NAME"):
        command_line.run(figures.main, figures.Config)
    monkeypatch.setattr(sys, "argv", ["figures", f"results={tmp_path}", "sweep=architectures"])
    with pytest.raises(SystemExit, match=r"architectures was not collected \(python -m experiments.collect sweep=arch"):
        command_line.run(figures.main, figures.Config)


def test_figures_of_a_sweep_by_its_name(tmp_path, monkeypatch, capsys):
    swept(tmp_path, monkeypatch, "seed=0,1")
    figures.main(figures.Config(sweep="s", results=str(tmp_path)))
    assert f"Figure: {tmp_path}/s/figures/gsc.png" in capsys.readouterr().out


def test_models_that_have_a_name_are_called_by_it():
    frame = pd.DataFrame({"model": ["alexnet_a", "alexnet_a_no_dropout", "alexnet_b", "mine_b"]})
    names = labels.with_networks(frame, ["model"])["network"]
    assert list(names) == ["AlexNet A", "AlexNet A without dropout", "AlexNet B", "mine_b"]
