"""Tables for the terminal: one measured network, and a study with its growth rates and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

import gradscope as gs
from experiments import run, theory
from experiments.study import Claim
from gradscope import frames
from gradscope.growth import Growth, fit_growth

MAX_ROWS = 64
STYLES = {"exploding": "bold red", "vanishing": "bold blue", "stable": "green", "irregular": "yellow"}


def print_run(profile: gs.Profile | None, frame: pd.DataFrame, folder: Path) -> None:
    """One row a layer: log10 GSC with its two standard errors; pre-activation statistics where a layer has them.

    Without a profile one row a quantity.
    """
    console = Console()
    if profile is None:
        console.print(_quantities(frame))
    else:
        console.print(_layers(profile, frame))
        console.print(profile.summary(), highlight=False)
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


def _quantities(frame: pd.DataFrame) -> Table:
    table = Table("quantity", "rows", "smallest", "largest")
    for quantity, rows in frame.groupby("quantity", sort=False, observed=True):
        table.add_row(str(quantity), str(len(rows)), f"{rows['value'].min():.6g}", f"{rows['value'].max():.6g}")
    return table


def _layers(profile: gs.Profile, frame: pd.DataFrame) -> Table:
    rows = frame[(frame["quantity"] == "gsc") & (frame["target"] == profile.target)].drop_duplicates("layer")
    table = Table("layer", "depth", "log10 GSC", "+- probes", "+- samples", "pre-act. std", "sign div.")
    for number, row in enumerate(rows.itertuples()):
        if len(rows) > MAX_ROWS and number == MAX_ROWS // 2:
            table.add_row(f"... {len(rows) - MAX_ROWS} more", *[""] * 6)
        if len(rows) > MAX_ROWS and MAX_ROWS // 2 <= number < len(rows) - MAX_ROWS // 2:
            continue
        own = frame[(frame["layer"] == row.layer) | frame["layer"].str.startswith(f"{row.layer}.")]
        statistics = [own.loc[own["quantity"] == name, "value"] for name in ("preactivation_std", "sign_diversity")]
        table.add_row(
            str(row.layer),
            str(row.depth_from_output),
            f"{row.log10_value:.4f}",
            _number(row.log10_stderr_probe),
            _number(row.log10_stderr_sample),
            *(f"{values.iloc[0]:.3f}" if len(values) else "" for values in statistics),
        )
    return table


def network_keys(frame: pd.DataFrame) -> list[str]:
    """Configuration columns that tell the networks of a study apart: those that vary, seeds and steps aside.

    Classes, ``model`` and ``data`` are left out where the other columns say the same, and so are keys that not every
    model has.
    """
    own = [name for name in frame.columns if name not in (*frames.COLUMNS, "seed", "step")]
    varying = [name for name in own if frame[name].nunique() > 1 and frame[name].notna().all()]
    for name in (*[name for name in varying if name.endswith(f".{run.CLASS}")], "model", "data"):
        rest = [other for other in varying if other != name]
        if name in varying and rest and (frame.groupby(rest, dropna=False, observed=True)[name].nunique() == 1).all():
            varying = rest
    return varying or ["model"]


def growth_table(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Growth of each network of a study: log GSC averaged over seeds, the interval from their spread.

    One row for each combination of ``keys``: rate, rate_low, rate_high, verdict, num_seeds, and log10 GSC of the
    farthest layer with its standard error over seeds.  A network too small for a rate has nulls, and the verdict says
    why.
    """
    rows = frames.to_last_target(frame[frame["quantity"] == "gsc"])
    result = []
    for key, group in rows.groupby(keys, sort=False, observed=True, dropna=False):
        values = group.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True)
        total = values.iloc[:, -1]
        entry = dict(zip(keys, key, strict=True)) | {"num_seeds": len(values), "log10_gsc": float(total.mean())}
        entry["log10_gsc_stderr"] = float(total.std() / math.sqrt(len(total))) if len(total) > 1 else math.nan
        try:
            growth = fit_growth(values.to_numpy(), values.columns.to_numpy())
        except ValueError as reason:
            growth = Growth(math.nan, math.nan, math.nan, math.nan, str(reason), False)
        result.append(entry | asdict(growth) | {"theory": theory.rate(group.iloc[0])})
    return pd.DataFrame(result)


def print_growth(growth: pd.DataFrame, keys: list[str], title: str) -> None:
    """The study's table."""
    table = Table("network", "seeds", "log10 GSC", "rate a layer (95 %)", "theory", "verdict", title=title)
    for row in growth.to_dict("records"):
        style = STYLES.get(row["verdict"], "")
        table.add_row(
            network_name([row[key] for key in keys]),
            str(row["num_seeds"]),
            f"{row['log10_gsc']:.2f} +- {row['log10_gsc_stderr']:.2f}",
            f"{row['rate']:.4f} ({row['rate_low']:.3f} .. {row['rate_high']:.3f})",
            "" if pd.isna(row["theory"]) else f"{row['theory']:.4f}",
            f"[{style}]{row['verdict']}[/]" if style else row["verdict"],
        )
    Console().print(table)


def with_networks(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """With a column ``network``, the name of each row's network."""
    return table.assign(network=table[list(keys)].apply(network_name, axis=1))


def print_claims(claims: Sequence[Claim], title: str) -> None:
    """What a study was asked to decide, and how the data did."""
    table = Table("claim", "", "because", title=title)
    styles = {True: "green", False: "bold red", None: "yellow"}
    for claim in claims:
        table.add_row(claim.says, f"[{styles[claim.holds]}]{claim.verdict}[/]", claim.because)
    Console().print(table)


def print_learning(metrics: pd.DataFrame, title: str) -> None:
    """The last test accuracy of each ``network``, with one standard deviation over seeds."""
    table = Table("network", "seeds", "epochs", "test accuracy", "range", "images/s", title=title)
    for network, rows in metrics.groupby("network", sort=False, observed=True):
        last = rows[rows["test_accuracy"].notna()].groupby("seed", observed=True)["test_accuracy"].last() * 100
        spread = f" +- {last.std():.2f}" if len(last) > 1 else ""
        table.add_row(
            str(network),
            str(len(last)),
            f"{rows['epoch'].max():g}",
            f"{last.mean():.2f} %{spread}",
            f"{last.min():.2f} .. {last.max():.2f}",
            f"{rows['images_per_second'].median():.0f}",
        )
    Console().print(table)


def network_name(values: Iterable[object]) -> str:
    """``relu+batch`` for ("relu", "batch"); the word none is left out, unless nothing else is there."""
    return "+".join(str(value) for value in values if value != "none") or "none"


def _number(value: Any) -> str:
    return "unknown" if pd.isna(value) else f"{value:.2g}"
