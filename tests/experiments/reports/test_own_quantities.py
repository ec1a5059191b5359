"""Sweeps whose own function replaces the measurement of GSC: measured, collected and drawn by the commands."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments import figures
from experiments.archive import collecting
from experiments.archive.tables import Collected
from experiments.config.command_line import parse
from experiments.reports.growth import growth_table
from experiments.reports.roles import Choice
from gradscope import frames
from tests.commands import run
from tests.gradscope.plots.test_plots import profile

mpl.use("Agg")
HERE = "tests.experiments.reports.test_own_quantities"
DEPTHS, WIDTHS, ACTIVATIONS = (2, 3, 5), (4, 8), ("relu", "tanh")
KEYS = ("model.width=4,8", "model.activation=relu,tanh", "seeds=2", "data.batch_size=4")
EVERY_KEY = ("hue=width", "col=depth", "row=activation")


def place(model, x, *, generator=None):
    """Of each layer: its place plus the size of its input."""
    sizes = [parameter.shape[1] for parameter in model.parameters()]
    index = np.arange(len(sizes))
    columns = {"layer": [f"layers.{i}" for i in index], "index": index, "depth_from_output": index[::-1]}
    return frames.tidy({**columns, "num_samples": len(x), "quantity": "place", "value": index + sizes})


def weights(model, x, *, generator=None):
    """The number of weights, which is depth times width squared."""
    return frames.observed("weights", sum(parameter.numel() for parameter in model.parameters()))


def several(model, x, *, generator=None):
    return pd.concat([place(model, x), weights(model, x)], ignore_index=True)


def without_columns(model, x, *, generator=None):
    return place(model, x).drop(columns=["depth_from_output", "num_samples"])


def with_a_key(model, x, *, generator=None):
    return place(model, x).assign(width=7)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def measured(results, function, *overrides):
    own = [f"+measurement._target_={HERE}.{function}"] if function else ["probes=1"]
    code, out, err = run("experiments.measure", "-m", *KEYS, *own, f"results={results}", "sweep=s", *overrides)
    assert code == 0, out + err
    code, out, err = run("experiments.collect", f"results={results}", "sweep=s")
    assert code == 0, out + err


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the collected sweep of a function."""
    made = {}

    def of(function):
        if function not in made:
            made[function] = tmp_path_factory.mktemp(function)
            measured(made[function], function, f"model.depth={','.join(map(str, DEPTHS))}")
        return made[function]

    return of


def drawn(results, **choice):
    return figures.drawn("s", collecting.load(results / "s"), [], Choice(**choice))


def curves(ax):
    return [line for line in ax.lines if len(line.get_ydata())]  # seaborn adds empty lines for its legend


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        ("place", (), "place"),
        ("place", EVERY_KEY, "place"),
        ("place", ("x=layer",), "place"),
        ("place", ("x=width", "hue=activation", "col=depth"), "place_over_width"),
        ("weights", (), "weights_over_depth"),
        ("weights", ("hue=depth", "row=activation"), "weights_over_width"),
        ("several", ("y=place", "row=depth"), "place"),
        ("several", ("y=weights",), "weights_over_depth"),
        ("several", ("x=activation", "y=place"), "place_over_activation"),
    ],
)
def test_the_own_quantity_is_drawn(results, function, arguments, name, capsys):
    folder = results(function)
    figures.main(parse(figures.Config, ["sweep=s", f"results={folder}", *arguments]))
    path = folder / "s" / "figures" / f"{name}.png"
    assert capsys.readouterr().out == f"Figure: {path}\n" and path.is_file()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("place", ("y=gsc",), r"y=gsc: there is no such quantity here; y= can be place\."),
        ("place", ("x=depth", "y=rate"), r"y=rate: .* \(a rate needs GSC of six layers\); y= can be place\."),
        ("place", ("study=architectures", "sweep=s"), r"Growth rates need GSC, .* only place: choose .* y=\."),
        ("place", ("html=true",), r"html=true writes a page about GSC, which s did not measure: leave html=true out\."),
        ("weights", EVERY_KEY, r"weights is one number per network, so .*: give one of depth, width, activation to x="),
        ("several", (), r"This sweep has no gsc, which is drawn by default; y= can be place, weights\."),
        ("several", EVERY_KEY, r"This sweep has no gsc, .*; y= can be place, weights\."),
        ("several", ("x=depth",), r"This sweep has no rate, .* GSC of six layers\); y= can be place, weights\."),
    ],
)
def test_what_cannot_be_drawn_is_an_error(results, function, arguments, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        figures.main(parse(figures.Config, ["sweep=s", f"results={results(function)}", *arguments]))


def test_nothing_drawn_is_exit_code_1(results):
    code, _, err = run("experiments.figures", "sweep=s", f"results={results('several')}", *EVERY_KEY)
    assert code == 1 and err.startswith("Error: This sweep has no gsc") and "Traceback" not in err


def test_a_study_without_a_figure_is_an_error(results, monkeypatch):
    monkeypatch.setattr(figures, "drawn", lambda *_: {})
    with pytest.raises(ValueError, match=r"Nothing was drawn, because no figure of s has data: .*status says"):
        figures.main(parse(figures.Config, ["sweep=s", f"results={results('place')}"]))


def test_curves_and_points_are_the_values_of_the_function(results):
    grid = drawn(results("place"), hue="width", col="depth", row="activation")["place"]
    lines = [list(line.get_ydata()) for ax in grid.axes for line in curves(ax)]
    closed_form = [[i + width for i in range(depth)] for depth in DEPTHS for width in WIDTHS for _ in ACTIVATIONS]
    assert sorted(lines) == sorted(closed_form)
    for choice in ({}, {"hue": "width", "col": "activation"}):  # the x axis is the depth
        grid = drawn(results("weights"), **choice)["weights_over_depth"]
        points = [list(bars[0].get_ydata(orig=False)) for ax in grid.axes for bars in ax.containers]
        assert sorted(points) == sorted([depth * width**2 for depth in DEPTHS] for width in WIDTHS for _ in ACTIVATIONS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("without_columns", "a frame without depth_from_output, num_samples: make it with gs.frames.tidy"),
        ("with_a_key", "a frame with the column 'width', but the key of this name needs this column"),
    ],
)
def test_a_frame_with_wrong_columns_names_the_function(tmp_path, function, message):
    own = f"+measurement._target_={HERE}.{function}"
    code, _, err = run("experiments.measure", own, f"results={tmp_path}", "model.depth=2", "model.width=4")
    assert code == 1 and "Traceback (" not in err and f".{function} returned {message}" in err


