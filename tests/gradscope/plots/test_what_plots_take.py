"""Plots take what the library returns, average seeds only, keep the caller's style, and name what a frame lacks."""

from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope import plots
from gradscope.plots.drawing import short_names
from tests.gradscope.plots.test_plots import profile, records

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def network(seed: int, activation: str = "tanh", depth: int = 12) -> gs.models.MLP:
    generator = torch.Generator().manual_seed(seed)
    return gs.models.MLP(depth=depth, width=10, activation=activation, generator=generator)


X = torch.randn(6, 10, generator=torch.Generator().manual_seed(9))
SEEDS = [gs.gsc(network(seed), X) for seed in range(3)]
SELU = [gs.gsc(network(seed, "selu"), X) for seed in range(3)]
MATRIX = gs.gsc_matrix(network(0), X)


def curves(ax) -> list[np.ndarray]:
    """The measured curves, without lines of reference."""
    return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines if line.get_gid() is not None]


@pytest.mark.parametrize(
    "data",
    [SEEDS[0], MATRIX, MATRIX.to_frame(), [MATRIX], {"a": SEEDS[0]}],
    ids="profile matrix frame list dict".split(),
)
@pytest.mark.parametrize("draw", [plots.profile, plots.named_profile])
def test_any_result_is_drawn(draw, data):
    (drawn,) = curves(draw(data))
    expected = SEEDS[0].log10_values[:, 0]
    np.testing.assert_allclose(drawn, expected[::-1] if draw is plots.profile else expected, atol=1e-12)


def test_results_draw_themselves():
    ax = plt.figure().subplots()
    assert SEEDS[0].plot(ax=ax) is ax and len(curves(ax)) == 1
    assert SELU[0].plot(ax=ax) is ax and len({line.get_color() for line in ax.lines if line.get_gid() is not None}) == 2
    mesh = MATRIX.plot(colorbar=False).collections[0]
    cells = np.ma.filled(mesh.get_array().astype(float), np.nan)
    np.testing.assert_allclose(cells, MATRIX.log10_values.T)
    (row,) = np.asarray(plots.matrix(SEEDS[0]).collections[0].get_array())
    np.testing.assert_allclose(row, SEEDS[0].log10_values[:, 0])
    parameters = gs.parameter_gsc(network(0), X)
    np.testing.assert_allclose(curves(parameters.plot())[0], parameters.log10_values[::-1, 0])


def test_a_list_is_one_network_and_a_dict_several():
    (mean,) = curves(plots.profile(SEEDS))
    np.testing.assert_allclose(mean, np.mean([one.log10_values[::-1, 0] for one in SEEDS], axis=0))
    ax = plots.profile({"tanh": SEEDS, "selu": SELU})
    np.testing.assert_allclose(curves(ax)[1], np.mean([one.log10_values[::-1, 0] for one in SELU], axis=0))
    for text, results in zip(ax.texts, (SEEDS, SELU), strict=True):
        said = " ".join(text.get_text().split())
        assert str(gs.growth(results)).replace("95 % interval ", "").startswith(said.split(": ", 1)[1])


@pytest.mark.parametrize("draw", [plots.profile, plots.named_profile])
def test_the_legend_says_what_growth_says(draw):
    """The verdict, the rate and the interval, in the words of the table."""
    for results in (SEEDS, SELU):
        (text,) = draw(results).get_legend().get_texts()
        growth = gs.growth(results)
        said = " ".join(text.get_text().split())
        assert str(growth).replace("95 % interval ", "").startswith(said) and said.endswith(growth.verdict)


def test_rates_are_those_of_growth():
    found = {"tanh": gs.growth(SEEDS), "selu": gs.growth(SELU)}
    for data in ({"tanh": SEEDS, "selu": SELU}, found):
        ax = plots.rates(data)
        assert [text.get_text() for text in ax.get_yticklabels()] == ["tanh", "selu"]
        at = dict(pair for line, *_ in ax.containers for pair in zip(*reversed(line.get_data()), strict=True))
        assert at == pytest.approx({0: found["tanh"].rate, 1: found["selu"].rate})
    with pytest.raises(ValueError, match="short: A growth rate needs at least 6 layers"):
        plots.rates({"short": gs.gsc(network(0, depth=3), X)})


