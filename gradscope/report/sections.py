"""Parts of the page about one model: profile, pairs, layers, training, comparison, self-test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from gradscope import frames
from gradscope.checks.comparison import Comparison
from gradscope.checks.report import FAILED, PASSED, SKIPPED, Report
from gradscope.coefficients.profiles import Matrix
from gradscope.monitor.monitor import Monitor
from gradscope.report import charts, tables, words

PAIRS, COMPARED, TESTS = "All pairs of layers", "Is a layer odd?", "Is it measured correctly?"
MOST_NAMED = 4  # odd layers that the text names
MOST_STEPS = 24  # records of a monitor that the page shows
WIDE = 8  # columns of a table that needs the longer side of a sheet of paper
SCORES = {"z_length": "z of mean square", "z_growth": "z of growth", "z_weight": "z of weights"}
EXPECTED = {
    "log10_gsc": "log10 GSC", "log10_gsc_theory": "log10 GSC, theory",
    "weight_variance": "weight variance", "weight_variance_nominal": "weight variance, expected",
}  # fmt: skip
# What the tests of `gradscope.check` compare.
TESTED = {
    "adjoint": "products with the Jacobian, forward and backward",
    "finite differences": "small changes of the input, and the Jacobian",
    "independence": "whether one sample changes the others",
    "probes": "random probes and exact values",
    "determinism": "a first and a second forward pass",
    "left alone": "the model before and after the measurement",
}


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
    wide: bool = False


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
        PAIRS, [note] if note else [],
        chart=charts.heat_map(kept[list(kept.index)], "target", "source"), caption=words.pairs(matrix),
        table=tables.grid(kept[list(kept.index)], "log10 GSC from each source (column) to each target (row)", "target"),
        folded=True,
    )  # fmt: skip


def layers(
    rows: pd.DataFrame, statistics: pd.DataFrame | None, predicted: pd.Series | None, missing: Sequence[str]
) -> Section:
    """Return the table of all layers; ``missing``: sentences on what it lacks."""
    table, errors = tables.of_layers(rows, statistics, predicted)
    caption = "One row per layer, in the order of execution."
    if (errors > 0).any(axis=None):
        caption += " ±: one standard error over the samples of the batch."
    return sortable("Layers", table, errors, caption, tables.INTERVAL, missing)


def sortable(
    title: str, table: pd.DataFrame, errors: pd.DataFrame, caption: str, interval: Sequence[str],
    texts: Sequence[str] = (),
) -> Section:  # fmt: skip
    """Return a table that sorts and filters; a very long one is thinned."""
    kept, note = tables.thinned(table, max(1, tables.MOST_CELLS // len(table.columns)))
    rendered = tables.html(kept, f"{caption} {note}".strip(), errors=errors.reindex(kept.index), interval=interval)
    return Section(title, texts, table=rendered, filter=True, wide=rendered.count('scope="col"') > WIDE)


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
    caption = f"log10 GSC of {len(table)} layers (rows) at {steps} (columns). Orange is growth, blue is shrinking."
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
    odd: dict[str, str] = {}  # the most conspicuous deviation of each layer
    for each in compare.deviations:
        odd.setdefault(each.layer, each.text)
    facts = [("Odd layer", f"{layer}: {text}.") for layer, text in list(odd.items())[:MOST_NAMED]]
    none = "" if odd else " None of them deviates."
    if compare.judged:
        text = f"{len(compare.judged)} layers were compared with other layers of the same kind.{none}"
        facts.append(("Same kind", text))
    frame, caption = compare.to_frame(), "Measured values, and those of theory; z counts standard deviations."
    if compare.prediction is None:
        facts.append(("Theory", f"Mean-field theory does not cover this network. {compare.unreadable}"))
        frame, caption = frame[frame["deviation"] != ""], "Layers that deviate."
    else:
        facts.append(("Theory", f"{len(compare.layers)} layers were compared with mean-field theory.{none}"))
    table, note = tables.thinned(frame, tables.MOST_NAMES)
    scores = [name for name in SCORES.values() if name in (table := table.rename(columns=SCORES | EXPECTED))]
    rendered = tables.html(table, f"{caption} {note}".strip(), scores=scores) if len(table) else ""
    text = "This comparison is for weights as drawn: training makes layers different."
    return Section(COMPARED, [text], facts=facts, table=rendered, wide=rendered.count('scope="col"') > WIDE)


def self_test(check: Report) -> Section:
    """Return the results of `gradscope.check`."""
    count = {status: sum(each.status == status for each in check.checks) for status in (PASSED, FAILED, SKIPPED)}
    text = "Several ways to measure this model must agree. " + (
        f"{count[FAILED]} of them do not, so numbers of this page may be wrong." if count[FAILED] else "They do."
    )
    if count[SKIPPED]:
        text += f" Skipped: {count[SKIPPED]}; the reason stands beside the test."
    table = check.to_frame()
    table.insert(1, "what is compared", table["name"].map(TESTED))
    table = table.rename(columns={"name": "test", "status": "result", "detail": "details"})
    return Section(TESTS, [text], table=tables.html(table, "Results of gs.check"))
