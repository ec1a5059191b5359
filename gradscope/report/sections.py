"""Parts of the page about one model: profile, pairs, layers, training, comparison, self-test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from gradscope import frames
from gradscope.checks.comparison import Comparison
from gradscope.checks.report import Report
from gradscope.coefficients.profiles import Matrix
from gradscope.monitor.monitor import Monitor
from gradscope.report import charts, tables, words

MOST_STEPS = 24  # records of a monitor that the page shows


@dataclass(frozen=True)
class Section:
    """A part of the page: sentences, pairs of a word and a sentence, a chart with its text alternative, a table."""

    title: str
    texts: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    chart: charts.Spec | None = None
    caption: str = ""
    table: str = ""
    folded: bool = False
    filter: bool = False


def theory(compare: Comparison | None) -> pd.Series | None:
    """Return predicted log10 GSC by layer, or None without a theory."""
    if compare is None or compare.prediction is None or compare.reading is None:
        return None
    names = [compare.reading.source, *(layer.name for layer in compare.reading.layers)]
    return pd.Series(compare.prediction.log10_gsc, names).groupby(level=0).first()


def points(rows: pd.DataFrame, network: str = "") -> pd.DataFrame:
    """Return the rows of a tidy frame as `charts.curves` takes them."""
    values = {"depth": "depth_from_output", "log10": "log10_value", "low": "log10_low", "high": "log10_high"}
    columns = {name: rows[column].to_numpy(dtype=float) for name, column in values.items()}
    return pd.DataFrame({"network": network, "kind": charts.MEASURED, "layer": rows["layer"].to_numpy(), **columns})


def profile(rows: pd.DataFrame, predicted: pd.Series | None) -> Section:
    """Return the curve of GSC against depth, with theory where there is one."""
    drawn = points(rows)
    if predicted is not None:
        curve = drawn.assign(kind=charts.THEORY, log10=drawn["layer"].map(predicted), low=math.nan, high=math.nan)
        drawn = pd.concat([drawn, curve.dropna(subset="log10")], ignore_index=True)
    named = len(rows) <= charts.FEW_LAYERS and rows["depth_from_output"].is_unique
    chart = charts.curves(drawn, names=list(rows["layer"])[::-1] if named else ())
    caption = words.curve(rows, theory=bool((drawn["kind"] == charts.THEORY).any()))
    return Section("GSC of every layer", [words.GSC], chart=chart, caption=caption)


def pairs(matrix: Matrix) -> Section:
    """Return the heat map of all pairs of layers, and its numbers."""
    table = pd.DataFrame(matrix.log10_values.T, index=list(matrix.targets), columns=list(matrix.sources))
    kept, note = tables.thinned(table, tables.MOST_NAMES)
    return Section(
        "All pairs of layers", [note] if note else [],
        chart=charts.heat_map(kept[list(kept.index)], "target", "source"), caption=words.pairs(matrix),
        table=tables.grid(kept[list(kept.index)], "log10 GSC from each source (column) to each target (row)", "target"),
        folded=True,
    )  # fmt: skip


def layers(rows: pd.DataFrame, statistics: pd.DataFrame | None, predicted: pd.Series | None) -> Section:
    """Return the table of all layers."""
    table, errors = tables.of_layers(rows, statistics, predicted)
    return sortable("Layers", table, errors, "One row per layer, in the order of execution; ± one standard error")


def sortable(title: str, table: pd.DataFrame, errors: pd.DataFrame, caption: str) -> Section:
    """Return a table that sorts and filters; a very long one is thinned."""
    kept, note = tables.thinned(table, max(1, tables.MOST_CELLS // len(table.columns)))
    rendered = tables.html(kept, f"{caption}. {note}".strip(), errors=errors.reindex(kept.index))
    return Section(title, table=rendered, filter=True)


def monitored(monitor: Monitor | pd.DataFrame | None) -> list[Section]:
    """Return GSC during training and the warnings of the monitor; ValueError if there is no GSC."""
    if monitor is None:
        return []
    frame = monitor if isinstance(monitor, pd.DataFrame) else monitor.to_frame()
    rows = frame[frame["quantity"] == "gsc"]
    if rows.empty or "step" not in rows:
        raise ValueError("monitor= holds no rows of quantity 'gsc' with a column 'step': give a Monitor, or its frame.")
    table = frames.to_last_target(rows).pivot_table("log10_value", "layer", "step", sort=False, observed=True)
    table, _ = tables.thinned(table.sort_index(axis=1).T, MOST_STEPS)
    table, _ = tables.thinned(table.T, tables.MOST_NAMES)
    steps = f"{len(table.columns)} of {rows['step'].nunique()} records"
    caption = (
        f"log10 GSC of {len(table)} layers (rows) at {steps} (columns). Orange is growth, blue is shrinking. "
        "The table below holds the numbers."
    )
    texts = [] if isinstance(monitor, pd.DataFrame) else str(monitor).splitlines()
    return [
        Section(
            "During training", texts,
            chart=charts.heat_map(table, "layer", "step"), caption=caption,
            table=tables.grid(table, "log10 GSC of each layer (row) at each step (column)", "layer"), folded=True,
        )
    ]  # fmt: skip


def comparison(compare: Comparison) -> Section:
    """Return what `gradscope.compare` found."""
    table, note = tables.thinned(compare.to_frame(), tables.MOST_NAMES)
    table.columns = table.columns.str.replace("_", " ")
    caption = f"Deviations, and z-scores where theory covers the network. {note}".strip()
    return Section("Compared with siblings and theory", str(compare).splitlines(), table=tables.html(table, caption))


def self_test(check: Report) -> Section:
    """Return the results of `gradscope.check`."""
    text = "Several ways to measure this model must agree." + ("" if check.passed else " At least one does not.")
    return Section("Is it measured correctly?", [text], table=tables.html(check.to_frame(), "Results of gs.check"))
