"""Figures of a sweep: every figure for which the frame has data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence.words import digits
from experiments.reports import grids
from experiments.reports import growth as report_growth
from experiments.reports.grids import spread
from experiments.reports.roles import assign
from gradscope import frames, plots
from gradscope import meanfield as mf

STATISTICS = ("preactivation_std", "sign_diversity")
USUAL = ("gsc", *STATISTICS)  # the quantities that are drawn by default
FEWEST = 3  # rates are drawn against a key only if the key has at least this number of values
MATRICES = 16  # heat maps per figure


def draw(frame: pd.DataFrame, keys: list[str], growth: pd.DataFrame, title: str) -> dict[str, Figure]:
    """All figures for which the frame has data, by name; prints what the figures leave out.

    Few networks are labeled curves: the first of ``keys`` is shown by color and the second by dash; three or more are
    joined into one label.  If there are too many networks for one plot, `assign` decides which key is shown by color,
    by column and so on, and the growth rates get separate figures.
    """
    frame, growth = (labels.with_networks(table, keys) for table in (frame, growth))
    known = growth[growth["rate"].notna()]
    special: dict[str, Figure] = {}
    if set(keys) == {"weight_variance", "bias_variance"}:
        special = {"phase_diagram": _phases(frame, growth, title)}
    elif (
        "width" in keys and len(known) and known["theory"].notna().all()
        and _curves_without(keys, known) <= plots.MAX_DIRECT_LABELS
    ):  # fmt: skip
        special = {"convergence": _convergence(known, keys, title)}
    for reason, rows in growth[growth["rate"].isna()].groupby("verdict", sort=False):
        grids.left_out(f"growth rates ({reason})", rows[labels.NETWORK])
    profile = frame[frame["quantity"] == "gsc"]
    several = len(profile) > len(frames.to_last_target(profile))
    matrices = _matrices(profile, title) if several else {}
    if len(growth) > plots.MAX_DIRECT_LABELS:
        rates = grids.rates(known, title) if len(known) else {}
        return special | _many(frame, keys, known, title) | rates | matrices
    notes = [f"{_rate(row)}, {row.verdict}" for row in known.itertuples()]
    parts = [table[[labels.NETWORK]] if keys[2:] else labels.labeled(table, keys) for table in (frame, known)]
    by_labels = dict(zip(parts[1].itertuples(index=False, name=None), notes, strict=True))
    roles: dict[str, Any] = dict(zip(("hue", "style"), ("color", "dash")[: parts[0].shape[1]], strict=False))
    # Labels get new columns, because the theory needs the numbers in the columns of the keys.
    frame = frame.assign(**dict(zip(roles.values(), parts[0].to_numpy().T, strict=True)))
    named = profile["index"].max() < plots.MAX_NAMED_LAYERS and not (profile["layer"].str.startswith("layers.")).any()
    if named:
        rated = {name: f": rate per layer {note}" for name, note in zip(known[labels.NETWORK], notes, strict=True)}
        options: dict[str, Any] = {"in_a_row": 4, "size": (5.2, 4.2), "sharey": True}
        figures = {
            "gsc": panels(
                frame, partial(plots.named_profile, notes={}), f"{title}; {spread(frame)}", notes=rated, **options
            )
        }
    else:
        figures = {"gsc": _curves(frame, title, roles, by_labels, keys)}
    for quantity in STATISTICS:
        if (frame["quantity"] == quantity).any():
            figures[quantity], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
            plots.statistic(frame, quantity, **roles, ax=ax)
            ax.set_title(f"{title}\n{spread(frame)}", fontsize=10)
    return special | figures | matrices


def as_points(growth: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, str]]:
    """Growth rates as `grids.points` draws them, with the label of the axis and what the bars are."""
    words = grids.seeded(growth["num_seeds"], grids.INTERVAL, of_one=True)
    names = {"rate": "value", "rate_low": "low", "rate_high": "high"}
    return growth.rename(columns=names), ("GSC rate per layer (squared convention)", words)


def _many(frame: pd.DataFrame, keys: list[str], growth: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Curves of each quantity in panels, and the rates against the numeric key with the most values."""
    roles, figures = assign(frame, keys), dict[str, Figure]()
    for quantity in USUAL:
        if (frame["quantity"] == quantity).any():
            figures |= grids.curves(frame[frame["quantity"] == quantity], quantity, roles, title)
    counts = {key: growth[key].nunique() for key in keys if pd.api.types.is_numeric_dtype(growth[key])}
    x = max(counts, key=lambda key: counts[key], default=None)
    if x is not None and counts[x] >= FEWEST:
        table, words = as_points(growth)
        figures |= grids.points(table, x, "rate", words, assign(frame, keys, {"x": [x]}), title)
    return figures


