"""The page about a campaign, results/calibration/README.md, from its tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.coverage.growth import NETWORKS

WIDTH = 120
TEXT = """
# What are intervals and verdicts worth?

The 95 % interval of a [growth rate](../../docs/glossary.md#coefficients) contains the true rate in {coverage:.1%} of
the cases. This is the average over {cells} cells, which are defined below. In cells that were not used to tune the
method, the share is {untuned:.1%}. A wrong verdict is rare: {wrong:.2%} on average.

The coverage of a cell is measured with {measured} networks. Its standard error is therefore about {error:.1%} for
single networks. For groups of networks it is {error4:.1%} or more, because there are half as many groups as networks,
and groups share networks. Everything was measured on two cores of an x86-64 CPU by `python -m benchmarks.coverage`.

## How well do intervals hold?

A cell combines four choices: a kind of network, all rows or ten rows of its profile, one of five choices of probes, and
groups of one, four or eight networks. There are 54 kinds of networks: six architectures, depths of 20, 50 and 100,
widths of 50, 100 and 400. The true rate is the rate of all networks of the cell together, from exact Jacobians. The
ideal interval has a half-width of 1.96 standard deviations of ln rate between networks (or groups). All numbers are in
[growth.csv](growth.csv).

Each row of the table is about all cells of one architecture. "width / ideal" is the median width of the intervals of a
cell, divided by the width of the ideal interval. "decided" is the share of verdicts other than "undecided". "wrong" is
the share, among all verdicts, of those that are decided but differ from the verdict for the true rate.

{architectures}

The median of "width / ideal" over all cells is {width:.2f}. The measured coverage is below 93 % in {below} of {cells}
cells. If every interval contained the true rate with probability 95 %, chance alone would put about {expected:.0f}
cells below 93 %. A binomial test (level 1 %) shows a true coverage below 93 % only here: {named}.

The interval averages over several models of log GSC. Their prior [weights](../../docs/glossary.md#coefficients) were
chosen on simulated random walks and on networks of width 50. Some definitions changed after results had been seen.
After 48 networks per cell, the true rate and the spread between networks were defined anew. After 200 networks per
cell, two more definitions changed: how the rate of several networks is computed, and which rows next to the target are
left out. Networks that were measured later had no influence on the method. Intervals from these later networks cover
{fresh1:.1%} for single networks, {fresh4:.1%} for groups of four, and {fresh8:.1%} for groups of eight.

**The interval of a single network cannot be ideal.** In some kinds, the log GSC of each network has a slope of its own;
in others, it returns to the mean curve of the kind. A ratio of two variances between networks tells the kinds apart.
The numerator is the variance of the total change of log GSC over the fitted rows. The denominator is the sum of the
variances of its changes from row to row. If these changes were independent, the ratio would be 1. It runs from
{long_low:.2f} ({long_low_where}) to {long_high:.2f} ({long_high_where}).

A single curve hardly shows which ratio its kind of network has. The changes of neighboring rows correlate by 0.1 or
less, and the standard error of such a correlation is 0.14 for 49 changes and 0.33 for nine. So every interval must be
wide enough for the largest ratio. An interval needs a half-width of 1.96 standard deviations to cover 95 %, and of 1.81
to cover 93 %. If all changes have equal variance, the standard deviation of the rate is proportional to the square root
of the ratio. So an interval that covers 93 % at the largest ratio is √({long_high:.2f} / {long_low:.2f}) · 1.81 / 1.96
= {limit:.2f} times as wide as the ideal interval at the smallest ratio.

Three other sets of prior weights were tried on the first 48 networks of each kind. With them, the median width of
intervals fell by up to 6 %, but the coverage of ReLU networks with batch normalization fell by up to 2 percentage
points. For groups of eight networks, the width of the interval comes from the spread between the rates of the networks,
and not from the errors that the models of log GSC give.

If all networks of a group have the same decided verdict, the group should get this verdict, too. Among 1,000 random
groups of 2 to 12 networks, {common} had such a common verdict. Pooled, {weaker} of these groups had another verdict.

## How often is each verdict given?

The networks cannot be built with a given rate, such as 1.01. Therefore a straight line was added to the measured curves
of log GSC against depth. (These curves come from exact Jacobians.) All curves of one kind of network got the same line.
Its slope was chosen so that the rate of all these networks together is the true rate in the first column. The table has
means over the 54 kinds of networks; [characteristics.csv](characteristics.csv) has each kind.

{characteristics}

In the cell with the most wrong verdicts, {worst:.1%} are wrong ({worst_where}). The number of cells in which a binomial
test (level 1 %) shows more than 2.5 % wrong verdicts is {beyond}.

## Which faults are found?

[faults.csv](faults.csv) has the planted faults of `python -m benchmarks.faults`; [checking](../../docs/checking.md)
describes them.

## How well do intervals of other quantities hold?

[estimates.csv](estimates.csv) has the coverage of the intervals of quantities other than growth rates, measured by
`python -m benchmarks.coverage --part estimates`; [estimates](../../docs/estimates.md) describes it.
[transformers.csv](transformers.csv) has the coverage for GSC by position; [transformers](../../docs/transformers.md)
describes it.

## Are coordinate checks right?

[scaling.csv](scaling.csv) has the verdicts of the [coordinate checks](../../docs/comparing.md#coordinate-check) in
`python -m benchmarks.scaling`; [benchmarks](../../benchmarks/README.md) describes the networks.

## Are repairs on target?

[repairs.csv](repairs.csv) has the results of `gs.repair` for every unit of 15 kinds of networks;
[benchmarks](../../benchmarks/README.md) describes the campaign `python -m benchmarks.repairs`.
"""


def write(folder: Path) -> None:
    """Write the page of the tables in ``folder``."""
    rates, verdicts = (pd.read_csv(folder / f"{name}.csv") for name in ("growth", "characteristics"))
    found = pd.read_json(folder / "growth.json", typ="series")
    numbers = _of_rates(rates) | _of_verdicts(verdicts) | _wrong(rates, verdicts)
    text = TEXT.format(
        common=int(found["groups with a common verdict"]),
        weaker=int(found["of these, weaker when pooled"]),
        **numbers,
    )
    blocks = [block if block.startswith(("|", "#")) else _filled(block) for block in text.strip().split("\n\n")]
    (folder / "README.md").write_text("\n\n".join(blocks) + "\n")


def num_trials(table: pd.DataFrame) -> pd.Series:
    """Number of networks, or of groups of networks, behind each row of a table."""
    return table["measured"].where(table["networks"] == 1, table["measured"] // 2)


def _of_rates(rates: pd.DataFrame) -> dict[str, object]:
    num = num_trials(rates)
    low = rates[stats.binom.cdf((rates["coverage"] * num).round(), num, 0.93) < 0.01]
    where = low.groupby(["architecture", "depth", "rows", "networks"], sort=False).size().reset_index(name="num")
    named = [
        f"{row.architecture}, depth {row.depth}, {'ten' if row.rows == '10' else 'all'} rows, "
        f"groups of {row.networks} (number of cells: {row.num})"
        for row in where.itertuples()
    ]
    every = rates[(rates["rows"] == "all") & (rates["networks"] == 1) & (rates["probes"] == "exact")]
    ordered = every.sort_values("long_run")
    shortest, longest = ordered.iloc[0], ordered.iloc[-1]
    table = rates.groupby("architecture", sort=False).agg(
        coverage=("coverage", "mean"), worst=("coverage", "min"), width=("relative_width", "median"),
        widest=("relative_width", "max"), decided=("decided", "mean"), wrong=("wrong", "max"),
    )  # fmt: skip
    measured = int(rates["measured"].min())
    return {
        "coverage": rates["coverage"].mean(),
        "untuned": rates.loc[~rates["tuned"], "coverage"].mean(),
        **{f"fresh{size}": rates.loc[rates["networks"] == size, "coverage_fresh"].mean() for size in NETWORKS},
        "cells": len(rates),
        "measured": measured,
        "error": np.sqrt(0.95 * 0.05 / measured),
        "error4": np.sqrt(0.95 * 0.05 / (measured // 2)),
        "width": rates["relative_width"].median(),
        "below": int((rates["coverage"] < 0.93).sum()),
        "expected": float(np.sum(stats.binom.cdf(np.ceil(0.93 * num) - 1, num, 0.95))),
        "named": "; ".join(named) or "none",
        "long_low": shortest["long_run"],
        "long_low_where": _kind(shortest),
        "long_high": longest["long_run"],
        "long_high_where": _kind(longest),
        "limit": stats.norm.ppf(0.965) / stats.norm.ppf(0.975) * np.sqrt(longest["long_run"] / shortest["long_run"]),
        "architectures": _table(
            ["architecture", "coverage, mean", "worst cell", "width / ideal, median", "widest cell", "decided",
             "wrong, worst cell"],
            [[str(name), f"{row.coverage:.1%}", f"{row.worst:.0%}", f"{row.width:.2f}", f"{row.widest:.2f}",
              f"{row.decided:.0%}", f"{row.wrong:.1%}"] for name, row in table.iterrows()],
        ),
    }  # fmt: skip


def _of_verdicts(verdicts: pd.DataFrame) -> dict[str, object]:
    words = ["exploding", "stable", "vanishing", "undecided"]
    means = verdicts.groupby(["true_rate", "networks"])[words].mean().reset_index()
    return {
        "characteristics": _table(
            ["true rate", "networks", *words],
            [[f"{row.true_rate:g}", f"{row.networks:g}", *(f"{row[word]:.1%}" for word in words)]
             for _, row in means.iterrows()],
        ),
    }  # fmt: skip


def _wrong(rates: pd.DataFrame, verdicts: pd.DataFrame) -> dict[str, object]:
    rates = rates.assign(true_rate=rates["rate"].round(4))
    both = pd.concat([rates, verdicts])
    worst, num = both.sort_values("wrong").iloc[-1], num_trials(both)
    return {
        "wrong": both["wrong"].mean(),
        "worst": worst["wrong"],
        "worst_where": f"{_kind(worst)}, groups of {worst['networks']}, true rate {worst['true_rate']:g}",
        "beyond": int(np.sum(stats.binom.sf((both["wrong"] * num).round() - 1, num, 0.025) < 0.01)),
    }


def _kind(row: pd.Series) -> str:
    return f"{row['architecture']}, depth {row['depth']}, width {row['width']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---" for _ in header], *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("%", " %") for line in lines)


def _filled(block: str) -> str:
    text = " ".join(block.split()).replace("%", " %").replace("  %", " %")
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
