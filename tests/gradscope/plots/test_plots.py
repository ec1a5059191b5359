"""Figures are tested by the data in their Axes."""

from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from experiments.reports import training_figures
from gradscope import frames, plots

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def profile(seed: int, slope: float, depth: int = 10, **columns) -> pd.DataFrame:
    index = np.arange(depth + 1)
    noise = np.random.default_rng(seed).normal(size=depth + 1) * 0.01
    frame = frames.tidy(
        {
            "layer": [f"layers.{i}" for i in index], "index": index, "depth_from_output": depth - index,
            "target": f"layers.{depth}", "quantity": "gsc", "log10_value": slope * (depth - index) + noise,
            "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.02, "reduction": "batch", "coupled": False,
            "num_probes": 0, "num_samples": 5,
        }
    )  # fmt: skip
    return frame.assign(seed=seed, **columns)


def study() -> pd.DataFrame:
    parts = [
        profile(seed, slope, activation=activation, norm=norm)
        for seed in range(4)
        for activation, norm, slope in (("relu", "none", 0.0), ("relu", "batch", 0.2), ("tanh", "none", 0.1))
    ]
    return pd.concat(parts, ignore_index=True)


def test_lines_are_means_over_seeds():
    frame = study()
    ax = plots.profile(frame, hue="activation", style="norm")
    means = frame.groupby(["activation", "norm", "depth_from_output"])["log10_value"].mean()
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 11]
    for network in (("relu", "none"), ("relu", "batch"), ("tanh", "none")):
        assert any(np.allclose(line, means[network]) for line in drawn)
    assert len(drawn) == 3
    assert "GSC" in ax.get_ylabel()
    assert "squared" in ax.get_ylabel()


def test_the_horizontal_axis_names_the_target_if_there_is_only_one():
    assert plots.profile(profile(0, 0.1)).get_xlabel() == "layers to 'layers.10'"
    several = {"short": profile(0, 0.1, depth=8), "long": profile(0, 0.1)}
    assert plots.profile(several).get_xlabel() == "layers to the target"


def test_a_prediction_has_the_color_of_its_network_and_a_shape_of_its_own():
    """The color also where the theory of another network is missing."""
    frame = study()
    ax = plots.profile(frame, hue="activation", style="norm")
    drawn, depth = ax.get_lines(), np.arange(11)
    curve = pd.DataFrame({"depth_from_output": depth, "log10_value": 0.1 * depth})
    predicted = [curve.assign(activation="tanh", norm=norm) for norm in ("none", "batch")]
    plots.theory(pd.concat(predicted), ["activation", "norm"], ax=ax)
    plain, batch = ax.get_lines()[len(drawn) :]
    np.testing.assert_allclose(plain.get_ydata(), 0.1 * depth)
    means = frame[frame["activation"] == "tanh"].groupby("depth_from_output")["log10_value"].mean()
    (measured,) = (old for old in drawn if len(old.get_xdata()) == 11 and np.allclose(old.get_ydata(), means))
    for line in (plain, batch):
        assert mpl.colors.to_rgb(line.get_color()) == mpl.colors.to_rgb(measured.get_color())
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["mean field", "mean field, batch"]
    shapes = [line.get_marker() for line in (plain, batch)]
    assert len(set(shapes)) == 2 and shapes == [handle.get_marker() for handle in legend.legend_handles]


def test_few_curves_are_labeled_at_their_ends_without_overlap():
    ax = plots.profile(study(), hue="activation", style="norm", notes={("relu", "batch"): "1.58, exploding"})
    assert ax.get_legend() is None
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"relu", "relu+batch: 1.58, exploding", "tanh"}
    figure = ax.figure
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in texts.values()), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_only_the_last_target_is_drawn_each_run_by_its_own_depth():
    short, deep = profile(0, 0.1, 5), profile(0, 0.1, 10)
    inner = deep[deep["index"] <= 4].assign(target="layers.4", depth_from_output=lambda f: 4 - f["index"])
    frame = pd.concat([short.assign(depth=5), deep.assign(depth=10), inner.assign(depth=10)], ignore_index=True)
    kept = frames.to_last_target(frame)
    assert kept.groupby("depth").size().to_dict() == {5: 6, 10: 11}
    assert set(kept["target"]) == {"layers.5", "layers.10"}


