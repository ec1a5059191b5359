"""`report_frame(frame, path)`: the same page about the networks of a sweep."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from gradscope import frames
from gradscope.choices import PathLike, checked, require
from gradscope.coefficients.growth import growth as grown
from gradscope.report import charts, sections, tables, words
from gradscope.report.sections import Section
from gradscope.report.writing import require_packages, write

GROWTH = "gradscope.growth, one row per network"
MOST_CURVES = 8  # networks in one chart; more are shown by their rates only


@checked
def report_frame(
    frame: pd.DataFrame,
    path: PathLike = "report.html",
    *,
    growth: pd.DataFrame | None = None,
    theory: pd.DataFrame | None = None,
    title: str = "Networks of a sweep",
    about: str = "",
) -> Path:
    """Write one HTML page about the networks of a tidy frame, such as a collected sweep, and return its path.

    Arguments:
        frame: Tidy frame with rows of quantity "gsc".  Column ``network`` holds names of networks, and ``seed``
            distinguishes repetitions of one network.  Without column ``network`` there is one network; without
            ``seed``, one repetition.  If the frame has several steps of training, the last one is shown.
        path: The file to write.
        growth: Growth rates in a frame as for `gradscope.plots.rates`; computed by default.
        theory: Predicted curves, in a frame with columns ``network``, ``depth_from_output`` and ``log10_value``.
        title, about: Title of the page, and a sentence below it.

    Raises:
        ImportError: The packages of ``pip install "gradscope-toolkit[report]"`` are missing.
        ValueError: A frame lacks columns, or ``frame`` has no rows of quantity "gsc".

    >>> import tempfile, torch
    >>> import gradscope as gs
    >>> profile = gs.gsc(gs.models.MLP(depth=8, width=8), torch.randn(8, 8))
    >>> gs.report_frame(profile.to_frame(), tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    require_packages()
    require(frame, list(frames.COLUMNS), "gradscope.frames.tidy")
    if growth is not None:
        require(growth, ["network", "rate", "verdict"], GROWTH)
        require(growth, ["rate_low", "rate_high"] if growth["rate"].notna().any() else [], GROWTH)
    if theory is not None:
        require(theory, ["network", "depth_from_output", "log10_value"], "gradscope.meanfield.predict")
    if "network" not in frame:
        frame = frame.assign(network="network")
    if "step" in frame:
        frame = frame[frame["step"] == frame.groupby("network", observed=True)["step"].transform("max")]
    rows = frames.to_last_target(frame[frame["quantity"] == "gsc"])
    if rows.empty:
        raise ValueError("The frame has no rows of quantity 'gsc', so there is nothing to report.")
    networks = {str(name): own for name, own in rows.groupby("network", sort=False, observed=True)}
    if growth is not None and "theory" not in growth:
        growth = growth.assign(theory=math.nan)
    if growth is None:
        growth = pd.DataFrame([_rate_of(name, own) for name, own in networks.items()])
    means = {name: _mean(own) for name, own in networks.items()}
    parts = [_rates(growth)]
    if len(networks) <= MOST_CURVES:
        parts.insert(0, _curves(means, theory))
    parts.append(_all_layers(frame, means))
    seeds = frame["seed"].nunique() if "seed" in frame else 1
    parts.append(Section("How this page was made", facts=[("Repetitions", f"{seeds} per network"), *words.versions()]))
    headline, facts = words.verdicts(growth)
    return write(Path(path), title, about, headline, "", facts, parts)


def _rate_of(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    seeds = rows["seed"].nunique() if "seed" in rows else 1
    known = {"network": name, "num_seeds": seeds, "theory": math.nan}
    try:
        one = grown(rows)
    except ValueError as reason:
        return {**known, **dict.fromkeys(("rate", "rate_low", "rate_high"), math.nan), "verdict": str(reason)}
    rates = {"rate": one.rate, "rate_low": one.rate_low, "rate_high": one.rate_high, "verdict": one.verdict}
    return {**known, **rates, "log10_gsc": one.total}


def _mean(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per layer: the mean over repetitions with one standard deviation, or one network with its interval."""
    if "seed" not in rows or rows["seed"].nunique() == 1:
        return rows.assign(**{name: rows.get(name, math.nan) for name in frames.OPTIONAL})
    first = rows.drop_duplicates("layer")
    groups = rows.groupby("layer", observed=True)["log10_value"]
    mean, spread = (first["layer"].map(each).astype(float) for each in (groups.mean(), groups.std()))
    return first.assign(log10_value=mean, log10_low=mean - spread, log10_high=mean + spread)


def _rates(growth: pd.DataFrame) -> Section:
    named = {
        "network": "network", "num_seeds": "repetitions", "rate": "rate per layer", "rate_low": "95 % low",
        "rate_high": "95 % high", "theory": "rate, theory", "log10_gsc": "log10 GSC in total", "verdict": "verdict",
    }  # fmt: skip
    table = growth[[name for name in named if name in growth]].rename(columns=named)
    caption = (
        "Growth rates of GSC per layer with 95 % intervals. Shapes show verdicts, crosses mean-field theory. The line "
        "at 1 marks neither growth nor shrinking."
    )
    chart = charts.rates(growth) if growth["rate"].notna().any() else None
    interval = [name for name in ("rate per layer", "95 % low", "95 % high") if name in table]
    rendered = tables.html(table, "Growth of GSC per layer", interval=interval if len(interval) == 3 else ())
    return Section("Growth of every network", chart=chart, caption=caption, table=rendered, filter=True)


def _curves(means: dict[str, pd.DataFrame], theory: pd.DataFrame | None) -> Section:
    points = pd.concat([sections.points(rows, name) for name, rows in means.items()], ignore_index=True)
    if theory is not None and len(theory):
        named = {"depth_from_output": "depth", "log10_value": "log10"}
        predicted = theory.rename(columns=named).assign(kind=charts.THEORY, layer="", low=math.nan, high=math.nan)
        points = pd.concat([points, predicted[list(points)]], ignore_index=True)
    caption = (
        f"log10 GSC against the number of layers to the target, for {len(means)} networks. Lines are means over "
        "repetitions; bands are one standard deviation, or for a single network its 95 % interval."
        + (" Dashed lines are mean-field theory." if (points["kind"] == charts.THEORY).any() else "")
    )
    return Section("GSC of every layer", chart=charts.curves(points), caption=caption)


def _all_layers(frame: pd.DataFrame, means: dict[str, pd.DataFrame]) -> Section:
    """The layers of all networks: means over repetitions."""
    parts, of_layers = [], frame["target"].isna() & (frame["layer"] != frames.NETWORK)
    for name, own in means.items():
        other = frame[(frame["network"].astype(str) == name) & of_layers]
        numbers = other.groupby(["layer", "quantity"], sort=False, observed=True)
        statistics = numbers[["value", "log10_value", "log10_stderr_sample", "stderr_sample"]].mean()
        table, _ = tables.of_layers(own, statistics.reset_index())
        parts.append(table.assign(network=name))
    table = pd.concat(parts, ignore_index=True)
    table = table.rename(columns=dict(zip(tables.INTERVAL[1:], ("low", "high"), strict=True)))
    table = table[["network", *(column for column in table if column != "network")]]
    caption = "Means over repetitions; low and high are one standard deviation, or the interval of a single network."
    interval = tables.INTERVAL[0], "low", "high"
    return sections.sortable("Layers", table, pd.DataFrame(index=table.index), caption, interval)
