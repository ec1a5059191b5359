"""Theory in experiments and figures: predictions from configurations, fits, and what the new figures draw."""

import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import gradscope.meanfield as mf
from benchmarks import agreement, faults
from experiments.reports import growth
from gradscope import plots

mpl.use("Agg")

CONFIG = {
    "activation": "tanh", "norm": "layer", "depth": 30, "residual": "none", "data": "noise", "init": "auto",
    "batch_size": 32, "out_features": None, "skip_weight": 1.0, "model": "tanh_layer",
}  # fmt: skip


def test_predictions_from_a_configuration():
    row = pd.Series(CONFIG)
    assert growth.rate(row) == pytest.approx(mf.gsc_rate("tanh", "layer"), rel=1e-6)
    for key, value in (("data", "cifar10"), ("init", "orthogonal"), ("activation", "mish"), ("out_features", 10)):
        assert math.isnan(growth.rate(pd.Series({**CONFIG, key: value}))), key
    critical = {**CONFIG, "norm": "none", "weight_variance": 2.0, "bias_variance": 0.1038}
    assert growth.rate(pd.Series(critical)) == pytest.approx(1, abs=2e-3)
    residual = {**CONFIG, "residual": "identity", "skip_weight": 2.0}
    assert 1 < growth.rate(pd.Series(residual)) < 1.1
    frame = growth.profiles(pd.DataFrame([CONFIG, {**CONFIG, "activation": "relu", "norm": "batch"}]), ["activation"])
    assert len(frame) == 62 and set(frame["activation"]) == {"tanh", "relu"}
    assert growth.profiles(pd.DataFrame([{**CONFIG, "data": "cifar10"}]), ["activation"]).empty


def test_the_extrapolation_is_a_weighted_line():
    widths, errors = [200, 400, 800], [0.01, 0.02, 0.005]
    value, error = agreement.extrapolate(widths, [1 + 30 / w for w in widths], errors)
    assert value == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = [agreement.extrapolate(widths, [1 + 30 / w + e * rng.standard_normal() for w, e in zip(widths, errors, strict=True)], errors)[0] for _ in range(4000)]  # fmt: skip  # noqa: E501
    assert np.std(draws) == pytest.approx(error, rel=0.05)


def test_a_row_agrees_within_errors_or_its_tolerance():
    assert agreement.Row("q", "n", "100", 1.0, 1.02, 0.001, 0.03).agrees
    assert not agreement.Row("q", "n", "600", 1.0, 1.02, 0.001, 0.006).agrees
    assert agreement.Row("q", "n", "infinite", 1.0, 1.02, 0.01, 0.0).agrees
    assert agreement.Row("q", "n", "infinite", 1.0, 1.02, 0.01, 0.0).z == pytest.approx(2)


def test_the_fault_campaign_counts():
    """Seeds of development, not of the published table."""
    frame = pd.DataFrame([faults.one("no activation", 10_000), faults.one(faults.NAN, 10_000)])
    assert frame["planted"].ne("").all() and frame["right"].all()
    missed = frame.assign(right=[faults.right(["layers.1"], None), faults.right(["layers.1"], "layers.10")])
    assert list(faults.summary(frame)["fraction"]) == [1, 1]
    assert list(faults.summary(missed)["fraction"]) == [0, 0]
    assert faults.right(["layers.1"], "layers.1.linear") and faults.right([], None) and not faults.right([], "layers.1")


def test_theory_is_drawn_behind_the_measurement():
    depth = np.arange(11)
    measured = pd.DataFrame(
        {"depth_from_output": depth, "log10_value": 0.1 * depth, "quantity": "gsc", "index": depth[::-1], "layer": "x",
         "target": "y", "norm": "a"}
    )  # fmt: skip
    ax = plots.profile(measured)
    plots.theory(measured.assign(log10_value=0.2 * depth), ["norm"], ax=ax)
    (line,) = [line for line in ax.get_lines() if line.get_label() == "mean field"]
    assert line.get_ydata()[-1] == pytest.approx(2) and line.get_zorder() < 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mean field"]


def test_the_figure_of_convergence():
    frame = pd.DataFrame(
        {"network": ["a", "a"], "width": [100, 400], "rate": [1.2, 1.1], "rate_low": [1.1, 1.05],
         "rate_high": [1.3, 1.15], "theory": [1.07, 1.07]}
    )  # fmt: skip
    ax = plots.convergence(frame, hue="network")
    assert [label.get_text() for label in ax.get_xticklabels()][1:] == ["400", "100"]
    assert "a: mean field 1.070" in [text.get_text() for text in ax.texts]


def test_networks_without_a_rate_are_left_out_of_the_figure_of_convergence():
    rates = {"rate": [1.1, np.nan], "rate_low": [1.0, np.nan], "rate_high": [1.2, np.nan], "theory": 1.07}
    frame = pd.DataFrame({"network": ["a", "b"], "width": 100, **rates})
    ax = plots.convergence(frame, hue="network")
    ax.figure.draw_without_rendering()
    assert [text.get_text() for text in ax.texts] == ["a: mean field 1.070"]
    with pytest.raises(ValueError, match=r"Every rate is null, .* at least six layers"):
        plots.convergence(frame[1:], hue="network")


def test_the_phase_diagram_shows_the_critical_line_and_the_points():
    weights, biases = np.linspace(0.2, 3, 12), np.linspace(0, 0.5, 10)
    diagram = mf.phase_diagram("tanh", weights, biases)
    points = pd.DataFrame({"weight_variance": [1.0, 2.0], "bias_variance": [0.2, 0.2], "rate": [0.62, 0.95]})
    ax = plots.phase_diagram(diagram, points=points)
    assert {"0.62", "0.95"} <= {text.get_text() for text in ax.texts}
    (contour,) = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
    line = max(contour.allsegs[0], key=len)
    for weight, bias in line[::5]:
        assert mf.critical_point("tanh", max(bias, 1e-6)).weight_variance == pytest.approx(weight, abs=0.05)
