"""Tables for the terminal: one measured network, and a study with its growth rates and verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

import gradscope as gs
from gradscope.growth import fit_growth
from gradscope.plots import to_last_target

MAX_ROWS = 64
STYLES = {"exploding": "bold red", "vanishing": "bold blue", "stable": "green", "irregular": "yellow"}


def print_run(profile: gs.Profile, frame: pd.DataFrame, folder: Path) -> None:
    """One row a layer: log10 GSC with its two standard errors; pre-activation statistics where a layer has them."""
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
    console = Console()
    console.print(table)
    console.print(profile.summary(), highlight=False)
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


def growth_table(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Growth of each network of a study: log GSC averaged over seeds, the interval from their spread.

    One row for each combination of ``keys``: rate, rate_low, rate_high, verdict, num_seeds, and log10 GSC of the farthest
    layer with its standard error over seeds.
    """
    rows = to_last_target(frame[frame["quantity"] == "gsc"])
    result = []
    for key, group in rows.groupby(keys, sort=False, observed=True):
        values = group.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True)
        total = values.iloc[:, -1]
        entry = dict(zip(keys, key, strict=True)) | {"num_seeds": len(values)}
        entry |= {"log10_gsc": float(total.mean()), "log10_gsc_stderr": float(total.sem()) if len(total) > 1 else math.nan}
        try:
            growth = fit_growth(values.to_numpy(), values.columns.to_numpy())
        except ValueError as reason:
            entry |= {"rate": np.nan, "rate_low": np.nan, "rate_high": np.nan, "verdict": str(reason)}
        else:
            entry |= {
                "rate": growth.rate, "rate_low": growth.rate_low, "rate_high": growth.rate_high, "verdict": growth.verdict,
            }  # fmt: skip
        result.append(entry)
    return pd.DataFrame(result)


def print_growth(growth: pd.DataFrame, keys: list[str], title: str) -> None:
    """The study's table."""
    table = Table("network", "seeds", "log10 GSC", "rate a layer (95 %)", "verdict", title=title)
    for row in growth.to_dict("records"):
        name = "+".join(str(row[key]) for key in keys if row[key] != "none")
        style = STYLES.get(row["verdict"], "")
        table.add_row(
            name,
            str(row["num_seeds"]),
            f"{row['log10_gsc']:.2f} +- {row['log10_gsc_stderr']:.2f}",
            f"{row['rate']:.4f} ({row['rate_low']:.3f} .. {row['rate_high']:.3f})",
            f"[{style}]{row['verdict']}[/]" if style else row["verdict"],
        )
    Console().print(table)


def _number(value: float) -> str:
    return "unknown" if pd.isna(value) else f"{value:.2g}"