def test_a_sweep_that_is_continued_is_drawn_whole(tmp_path):
    for depths in ((2,), DEPTHS):
        measured(tmp_path, "place", f"model.depth={','.join(map(str, depths))}")
        ((_, figure),) = drawn(tmp_path, hue="depth").items()
        lines = [len(line.get_ydata()) for ax in figure.axes for line in curves(ax)]
        assert sorted(lines) == sorted(depth for depth in depths for _ in range(len(WIDTHS) * len(ACTIVATIONS)))


def test_gsc_and_the_own_quantity_in_one_sweep_have_figures_of_their_own(tmp_path):
    for function in (None, "place"):
        measured(tmp_path, function, "model.depth=2,7")
    made = drawn(tmp_path)
    assert {"gsc", "sign_diversity"} <= made.keys() and "place" not in made
    made |= drawn(tmp_path, y="place") | drawn(tmp_path, x="depth")
    for name in ("gsc", "place", "rate_over_depth"):
        words = [text.get_text() for text in made[name].findobj(mpl.text.Text)]
        assert not any("measurement" in text or "null" in text for text in words), name


def test_widths_without_a_rate_are_no_points_of_the_convergence(tmp_path):
    plain = {"model": "mlp", "activation": "tanh", "norm": "none", "residual": "none", "data": "noise", "init": "auto"}
    frame = pd.concat([
        profile(seed, 0.05, depth, width=width, batch_size=4, **plain).assign(depth=depth)
        for depth in (4, 10) for width in (50, 100) for seed in range(2)
    ])  # fmt: skip
    made = figures.drawn("s", Collected(frame, None, {}), [])
    (bars,) = made["convergence"].axes[0].containers
    assert len(bars[0].get_xdata()) == 2
    figures.write_png(made["convergence"], tmp_path / "convergence.png")


def test_a_rate_is_offered_only_if_there_is_one():
    shallow, deep = (
        Collected(pd.concat([profile(0, 0.05, depth, model="mlp", data="noise", width=n) for n in (4, 8)]), None, {})
        for depth in (5, 6)
    )
    assert growth_table(shallow.frame, ["width"])["rate"].isna().all()
    with pytest.raises(ValueError, match=r"y=rate: .* six layers\); y= can be gsc\."):
        figures.drawn("s", shallow, [], Choice(x="width", y="rate"))
    assert growth_table(deep.frame, ["width"])["rate"].notna().all()
    assert figures.drawn("s", deep, [], Choice(x="width")).keys() == {"rate_over_width"}
    with pytest.raises(ValueError, match=r"y=nlc: .*; y= can be gsc, rate\."):
        figures.drawn("s", deep, [], Choice(y="nlc"))
