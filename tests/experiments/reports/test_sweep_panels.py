"""Figures of sweeps of any number of keys: every network is drawn or named, where the user wants it, and readable."""

import itertools
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments import figures
from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence import words
from experiments.reports import grids, roles
from experiments.reports.roles import Choice
from tests.gradscope.plots.test_plots import profile

mpl.use("Agg")
NUM_LAYERS = 11  # of `profile`


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def sweep(num_seeds=2, **keys):
    """One network per combination of values; its log10 GSC grows by ``slope`` per layer, which differs in each."""
    parts = []
    for number, values in enumerate(itertools.product(*keys.values())):
        own = dict(zip(keys, values, strict=True)) | {"model": "mlp", "data": "none"}
        parts += [profile(seed, 0.01 * (number + 1), **own) for seed in range(num_seeds)]
    return pd.concat(parts, ignore_index=True)


def drawn(frame, metrics=None, **choice):
    return figures.drawn("mine", Collected(frame, metrics, {}), [], Choice(**choice))


def ends(figure):
    """The last value of every curve of a figure, rounded to hundredths: one per network."""
    lines = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) == NUM_LAYERS]
    return sorted(round(float(line.get_ydata()[-1]), 2) for line in lines)


@pytest.mark.parametrize(
    "keys",
    [
        {"gain": [1, 2, 3, 4], "norm": ["none", "batch", "layer"]},
        {"size": [6, 12, 24], "width": [30, 60], "norm": ["none", "batch"], "residual": ["none", "identity"]},
        {"a": [1, 2], "b": [1, 2], "c": [1, 2], "d": [1, 2], "e": ["x", "y"], "f": ["u", "v"]},
        {"gain": list(range(24))},
        {"activation": [f"word{i}" for i in range(30)]},
    ],
)
def test_every_network_has_a_curve_a_band_and_a_rate(keys, capsys):
    frame = sweep(**keys)
    number = int(np.prod([len(values) for values in keys.values()]))
    made = drawn(frame)
    curves = [figure for name, figure in made.items() if name.startswith("gsc")]
    found = sorted(end for figure in curves for end in ends(figure))
    assert len(found) == number
    assert found == pytest.approx([0.1 * (n + 1) for n in range(number)], abs=0.2)
    bands = sum(type(artist).__name__ == "FillBetweenPolyCollection" for figure in curves for ax in figure.axes
                for artist in ax.collections)  # fmt: skip
    assert bands == number
    listed = [tick.get_text() for name, figure in made.items() if name.startswith("rates")
              for tick in figure.axes[0].get_yticklabels()]  # fmt: skip
    assert len(set(listed)) == len(listed) == number
    assert "Not drawn" not in capsys.readouterr().out


def test_what_no_figure_shows_is_said(monkeypatch, capsys):
    monkeypatch.setattr(grids, "MAX_PAGES", 2)
    made = drawn(
        sweep(1, activation=[f"word{i}" for i in range(30)])
    )  # ten colors, six columns, six rows, dashes: none
    assert sum(name.startswith("gsc_") for name in made) == 2
    said = capsys.readouterr().out
    left = [f"word{i}" for i in range(20, 30)]
    assert f"Not drawn: gsc in panels (choose hue=, col= and row=), of {', '.join(left)}." in said


def test_networks_without_finite_values_are_named(capsys):
    frame = sweep(1, gain=list(range(10)))
    dead = (frame["gain"] == 3) & (frame["quantity"] == "gsc")
    frame.loc[dead, "log10_value"] = -np.inf
    made = drawn(frame)
    assert len(ends(made["gsc"])) == 9
    said = capsys.readouterr().out
    assert "Not drawn: gsc (missing, zero or not finite), of gain=3." in said
    assert "Not drawn: growth rates (" in said and "of gain=3." in said