def _rate(row: Any) -> str:
    """A rate with as many digits as its interval supports, at most three."""
    return f"{row.rate:.{min(3, digits(row.rate_high - row.rate_low))}f}"


def _curves_without(keys: list[str], growth: pd.DataFrame) -> int:
    """The number of networks that differ in more than their width."""
    others = [key for key in keys if key != "width"]
    return len(growth[others].drop_duplicates()) if others else 1


def _curves(
    frame: pd.DataFrame, title: str, roles: dict[str, str], notes: dict[tuple[str, ...], str], keys: Sequence[str]
) -> Figure:
    """Curves with their notes, and mean-field predictions, whose legend gives the value of the second key."""
    longest = max(len("+".join(name)) + len(note) for name, note in notes.items()) if notes else 0
    figure, ax = plt.subplots(figsize=(max(8.2, 4.6 + 0.08 * longest), 4.8), layout="constrained")
    plots.profile(frame, **roles, notes=notes, ax=ax)
    shown = list(roles.values())
    if len(predicted := report_growth.profiles(frame, shown)):
        if "style" in roles:
            predicted["dash"] = [labels.in_prose(labels.suffixed(keys[1], value)) for value in predicted["dash"]]
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
        f"{activation}: {title}\nbackground: mean field; points and numbers: measured rate, mean over {seeds} seeds",
        fontsize=10,
    )
    return figure


def _convergence(growth: pd.DataFrame, keys: list[str], title: str) -> Figure:
    """Growth rates against 1 / width, one curve per network."""
    others = [key for key in keys if key != "width"]
    growth = labels.with_networks(growth, others) if others else growth.assign(network="network")
    figure, ax = plt.subplots(figsize=(8.6, 4.8), layout="constrained")
    plots.convergence(growth, hue=labels.NETWORK, ax=ax)
    about = grids.seeded(growth["num_seeds"], grids.INTERVAL, of_one=True)
    ax.set_title(f"{title}\n{about}; stars and dashes: mean field", fontsize=10)
    return figure


def _matrices(profile: pd.DataFrame, title: str) -> dict[str, Figure]:
    """One heat map per network, all with the same color scale, in figures of at most `MATRICES`."""
    means = profile.groupby([labels.NETWORK, "layer", "target"], observed=True)["log10_value"].mean()
    limit, figures = float(means[np.isfinite(means)].abs().max()), dict[str, Figure]()
    draw_one = partial(plots.matrix, limits=(-limit, limit), colorbar=False)
    title = f"{title}; {spread(profile).split(',')[0]}"
    networks = list(profile[labels.NETWORK].unique())
    for page, first in enumerate(range(0, len(networks), MATRICES), start=1):
        part = profile[profile[labels.NETWORK].isin(networks[first : first + MATRICES])]
        figure = panels(part, draw_one, title, in_a_row=4, size=(4.0, 3.9), margin=0.8, fontsize=11)
        add_colorbar(figure, -limit, limit, shrink=0.6)
        figures["gsc_matrix" if page == 1 else f"gsc_matrix_{page}"] = figure
    return figures


def add_colorbar(figure: Figure, low: float, high: float, shrink: float) -> None:
    """Add one color bar for all GSC heat maps of a figure."""
    colors = ScalarMappable(Normalize(low, high), cmap=plots.DIVERGING)
    figure.colorbar(colors, ax=figure.axes, label=plots.LABELS["gsc"], shrink=shrink)


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
        name = f"{network}{(notes or {}).get(network, '')}"
        ax.set_title(labels.wrapped(name, int(grids.CHARACTERS * size[0])), fontsize=10)
    if sharey:
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
    wide = int(grids.CHARACTERS * figure.get_figwidth())
    figure.suptitle("\n".join(fill(line, wide) for line in title.split("\n")), fontsize=fontsize)
    return figure