def test_a_single_exact_run_has_no_band():
    ax = plots.profile(profile(0, 0.1).assign(log10_stderr_sample=0.0))
    assert not ax.collections


def band(ax: Axes) -> np.ndarray:
    """The lower and the upper end of the only band at each x."""
    (collection,) = ax.collections
    points = collection.get_paths()[0].vertices
    return np.array([[points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()] for x in range(11)])


def test_bands_of_one_run_are_its_intervals_and_of_seeds_one_standard_deviation():
    frame = profile(0, 0.1).sort_values("depth_from_output")
    low, high = frame["log10_value"] - 0.1, frame["log10_value"] + 0.3
    ax = plots.profile(frame.assign(log10_low=low, log10_high=high))
    np.testing.assert_allclose(band(ax), np.column_stack([low, high]))
    ax = plots.profile(frame)  # without interval: 1.96 standard errors
    np.testing.assert_allclose(band(ax), frame["log10_value"].to_numpy()[:, None] + [-1.96 * 0.02, 1.96 * 0.02])
    seeds = pd.concat([profile(seed, 0.1) for seed in range(4)])
    by_depth = seeds.groupby("depth_from_output")["log10_value"]
    expected = np.column_stack([by_depth.mean() - by_depth.std(), by_depth.mean() + by_depth.std()])
    np.testing.assert_allclose(band(plots.profile(seeds)), expected)


def test_named_layers_of_a_small_network():
    ax = plots.named_profile(profile(0, 0.1))
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"layers.{i}" for i in range(11)]


def test_statistics_against_depth():
    frame = profile(0, 0.1).assign(quantity="sign_diversity")
    ax = plots.statistic(frame, "sign_diversity")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), frame["value"])
    assert ax.get_ylim()[0] == 0


def test_the_heat_map_holds_every_pair():
    parts = []
    for target in range(4):
        part = profile(target, 0.3, depth=target)
        parts.append(part.assign(seed=0))
    frame = pd.concat(parts, ignore_index=True)
    ax = plots.matrix(frame)
    mesh = ax.collections[0]
    cells = np.ma.filled(mesh.get_array().astype(float), np.nan).reshape(4, 4)
    assert np.isnan(cells[np.triu_indices(4, 1)]).all()
    targets = frame["target"].str.removeprefix("layers.").astype(int)
    np.testing.assert_allclose(cells[targets, frame["index"]], frame["log10_value"])
    assert mesh.get_clim() == (-np.nanmax(np.abs(cells)), np.nanmax(np.abs(cells)))


def test_a_missing_quantity_is_an_error():
    with pytest.raises(ValueError, match=r"'sign_diversity'.*'gsc'"):
        plots.statistic(profile(0, 0.1), "sign_diversity")


def records(seed: int, steps=(0, 10, 40)) -> pd.DataFrame:
    parts = []
    for number, step in enumerate(steps):
        gsc = profile(seed, 0.1 * number, depth=4)
        norms = gsc[gsc["index"] > 0].assign(quantity="gradient_norm", target=None, depth_from_output=0)
        parts += [gsc.assign(step=step), norms.assign(step=step, log10_value=-norms["index"].astype(float) - number)]
    return pd.concat(parts).assign(seed=seed)


def test_evolution_shows_each_layer_and_step():
    frame = pd.concat([records(0), records(1)])
    ax = plots.evolution(frame)
    (mesh,) = ax.collections
    expected = frame[frame["quantity"] == "gsc"].groupby(["index", "step"])["log10_value"].mean().unstack()
    np.testing.assert_allclose(mesh.get_array(), expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"layers.{i}" for i in range(5)]
    assert mesh.norm.vmin == -mesh.norm.vmax and ax.yaxis_inverted()
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-5, 5, 25, 55])  # cells end half way between steps
    norms = plots.evolution(frame, "gradient_norm", colorbar=False).collections[0]
    assert norms.norm.vmin == pytest.approx(-6) and norms.norm.vmax == pytest.approx(-1)
    with pytest.raises(ValueError, match="'nothing'"):
        plots.evolution(frame, "nothing")


def test_before_and_after():
    ax = plots.before_after(pd.concat([records(0), records(1)]))
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()[:2]}
    np.testing.assert_allclose(lines["before (step 0)"], 0, atol=0.05)
    np.testing.assert_allclose(lines["after (step 40)"], [0.8, 0.6, 0.4, 0.2, 0], atol=0.05)
    alone = plots.before_after(records(0, steps=(7,)))
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["step 7"]