def test_the_user_chooses_what_is_where():
    frame = sweep(gain=[1, 2, 3], norm=["none", "batch"], residual=["none", "identity"], bias=[True, False])
    (name, figure), *rest = drawn(frame, x="gain", y="rate", hue="model.norm", col="residual", row="bias").items()
    assert name == "rate_over_gain" and not rest
    assert {ax.get_title() for ax in figure.axes} == {
        f"bias={bias}, residual={residual}" for bias in ("true", "false") for residual in ("none", "identity")
    }
    slopes = 0.01 * (np.arange(24).reshape(3, 2, 2, 2) + 1)  # gain, norm, residual, bias
    for ax in figure.axes:
        bias, residual = ("=false" in ax.get_title()), ("identity" in ax.get_title())
        measured = [container[0].get_ydata(orig=False) for container in ax.containers]
        assert len(measured) == 2
        for norm, line in enumerate(measured):
            np.testing.assert_allclose(np.log10(line), slopes[:, norm, int(residual), int(bias)], atol=0.02)
    (figure,) = drawn(frame, col="gain,norm").values()
    assert len(figure.axes) == 12 and len(ends(figure)) == 24


def test_a_key_that_others_determine_can_be_chosen():
    frame = sweep(gain=[1, 2, 3], norm=["none", "batch", "layer"])
    frame["model"] = frame["norm"].map({"none": "A", "batch": "B", "layer": "C"})
    assert roles.assign(frame, ["gain", "norm"], {"hue": ["model"]}) == {"hue": ["model"], "col": ["gain"]}
    (figure,) = drawn(frame, hue="model", y="gsc").values()
    assert len(ends(figure)) == 9


def test_a_statistic_against_a_key_is_its_last_layers_mean_and_deviation():
    frame = sweep(3, gain=[1, 2], norm=["none", "batch"])
    (figure,) = drawn(frame, x="gain", y="gsc", hue="norm").values()
    lines = [container[0].get_ydata(orig=False) for container in figure.axes[0].containers]
    rows = frame[(frame["quantity"] == "gsc") & (frame["depth_from_output"] == frame["depth_from_output"].max())]
    wanted = rows.groupby(["norm", "gain"], sort=False)["log10_value"].mean()
    np.testing.assert_allclose(np.concatenate(lines), np.concatenate([wanted["none"], wanted["batch"]]))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"hue": "gian"}, "hue=gian: the sweep has no configuration key 'gian'; did you mean 'gain'?"),
        ({"hue": "gain", "col": "gain"}, "gain is given for two of x=, hue=, col= and row=; give it once."),
        ({"x": "gain,norm"}, "x=gain,norm must be a single key; join keys in hue=, col= or row=."),
        ({"hue": "word"}, "hue=word has 11 values, but hue= shows 10 at most"),
        ({"y": "noise"}, "y=noise: there is no such quantity here; y= can be gsc"),
    ],
)
def test_choices_that_cannot_be_drawn_are_refused(choice, message):
    frame = sweep(1, gain=[1, 2], norm=["none", "batch"])
    frame = pd.concat([frame, *(frame[frame["gain"] == 1].assign(word=f"w{i}") for i in range(10))])
    with pytest.raises(ValueError) as caught:
        drawn(frame, **choice)
    assert message in str(caught.value)


def test_training_of_many_networks_is_drawn_in_panels():
    frame = sweep(2, lr=[1, 2, 3, 4, 5], norm=["none", "batch"]).assign(step=9)
    frame = pd.concat([frame.assign(step=1), frame])
    rows = frame.drop_duplicates(["lr", "norm", "seed", "step"])
    metrics = rows[["lr", "norm", "seed", "step", "model", "data"]].assign(
        epoch=rows["step"] / 9, train_loss=1.0 / rows["lr"], test_accuracy=0.1 * rows["lr"],
    )  # fmt: skip
    (figure,) = drawn(frame, metrics, x="lr", hue="norm").values()
    assert [list(bar[0].get_ydata(orig=False)) for bar in figure.axes[0].containers] == [
        pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    ] * 2
    made = drawn(frame, metrics, x="epoch")
    assert set(made) == {"train_loss_over_epoch", "test_accuracy_over_epoch"}
    assert sum(len(line.get_xdata()) == 2 for ax in made["train_loss_over_epoch"].axes for line in ax.lines) == 10