def test_the_only_column_that_varies_becomes_the_hue():
    frame = pd.concat([profile(0, 0.1, lr=0.1), profile(0, 0.2, lr=0.5)])
    assert [text.get_text().split(":")[0] for text in plots.profile(frame).texts] == ["lr 0.1", "lr 0.5"]


@pytest.mark.parametrize("draw", [plots.profile, plots.named_profile])
def test_columns_that_vary_within_a_curve_are_named(draw):
    parts = [profile(seed, 0.1, lr=lr, norm=norm) for seed, (lr, norm) in enumerate([(1, "a"), (1, "b"), (2, "a")])]
    frame = pd.concat(parts)
    with pytest.raises(ValueError, match=r"Columns 'lr', 'norm' vary within a curve.*hue= and style="):
        draw(frame)
    with pytest.raises(ValueError, match=r"Column 'norm' varies within a curve.*frame\['norm'\] == 'a'"):
        draw(frame, hue="lr")
    with pytest.raises(ValueError, match=r"'layers.0' occurs more than once.*dict"):
        draw(pd.concat([profile(0, 0.1), profile(0, 0.2)]))


@pytest.mark.parametrize(
    "draw",
    [plots.evolution, plots.before_after, lambda frame: plots.over_steps(frame, "gradient_norm"), plots.matrix],
)
def test_figures_of_one_network_refuse_several(draw):
    other = records(1).assign(network="b", step=lambda own: own["step"] + (0 if draw is plots.matrix else 1))
    frame = pd.concat([records(0).assign(network="a"), other])
    with pytest.raises(ValueError, match=r"'network'.*shows one network.*frame\[frame\["):
        draw(frame)


def test_metrics_of_several_runs_are_told_apart():
    metrics = pd.DataFrame({"step": [1, 2] * 2, "loss": [4.0, 3.0, 2.0, 1.0], "net": ["a", "a", "b", "b"]})
    np.testing.assert_array_equal(
        [line.get_ydata() for line in plots.learning(metrics, "loss").lines], [[4, 3], [2, 1]]
    )
    with pytest.raises(ValueError, match=r"several values at step 1 of one seed.*'lr'"):
        plots.learning(metrics.drop(columns="net").assign(lr=[1, 1, 2, 2]), "loss")


def test_the_callers_style_holds():
    colors = ["#123456", "#654321"]
    with mpl.rc_context({"axes.prop_cycle": mpl.cycler(color=colors), "mathtext.fontset": "stix", "font.size": 7}):
        before = dict(mpl.rcParams)
        ax = plots.profile({"tanh": SEEDS, "selu": SELU})
        assert dict(mpl.rcParams) == before
    assert [line.get_color() for line in ax.lines if line.get_gid() is not None] == colors
    assert [text.get_color() for text in ax.texts] == colors
    own = plt.figure().subplots()
    own.set_prop_cycle(color=["red"], linestyle=["--"])
    (line,) = [line for line in plots.profile(SEEDS, ax=own).lines if line.get_gid() is not None]
    assert (line.get_color(), line.get_linestyle()) == ("red", "--")


def test_nothing_is_black_on_black():
    with plt.style.context("dark_background"):
        growth = {"rate": [1.2], "rate_low": [1.1], "rate_high": [1.3], "verdict": ["stable"], "theory": [1.2]}
        axes = [plots.rates(pd.DataFrame({"network": ["a"], **growth})), SEEDS[0].plot()]
        axes.append(plots.over_steps(records(0), "gradient_norm"))
    for ax in axes:
        for artist in (*ax.lines, *ax.texts):
            assert sum(mpl.colors.to_rgb(artist.get_color())) > 0.3


