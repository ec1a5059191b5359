"""Figures for any sweep: every figure for which the frame has data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.reports import growth as report_growth
from gradscope import meanfield as mf
from gradscope import plots

STATISTICS = ("preactivation_std", "sign_diversity")
# Largest number of values that color, columns of panels, rows of panels, and line dashes can show.
MOST = {"color": 10, "column": 6, "row": 6, "dash": 4}
# An axis is logarithmic if the largest value exceeds this multiple of the smallest.
WIDE = 1e3
LABEL_WIDTH = 28  # characters per line of an axis label in a small panel


def draw(frame: pd.DataFrame, keys: list[str], growth: pd.DataFrame, title: str) -> dict[str, Figure]:
    """All figures for which the frame has data, by name.

    The first of ``keys`` is shown by color and the second by dash; three or more are joined into one label.  If there
    are too many networks for one plot, each value of a key gets a panel, and the growth rates get a separate figure.
    """
    if set(keys) == {"weight_variance", "bias_variance"}:
        return {"phase_diagram": _phases(frame, growth, title)}
    if "width" in keys and growth["theory"].notna().all():
        return {"convergence": _convergence(growth, keys, title)}
    frame, growth = (labels.with_networks(table, keys) for table in (frame, growth))
    known = growth[growth["rate"].notna()]
    profile = frame[frame["quantity"] == "gsc"]
    several = len(profile) > len(plots.to_last_target(profile))
    matrices = {"gsc_matrix": _matrices(profile, title)} if several else {}
    if len(growth) > plots.MAX_DIRECT_LABELS:
        rates = {"rates": _rates(known, title)} if len(known) else {}
        return _many(frame, keys, f"{title}; rates and verdicts: rates.png" if rates else title) | rates | matrices
    notes = [f"{rate:.3f}, {verdict}" for rate, verdict in zip(known["rate"], known["verdict"], strict=True)]
    parts = [table[[labels.NETWORK]] if keys[2:] else labels.labeled(table, keys) for table in (frame, known)]
    by_labels = dict(zip(parts[1].itertuples(index=False, name=None), notes, strict=True))
    roles: dict[str, Any] = dict(zip(("hue", "style"), ("color", "dash")[: parts[0].shape[1]], strict=False))
    # The labels are new columns, because the theory needs the columns with the values.
    frame = frame.assign(**dict(zip(roles.values(), parts[0].to_numpy().T, strict=True)))
    named = profile["index"].max() < plots.MAX_NAMED_LAYERS and not (profile["layer"].str.startswith("layers.")).any()
    if named:
        rated = {name: f": rate {note}" for name, note in zip(known[labels.NETWORK], notes, strict=True)}
        options: dict[str, Any] = {"in_a_row": 4, "size": (5.2, 4.2), "sharey": True}
        figures = {
            "gsc": panels(
                frame, partial(plots.named_profile, notes={}), f"{title}; {spread(frame)}", notes=rated, **options
            )
        }
    else:
        figures = {"gsc": _curves(frame, title, roles, by_labels)}
    for quantity in STATISTICS:
        if (frame["quantity"] == quantity).any():
            figures[quantity], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
            plots.statistic(frame, quantity, **roles, ax=ax)
            ax.set_title(f"{title}\n{spread(frame)}", fontsize=10)
    return figures | matrices


def _many(frame: pd.DataFrame, keys: list[str], title: str) -> dict[str, Figure]:
    """Curves in panels.  Keys get color, column, row and dash, from most values to fewest; {} if they are too many."""
    counts = frame[keys].nunique(dropna=False).sort_values(ascending=False, kind="stable")
    roles = dict(zip(map(str, counts.index), MOST, strict=False))
    if len(keys) > len(MOST) or any(counts[key] > MOST[role] for key, role in roles.items()):
        return {}
    frame = frame.assign(**{role: labels.in_words(key, frame[key]) for key, role in roles.items()})
    return {
        quantity: _grid(frame[frame["quantity"] == quantity], quantity, list(roles.values()), title)
        for quantity in ("gsc", *STATISTICS)
        if (frame["quantity"] == quantity).any()
    }


def _grid(rows: pd.DataFrame, quantity: str, roles: list[str], title: str) -> Figure:
    x, y, label = "index", "value", plots.LABELS.get(quantity, quantity)
    if quantity == "gsc":
        rows, x, y = plots.to_last_target(rows), "depth_from_output", "log10_value"
    elif (rows["value"] > 0).all() and rows["value"].max() > WIDE * rows["value"].min():
        rows, label = rows.assign(value=np.log10(rows["value"])), rf"$\log_{{10}}$ {label}"
    rows = rows.astype({role: pd.CategoricalDtype(list(pd.unique(rows[role]))) for role in roles})
    grid = sns.relplot(
        rows, x=x, y=y, kind="line", errorbar="sd" if rows["seed"].nunique() > 1 else None, palette="colorblind",
        height=2.7, aspect=1.15, linewidth=1.5, **dict(zip(("hue", "col", "row", "style"), roles, strict=False)),
    )  # fmt: skip
    if len(roles) > 1:
        grid.set_titles("{row_name}, {col_name}" if "row" in roles else "{col_name}", size=10)
    grid.set_axis_labels(plots.LABELS[x], fill(label, LABEL_WIDTH))
    if grid.legend is not None:
        for text in grid.legend.get_texts():
            text.set_text("" if text.get_text() in MOST else text.get_text())
        grid.legend.set_title("")
    if quantity == "gsc":
        grid.refline(y=0, color="0.6", linewidth=0.8, linestyle="-", zorder=0)
    grid.figure.suptitle(f"{title}\n{spread(rows)}", fontsize=10)
    grid.tight_layout()
    return grid.figure


def _rates(growth: pd.DataFrame, title: str) -> Figure:
    figure, ax = plt.subplots(figsize=(8.2, 1.2 + 0.22 * len(growth)), layout="constrained")
    plots.rates(growth, ax=ax)
    crosses = "; crosses: mean field" if growth["theory"].notna().any() else ""
    ax.set_title(f"{title}\nbars: 95 % interval{crosses}", fontsize=10)
    return figure


def _curves(frame: pd.DataFrame, title: str, roles: dict[str, str], notes: dict[tuple[str, ...], str]) -> Figure:
    figure, ax = plt.subplots(figsize=(8.2, 4.8), layout="constrained")
    plots.profile(frame, **roles, notes=notes, ax=ax)
    shown = list(roles.values())
    if len(predicted := report_growth.profiles(frame, shown)):
        plots.theory(predicted, shown, ax=ax)
    ax.set_title(f"{title}\n{spread(frame)}{'; labels: rate per layer, verdict' if notes else ''}", fontsize=10)
    return figure


def _phases(frame: pd.DataFrame, growth: pd.DataFrame, title: str) -> Figure:
    """The plane of weight and bias variance: predicted rates as background, and the measured networks as points."""
    activation = str(frame["activation"].iloc[0])
    weights = np.linspace(0.05, 1.1 * float(growth["weight_variance"].max()), 40)
    biases = np.linspace(0.0, 1.1 * float(growth["bias_variance"].max()), 40)
    diagram = mf.phase_diagram(activation, weights, biases)
    figure, ax = plt.subplots(figsize=(7.0, 4.8), layout="constrained")
    plots.phase_diagram(diagram, points=growth, ax=ax)
    seeds = frame["seed"].nunique()
    ax.set_title(
        f"{activation}: {title}\nbackground: mean field; points: measured rate, mean over {seeds} seeds", fontsize=10
    )
    return figure


def _convergence(growth: pd.DataFrame, keys: list[str], title: str) -> Figure:
    """Growth rates against 1 / width, one curve per network."""
    others = [key for key in keys if key != "width"]
    growth = labels.with_networks(growth, others) if others else growth.assign(network="network")
    figure, ax = plt.subplots(figsize=(7.4, 4.8), layout="constrained")
    plots.convergence(growth, hue=labels.NETWORK, ax=ax)
    ax.set_title(f"{title}\nbars: 95 % interval over seeds; stars and dashes: mean field", fontsize=10)
    return figure


def _matrices(profile: pd.DataFrame, title: str) -> Figure:
    """One heat map per network, all with the same color scale."""
    limit = float(profile.groupby([labels.NETWORK, "layer", "target"], observed=True)["log10_value"].mean().abs().max())
    draw_one = partial(plots.matrix, limits=(-limit, limit), colorbar=False)
    title = f"{title}; mean over {profile['seed'].nunique()} seeds"
    figure = panels(profile, draw_one, title, in_a_row=4, size=(4.0, 3.9), margin=0.8, fontsize=11)
    add_colorbar(figure, -limit, limit, shrink=0.6)
    return figure


def add_colorbar(figure: Figure, low: float, high: float, shrink: float) -> None:
    """Add one color bar for all GSC heat maps of a figure."""
    colors = ScalarMappable(Normalize(low, high), cmap=plots.DIVERGING)
    figure.colorbar(colors, ax=figure.axes, label=plots.LABELS["gsc"], shrink=shrink)


def spread(frame: pd.DataFrame) -> str:
    """A phrase for titles that says what lines and bands show."""
    seeds = frame["seed"].nunique()
    return f"mean over {seeds} seeds, band: one standard deviation" if seeds > 1 else "one seed"


def describe(collected: Collected) -> str:
    """A phrase for titles: the depth, width, batch size and data that all runs share, then the note on the data."""
    frame, words = collected.frame, []
    for name in ("depth", "width", "batch_size", "data"):
        if name in frame and frame[name].nunique() == 1:
            words.append(f"{'batch' if name == 'batch_size' else name} {frame[name].iloc[0]}")
    text = ", ".join(words).replace("data ", "").replace("noise", "Gaussian noise").replace("cifar10", "CIFAR-10")
    return text + (f" ({collected.manifest['note']})" if "note" in collected.manifest else "")


def panels(
    frame: pd.DataFrame, draw_one: Callable[..., Axes], title: str, *, in_a_row: int, size: tuple[float, float],
    margin: float = 0, notes: Mapping[str, str] | None = None, fontsize: int = 10, sharey: bool = False,
) -> Figure:  # fmt: skip
    """One panel of ``size`` inches per ``network``, at most ``in_a_row`` per row, titled with network and note."""
    networks = list(frame[labels.NETWORK].unique())
    columns = min(in_a_row, len(networks))
    rows = -(-len(networks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns + margin, size[1] * rows),
                                layout="constrained", squeeze=False, sharey=sharey)  # fmt: skip
    for ax in axes.flat[len(networks) :]:
        ax.set_axis_off()
    for ax, network in zip(axes.flat, networks, strict=False):
        try:
            draw_one(frame[frame[labels.NETWORK] == network], ax=ax)
        except ValueError as error:  # a dead or diverged network; still draw the others
            ax.text(0.5, 0.5, str(error), ha="center", wrap=True, fontsize=8, transform=ax.transAxes)
        ax.set_title(f"{network}{(notes or {}).get(network, '')}", fontsize=10)
    figure.suptitle(title, fontsize=fontsize)
    return figure
