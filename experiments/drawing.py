"""The figures of any sweep: whatever its frame has data for."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import gradscope.meanfield as mf
from experiments import report, theory
from experiments.collect import Collected
from gradscope import plots


def draw(frame: pd.DataFrame, keys: list[str], growth: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Every figure that the frame has data for, by name; curves of the profile carry their rate and verdict.

    ``keys`` tell the networks apart: the first by color, the second by dash; more than two become one label.
    """
    if set(keys) == {"weight_variance", "bias_variance"}:
        return {"phase_diagram": _phases(frame, growth, title)}
    if "width" in keys and growth["theory"].notna().all():
        return {"convergence": _convergence(growth, keys, title)}
    notes = {
        tuple(str(row[key]) for key in keys): f"{row['rate']:.3f}, {row['verdict']}"
        for row in growth.to_dict("records")
        if not pd.isna(row["rate"])
    }
    if len(keys) > 2:
        frame = frame.assign(network=frame[keys].apply(report.network_name, axis=1))
        notes = {(report.network_name(key),): note for key, note in notes.items()}
        keys = ["network"]
    hue, style = keys[0], keys[1] if keys[1:] else None
    profile = frame[frame["quantity"] == "gsc"]
    named = profile["index"].max() < plots.MAX_NAMED_LAYERS and not (profile["layer"].str.startswith("layers.")).any()
    figures = {"gsc": _panels(frame, title, notes) if named else _curves(frame, title, hue, style, notes)}
    for quantity in ("preactivation_std", "sign_diversity"):
        if (frame["quantity"] == quantity).any():
            figures[quantity], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
            plots.statistic(frame, quantity, hue=hue, style=style, ax=ax)
            ax.set_title(f"{title}\n{spread(frame)}", fontsize=10)
    if len(profile) > len(plots.to_last_target(profile)):
        figures["gsc_matrix"] = _matrices(profile, keys, title)
    return figures


def _curves(frame: pd.DataFrame, title: str, hue: str, style: str | None, notes: dict[tuple[str, ...], str]) -> Figure:
    figure, ax = plt.subplots(figsize=(8.2, 4.8), layout="constrained")
    plots.profile(frame, hue=hue, style=style, notes=notes, ax=ax)
    predicted = theory.profiles(frame, [key for key in (hue, style) if key])
    if len(predicted):
        plots.theory(predicted, [key for key in (hue, style) if key], ax=ax, hue_order=list(frame[hue].unique()))
    ax.set_title(f"{title}\n{spread(frame)}; labels: rate a layer, verdict", fontsize=10)
    return figure


def _phases(frame: pd.DataFrame, growth: pd.DataFrame, title: str) -> Figure:
    """Theory over the plane of variances, and the measured networks on it."""
    activation = str(frame["activation"].iloc[0])
    weights = np.linspace(0.05, 1.1 * float(growth["weight_variance"].max()), 40)
    biases = np.linspace(0.0, 1.1 * float(growth["bias_variance"].max()), 40)
    diagram = mf.phase_diagram(activation, weights, biases)
    figure, ax = plt.subplots(figsize=(7.0, 4.8), layout="constrained")
    plots.phase_diagram(weights, biases, diagram.chi_1, points=growth, ax=ax)
    seeds = frame["seed"].nunique()
    ax.set_title(
        f"{activation}: {title}\nbackground: mean field; points: measured rate, mean over {seeds} seeds", fontsize=10
    )
    return figure


def _convergence(growth: pd.DataFrame, keys: list[str], title: str) -> Figure:
    """Rates against 1 / width, a curve a network."""
    others = [key for key in keys if key != "width"]
    name = growth[others].apply(report.network_name, axis=1) if others else "network"
    figure, ax = plt.subplots(figsize=(7.4, 4.8), layout="constrained")
    plots.convergence(growth.assign(network=name), hue="network", ax=ax)
    ax.set_title(f"{title}\nbars: 95 % interval over seeds; stars and dashes: mean field", fontsize=10)
    return figure


def _panels(frame: pd.DataFrame, title: str, notes: dict[tuple[str, ...], str]) -> Figure:
    models = list(frame["model"].unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for ax, model in zip(axes[0], models, strict=True):
        plots.named_profile(frame[frame["model"] == model], ax=ax)
        ax.set_title(f"{model}: rate {notes[model,]}" if (model,) in notes else model, fontsize=10)
    figure.suptitle(f"{title}; {spread(frame)}", fontsize=10)
    return figure


def _matrices(profile: pd.DataFrame, keys: list[str], title: str) -> Figure:
    """One heat map a network, on one color scale."""
    networks = list(profile.groupby(keys, sort=False, observed=True))
    num_columns = min(4, len(networks))
    num_rows = -(-len(networks) // num_columns)
    size = (4.0 * num_columns + 0.8, 3.9 * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(networks) :]:
        ax.set_axis_off()
    limit = float(profile.groupby([*keys, "layer", "target"], observed=True)["log10_value"].mean().abs().max())
    for ax, (key, rows) in zip(axes.flat, networks, strict=False):
        plots.matrix(rows, limits=(-limit, limit), colorbar=False, ax=ax)
        ax.set_title(report.network_name(key), fontsize=10)
    colors = ScalarMappable(Normalize(-limit, limit), cmap=plots.DIVERGING)
    figure.colorbar(colors, ax=axes, label=plots.LABELS["gsc"], shrink=0.6)
    figure.suptitle(f"{title}; mean over {profile['seed'].nunique()} seeds", fontsize=11)
    return figure


def spread(frame: pd.DataFrame) -> str:
    """What lines and bands are, in words."""
    seeds = frame["seed"].nunique()
    return f"mean over {seeds} seeds, band: one standard deviation" if seeds > 1 else "one seed"


def describe(collected: Collected) -> str:
    """Depth, width, batch and data of a study, as far as all its runs share them, and what is noted of the data."""
    frame, words = collected.frame, []
    for name in ("depth", "width", "batch_size", "data"):
        if name in frame and frame[name].nunique() == 1:
            words.append(f"{'batch' if name == 'batch_size' else name} {frame[name].iloc[0]}")
    text = ", ".join(words).replace("data ", "").replace("noise", "Gaussian noise").replace("cifar10", "CIFAR-10")
    return text + (f" ({collected.manifest['note']})" if "note" in collected.manifest else "")
