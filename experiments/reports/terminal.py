"""Tables for the terminal: one measured network, growth rates or accuracies of a sweep, or claims of a study."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Column, Table
from rich.text import Text

import gradscope as gs
from experiments.archive.labels import NETWORK, with_networks, wrapped
from experiments.evidence.study import Claim
from experiments.evidence.words import digits, measured
from experiments.terminal import PlainConsole

MAX_ROWS = 64
OTHER_COLUMNS, MIN_NAME = 76, 20  # characters of the table of growth rates: besides the name, and of the name
NAME = partial(Column, "network", overflow="fold")  # wrapped rather than truncated
STYLES = {"exploding": "bold red", "vanishing": "bold blue", "stable": "green", "undecided": "yellow"}


def print_run(profile: gs.Profile | None, frame: pd.DataFrame, folder: Path) -> None:
    """Print one row per layer: log10 GSC, standard errors, statistics.  Without a profile: one row per quantity."""
    console = PlainConsole(highlight=True)
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
    errors = rows[["log10_stderr_probe", "log10_stderr_sample"]].to_numpy(dtype=float)
    for number, row in enumerate(rows.itertuples()):
        if MAX_ROWS // 2 <= number < len(rows) - MAX_ROWS // 2 and len(rows) > MAX_ROWS:
            if number == MAX_ROWS // 2:
                table.add_row(f"... {len(rows) - MAX_ROWS} more")
            continue
        own = frame[(frame["layer"] == row.layer) | frame["layer"].str.startswith(f"{row.layer}.")]
        statistics = [own.loc[own["quantity"] == name, "value"] for name in ("preactivation_std", "sign_diversity")]
        table.add_row(
            str(row.layer),
            str(row.depth_from_output),
            f"{row.log10_value:.4f}",
            *("unknown" if np.isnan(e) else f"{e:.2g}" for e in errors[number]),
            *(f"{values.iloc[0]:.3f}" if len(values) else "" for values in statistics),
        )
    return table


def print_growth(growth: pd.DataFrame, keys: list[str], title: str) -> None:
    """Print growth rate, prediction and verdict of each network."""
    console, growth = PlainConsole(highlight=True), with_networks(growth, keys)
    names = [wrapped(name, max(MIN_NAME, console.width - OTHER_COLUMNS)) for name in growth[NETWORK]]
    name_column = NAME(min_width=max(len(line) for name in names for line in name.split("\n")))
    table = Table(name_column, "seeds", "log10 GSC", "rate per layer (95 %)", "mean field", "verdict", title=title)
    for name, row in zip(names, growth.to_dict("records"), strict=True):
        style, places = STYLES.get(row["verdict"], ""), digits(row["log10_gsc_stderr"])
        spread = "" if pd.isna(row["log10_gsc_stderr"]) else f" +- {row['log10_gsc_stderr']:.{places}f}"
        table.add_row(
            name,
            str(row["num_seeds"]),
            f"{row['log10_gsc']:.{places}f}{spread}",
            "" if pd.isna(row["rate"]) else measured(row["rate"], row["rate_low"], row["rate_high"]),
            "" if pd.isna(row["theory"]) else f"{row['theory']:.4f}",
            Text(row["verdict"], style),
        )
    console.print(table)


def print_claims(claims: Sequence[Claim], title: str) -> None:
    """Print the claims of a study, each with its verdict and the reason."""
    table = Table("claim", "", "because", title=title)
    styles = {True: "green", False: "bold red", None: "yellow"}
    for claim in claims:
        table.add_row(claim.says, Text(claim.verdict, styles[claim.holds]), claim.because)
    PlainConsole(highlight=True).print(table)


def print_learning(metrics: pd.DataFrame, title: str) -> None:
    """Print the last test accuracy of each ``network``, with one standard deviation over seeds."""
    table = Table(NAME(), "seeds", "epochs", "test accuracy", "range", "samples/s", title=title)
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
    PlainConsole(highlight=True).print(table)