@pytest.mark.parametrize(
    ("draw", "lacking", "message"),
    [
        (plots.profile, "depth_from_output", r"lacks the column 'depth_from_output'.*gradscope.gsc"),
        (plots.named_profile, "quantity", r"lacks the column 'quantity'"),
        (plots.matrix, "target", r"lacks the column 'target'.*gradscope.gsc_matrix"),
        (plots.evolution, "step", r"lacks the column 'step'.*gradscope.Monitor"),
        (plots.before_after, "step", r"lacks the column 'step'.*gradscope.Monitor"),
        (lambda frame: plots.over_steps(frame, "gradient_norm"), "step", r"lacks the column 'step'.*gradscope.Monitor"),
        (lambda frame: plots.statistic(frame, "gradient_norm"), "value", r"the column 'value'.*gradscope.measure"),
        (plots.rates, "depth_from_output", r"lacks the column 'depth_from_output'"),
        (plots.convergence, "width", r"lacks the column 'width'"),
        (lambda frame: plots.profile(frame, hue="norm"), "reduction", r"lacks the column 'norm'"),
        (lambda frame: plots.learning(frame, "loss"), "value", r"lacks the column 'loss'"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_the_call_that_makes_it(draw, lacking, message):
    with pytest.raises(ValueError, match=message) as raised:
        draw(records(0).drop(columns=lacking, errors="ignore"))
    assert len(str(raised.value)) <= 400


def test_other_things_are_refused():
    for nothing in ([], {}):
        with pytest.raises(ValueError, match="empty"):
            plots.profile(nothing)
    with pytest.raises(TypeError, match=r"takes a Profile.*got int"):
        plots.profile(3)


def test_one_record_and_one_layer():
    frame = records(0, steps=(7,))
    for draw in (plots.evolution, plots.before_after, lambda own: plots.over_steps(own, "gradient_norm")):
        ax = draw(frame)
        ax.figure.canvas.draw()
    assert [line.get_marker() for line in ax.lines if line.get_label().startswith("layers")] == ["o", "s", "^", "D"]
    assert ax.get_xticks().tolist() == [7]
    lone = gs.parameter_gsc(nn.Sequential(nn.Linear(10, 3)), X)
    (line,) = [line for line in lone.plot().lines if line.get_gid() is not None]
    assert line.get_marker() == "o" and line.get_ydata() == pytest.approx(lone.log10_values[:, 0])


def layers(number: int, long: bool) -> list[str]:
    name = "backbone.encoder.layers.{}.attention.output.dense" if long else "layers.{}"
    return [name.format(place) for place in range(number)]


def boxes(texts) -> list:
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("number", [12, 60, 300])
def test_names_of_layers_never_overlap(number, long):
    frame = profile(0, 0.01, depth=number - 1).assign(layer=layers(number, long))
    frame = frame.assign(target=frame["layer"].iloc[-1])
    norms = frame.assign(quantity="gradient_norm")
    recorded = pd.concat([part.assign(step=step) for part in (frame, norms) for step in (0, 5)])
    drawn = [
        plots.named_profile(frame), plots.before_after(recorded), plots.evolution(recorded), plots.matrix(frame),
        plots.over_steps(recorded, "gradient_norm"),
    ]  # fmt: skip
    known = set(short_names(frame["layer"].tolist()))
    for ax in drawn:
        ax.figure.canvas.draw()
        for texts in (ax.get_xticklabels(), ax.get_yticklabels(), ax.texts if number > 12 else []):
            found = boxes(texts)
            assert not any(a.overlaps(b) for a, b in combinations(found, 2))
        assert ax.get_window_extent().width > 150 and ax.get_window_extent().height > 100
    for texts in (drawn[0].get_xticklabels(), drawn[2].get_yticklabels(), drawn[4].texts):
        named = [text.get_text() for text in texts if text.get_text()]
        assert set(named) <= known and len(set(named)) == len(named) >= min(number, 12) / 2


@pytest.mark.parametrize("name", ["sum{}", "encoder.residual_attention_stage_of_the_encoder_{}"])
def test_all_texts_lie_inside_the_figure(name):
    places = [(target, source) for target in range(11) for source in range(target + 1)]
    square = pd.DataFrame(places, columns=["target", "index"]).assign(
        quantity="gsc", depth_from_output=lambda own: own["target"] - own["index"], log10_value=0.0,
        layer=lambda own: own["index"].map(name.format), differs=True, rounding=1e-7, value=1e-5,
    )  # fmt: skip
    square.loc[(square["target"] == 10) & (square["index"] < 10), "log10_value"] = -2.5  # as a head with pooling has
    frame = square.assign(target=square["target"].map(name.format))
    last = frame[frame["target"] == name.format(10)]
    recorded = pd.concat([last.assign(step=step) for step in (0, 5)])
    apart = pd.concat([last.assign(quantity=quantity) for quantity in ("distance", "local_distance")])
    quantities = ("stream_rms", "write_rms", "write_ratio", "skip_share", "branch_share", "cross_share")
    additions = pd.concat([last.assign(quantity=quantity, value=0.5) for quantity in quantities]).assign(
        log10_stderr_sample=np.nan, stderr_sample=np.nan, stderr_probe=np.nan
    )
    measured = ("relative_attention_entropy", "largest_attention_logit")
    heads = pd.concat([last.assign(quantity=quantity, head=head) for quantity in measured for head in range(4)])
    for ax in (
        plots.matrix(frame), plots.matrix(frame, colorbar=False), plots.named_profile(last), plots.evolution(recorded),
        plots.before_after(recorded), plots.difference(apart), plots.residual(additions)[2], plots.attention(heads)[0],
    ):  # fmt: skip
        ax.figure.canvas.draw()
        (width, height), axes = ax.figure.bbox.size, ax.figure.axes
        labels = [axis.label for one in axes for axis in (one.xaxis, one.yaxis)]
        names = [text for text in ax.get_xticklabels() if text.get_text()[:1].isalpha()]
        for box in boxes([*labels, *names]):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_long_names_stay_different():
    name = "encoder.layers.{}.attention_of_the_encoder.output.dense"
    assert len(set(short_names([name.format(place) for place in range(30)]))) == 30
    clash = ["a" * 20 + ".x.weight", "ab" * 10 + ".x.weight"]
    assert short_names(clash) == clash


def test_a_legend_covers_no_curve():
    for data in (SEEDS[0], SELU, [gs.gsc(network(0, "relu"), X)]):
        ax = plots.profile(data)
        ax.figure.canvas.draw()
        box = ax.get_legend().get_window_extent()
        for line in ax.lines:
            if line.get_gid() is not None:
                assert not line.get_path().transformed(ax.transData).intersects_bbox(box, filled=False)


def test_theory_takes_the_color_of_its_network():
    predicted = {name: gs.meanfield.predict_mlp(name, 12, batch_size=6) for name in ("tanh", "selu")}
    ax = plots.theory(predicted, ax=plots.profile({"tanh": SEEDS, "selu": SELU}))
    measured = [line.get_color() for line in ax.lines if line.get_gid() is not None]
    thin = [line for line in ax.lines if line.get_label() == "mean field"]
    assert [line.get_color() for line in thin] == measured
    np.testing.assert_allclose(thin[0].get_ydata(), predicted["tanh"].log10_gsc[::-1])


def test_a_curve_leaves_out_layers_inside_branches():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Linear(10, 10)

        def forward(self, x):
            return x + torch.tanh(self.branch(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(7)))
    mixed, blocks = (gs.gsc(model, X, layers=layers) for layers in ("*", [str(number) for number in range(7)]))
    assert len(mixed.layers) > len(blocks.layers)
    assert curves(mixed.plot())[0][:7] == pytest.approx(curves(blocks.plot())[0])