def test_over_steps_names_each_layer_once():
    ax = plots.over_steps(pd.concat([records(0), records(1)]), "gradient_norm")
    assert [text.get_text() for text in ax.texts] == [f"layers.{i}" for i in range(1, 5)]
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [1e-1, 1e-2, 1e-3])
    assert len({line.get_marker() for line in ax.get_lines()}) == 4
    heights = sorted(np.log10(text.xyann[1]) for text in ax.texts)
    assert all(b - a > 0.05 for a, b in pairwise(heights))


def with_zeros(seed: int = 0) -> pd.DataFrame:
    """Records of a network whose layer 1 is dead from step 10 on."""
    frame = records(seed)
    dead = (frame["index"] == 1) & (frame["step"] >= 10)
    return frame.assign(log10_value=frame["log10_value"].mask(dead, -np.inf), value=frame["value"].mask(dead, 0.0))


def test_zeros_are_drawn_in_a_color_of_their_own():
    frame = with_zeros()
    ax = plots.evolution(frame)
    (mesh,) = ax.collections
    finite = frame.loc[(frame["quantity"] == "gsc") & np.isfinite(frame["log10_value"]), "log10_value"]
    assert mesh.get_clim() == pytest.approx((-finite.abs().max(), finite.abs().max()))
    ax.figure.canvas.draw()
    black = (mesh.get_facecolors() == (0, 0, 0, 1)).all(axis=1).reshape(mesh.get_array().shape)
    assert black.tolist() == [[False, index == 1, index == 1] for index in range(5)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["zero"]
    assert plots.evolution(records(0)).get_legend() is None
    narrow = plots.evolution(records(0), "gradient_norm", limits=(-3.0, -2.0)).collections[0]
    narrow.figure.canvas.draw()
    assert not (narrow.get_facecolors() == (0, 0, 0, 1)).all(axis=1).any()  # small, but not zero


def test_lines_of_numbers_that_become_zero():
    ax = plots.over_steps(with_zeros(), "gradient_norm")
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [0.1, np.nan, np.nan])
    assert [text.get_text() for text in ax.texts] == ["layers.1 (zero at times)", *(f"layers.{i}" for i in (2, 3, 4))]
    assert all(np.isfinite([*text.xy, *text.xyann]).all() for text in ax.texts)
    before = plots.before_after(with_zeros())
    labels = [text.get_text() for text in before.get_legend().get_texts()]
    assert labels == ["before (step 0)", "after (step 40; zero in 1 of 5 layers)"]
    assert np.isfinite(before.get_ylim()).all()


def test_nothing_but_zeros():
    frame = records(0).assign(log10_value=-np.inf, value=0.0)
    for draw in (plots.evolution, plots.over_steps):
        with pytest.raises(ValueError, match="zero"):
            draw(frame, "gradient_norm")


def test_figures_of_a_network_that_died_beside_one_that_did_not():
    dead = records(1).assign(log10_value=-np.inf, value=0.0, network="dead")
    frame = pd.concat([with_zeros().assign(network="alive"), dead], ignore_index=True)
    metrics = pd.DataFrame({"step": [1, 2] * 2, "seed": 0, "train_loss": 1.0, "network": ["alive"] * 2 + ["dead"] * 2})
    drawn = training_figures.draw(frame, metrics, "title")  # the run was stopped before its first test
    assert "no run reached its first test" in [text.get_text() for text in drawn["learning"].axes[1].texts]
    alive, gone = drawn["gsc_over_training"].axes[:2]
    assert np.isfinite(alive.collections[0].get_clim()).all()
    assert alive.collections[0].get_clim() == gone.collections[0].get_clim()
    assert "Every number is zero" in drawn["gradient_norms"].axes[1].texts[0].get_text()
    for figure in drawn.values():
        figure.canvas.draw()


def test_learning_curves():
    metrics = pd.DataFrame(
        {"step": [1, 2, 1, 2], "seed": [0, 0, 1, 1], "train_loss": [3.0, 2.0, 1.0, 0.0], "model": "a"}
    )
    ax = plots.learning(metrics, "train_loss")
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [2, 1])
    with pytest.raises(ValueError, match=r"'test_loss'.*'train_loss'"):
        plots.learning(metrics, "test_loss")