def test_names_wrap_at_the_ends_of_words():
    name = "depth=100+activation=relu+norm=batch+residual=identity"
    lines = labels.wrapped(name, 30).split("\n")
    assert "".join(lines) == name and len(lines) == 2 and all(line.endswith("+") for line in lines[:-1])
    assert labels.wrapped("norm=batch, residual=none", 12) == "norm=batch,\nresidual=none"


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((1.2521, 1.167, 1.343), "1.25 (1.17 to 1.34)"),
        ((1.00002, 1.000013, 1.000031), "1.000020 (1.000013 to 1.000031)"),
        ((12.3, 1.0, 150.0), "12 (1 to 150)"),
        ((1.5, 1.5, 1.5), "1.5 (no spread)"),
        ((0.00056, 0.000074, 0.0042), "0.00056 (0.00007 to 0.00420)"),
        ((0.0, 0.0, 0.0213), "0.000 (0.000 to 0.021)"),
        ((14312.0, 13120.0, 15580.0), "14300 (13100 to 15600)"),
        ((2.61e-8, 4.9e-9, 4.8e-8), "2.6e-08 (5.0e-09 to 4.8e-08)"),
        ((1.5, np.nan, np.nan), "1.5 (no interval)"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_supports(ends, text):
    assert words.measured(*ends) == text


def test_titles_say_how_many_seeds_each_network_has():
    frame = labels.with_networks(sweep(3, gain=[1, 2]), ["gain"])
    few = frame[(frame["gain"] == 2) | (frame["seed"] == 0)]
    assert grids.spread(frame).startswith("mean over 3 seeds") and grids.spread(few).startswith(
        "mean over 1 to 3 seeds"
    )
    assert grids.spread(frame[frame["seed"] == 0]) == "one seed"


def test_four_panels_stand_in_two_rows_and_legends_have_the_order_of_the_curves():
    frame = sweep(2, gain=[1, 2, 3, 4, 5], bias=[1, 2, 3, 4])
    figure = drawn(frame, hue="gain", col="bias", y="gsc")["gsc"]
    places = [ax.get_position().get_points().round(3) for ax in figure.axes]
    assert len({place[0, 0] for place in places}) == len({place[0, 1] for place in places}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"gain={gain}" for gain in (5, 4, 3, 2, 1)]
    falling = frame.assign(log10_value=-frame["log10_value"])
    figure = drawn(falling, hue="gain", col="bias", y="gsc")["gsc"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"gain={gain}" for gain in (1, 2, 3, 4, 5)]


def test_titles_say_that_points_are_shifted_and_over_how_many_seeds_they_are_means():
    frame = sweep(3, width=[50, 100, 800], norm=["none", "batch"])
    (figure,) = drawn(frame, x="width", y="rate", hue="norm").values()
    assert figure.get_suptitle().endswith("mean over 3 seeds, bars: 95 % interval; points shifted sideways")
    places = [bars[0].get_xdata(orig=False) / [50, 100, 800] for bars in figure.axes[0].containers]
    assert places[0][0] < 1 < places[1][0]
    for place in places:  # the axis is logarithmic: shifts are factors
        np.testing.assert_allclose(place, place[0])
    (figure,) = drawn(frame, x="width", y="rate", col="norm").values()
    assert figure.get_suptitle().endswith("mean over 3 seeds, bars: 95 % interval")


def test_keys_that_name_the_network_are_written_as_its_name():
    table = pd.DataFrame({"activation": ["relu", "selu"], "norm": ["batch", "none"], "width": 50, "bias": ["a", "b"]})
    named = roles.with_roles(table, {"col": ["activation", "norm"], "hue": ["width"]})
    assert list(named["col"]) == ["relu+batch", "selu"] and list(named["hue"]) == ["width=50"] * 2
    named = roles.with_roles(table, {"col": ["norm", "bias"], "hue": ["activation"]})
    assert list(named["col"]) == ["norm=batch, bias=a", "norm=none, bias=b"]


def test_curves_of_mean_field_say_which_key_they_are_of():
    frame = pd.concat([
        profile(seed, 0.05, model="mlp", activation="tanh", norm=norm, residual="none", data="noise",
                init="auto", batch_size=16) for seed in range(2) for norm in ("none", "layer")
    ])  # fmt: skip
    ax = drawn(frame.assign(depth=10, activation=np.where(frame["norm"] == "none", "selu", "tanh")))["gsc"].axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "mean field, no norm",
        "mean field, layer norm",
    ]
    assert all(re.search(r": \d\.\d{1,3}, ", text.get_text()) for text in ax.texts)
