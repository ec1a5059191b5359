"""Figures of a sweep that the user chooses: which quantity, and which key on which axis, color, column and row."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.reports import grids
from experiments.reports import growth as report_growth
from experiments.reports.roles import Choice, assign
from experiments.reports.sweep_figures import USUAL, as_points
from gradscope import frames, plots
from gradscope.coefficients.growth import MIN_LAYERS

TRAINED = ("train_loss", "test_accuracy", "test_loss", "test_bits", "learning_rate", "images_per_second")


def by_choice(collected: Collected, choice: Choice, title: str) -> dict[str, Figure]:
    """The figures that ``choice`` asks for, of every network.

    If ``x`` is not a key, these are curves.  A quantity of one number per network is always drawn against a key.
    """
    trained = collected.metrics is not None and choice.x != "layer" and choice.y not in {*collected.frame["quantity"]}
    table = collected.metrics if collected.metrics is not None and trained else collected.frame
    chosen, made = choice.keys(table), dict[str, Figure]()
    used = [key for of in chosen.values() for key in of]
    if trained:
        known = [name for name in TRAINED if name in table and table[name].notna().any()]
    else:
        known = [*dict.fromkeys(table["quantity"])] + ["rate"] * _has_rate(table)
    for y in _quantities(known, choice, trained, "x" in chosen):
        rows = table[table[y].notna()] if trained else table[table["quantity"] == ("gsc" if y == "rate" else y)]
        keys = labels.network_keys(collected.frame if trained else rows)
        keys = list(dict.fromkeys([*keys, *used]))
        rows = labels.with_networks(labels.in_order(rows, keys), keys)
        rows = rows if trained else _of_last_step(rows)
        single = not trained and (y == "rate" or rows["index"].nunique() == 1)
        axis = {"x": [_free_key(rows, keys, used, y)]} if single and "x" not in chosen else {}
        roles = assign(rows, keys, chosen | axis)
        if "x" not in roles:
            made |= grids.curves(rows, y, roles, title, (choice.x or "step") if trained else None)
            continue
        values, words = _per_network(rows, keys, y, trained)
        made |= grids.points(labels.with_networks(values, keys), roles["x"][0], y, words, roles, title)
    return made


def _has_rate(frame: pd.DataFrame) -> bool:
    """Whether a network has enough layers for a growth rate of GSC."""
    depths = frame.loc[(frame["quantity"] == "gsc") & np.isfinite(frame["log10_value"]), "depth_from_output"]
    return depths[depths > 0].nunique() >= MIN_LAYERS


def _quantities(known: list[str], choice: Choice, trained: bool, against_key: bool) -> list[str]:
    """The quantities to draw: ``y``, or the usual ones, or the only one."""
    if choice.y in known:
        return [choice.y]
    usual = (("test_accuracy",) if trained else ("rate",)) if against_key else TRAINED if trained else USUAL
    found = [name for name in usual if name in known]
    if choice.y is None and (found or len(known) == 1):
        return found or known
    if choice.y is None:
        what = f"This sweep has no {usual[0]}, which is drawn by default"
    else:
        what = f"y={choice.y}: there is no such quantity here"
    needs = " (a rate needs GSC of six layers)" if (choice.y or usual[0]) == "rate" else ""
    raise ValueError(f"{what}{needs}; y= can be {', '.join(known)}.")


def _free_key(rows: pd.DataFrame, keys: list[str], used: list[str], y: str) -> str:
    """The key for the x axis of one value per network: a number if there is one, with the most values."""
    if not (free := [key for key in keys if key not in used]):
        raise ValueError(
            f"{y} is one number per network, so the x axis must be a key: give one of {', '.join(keys)} to x=, and not "
            "to hue=, col= or row=."
        )
    return max(free, key=lambda key: (pd.api.types.is_numeric_dtype(rows[key]), rows[key].nunique()))


def _per_network(table: pd.DataFrame, keys: list[str], y: str, trained: bool) -> tuple[pd.DataFrame, tuple[str, str]]:
    """One row per network with ``value``, ``low`` and ``high``, the label of the axis, and what the bars are."""
    if y == "rate":
        return as_points(report_growth.growth_table(table, keys))
    column, where = y, ", last record"
    if not trained:
        column, where, place = "value", ", last layer", "index"
        if y == "gsc":
            table, column = frames.to_last_target(table), "log10_value"
            where, place = ", farthest layer", "depth_from_output"
        elif table["index"].nunique() == 1:
            where = ""
        groups = table.groupby([*keys, "seed"], dropna=False, observed=True)
        table = table[table[place] == groups[place].transform("max")]
    runs = table[table[column].notna()].groupby([*keys, "seed"], dropna=False, observed=True, sort=False)
    seeds = runs[column].last().groupby(keys, dropna=False, observed=True, sort=False)
    mean, std = seeds.mean(), seeds.std()
    values = pd.DataFrame({"value": mean, "low": mean - std, "high": mean + std}).reset_index()
    label = f"{plots.LABELS.get(y, y.replace('_', ' '))}{where}"
    return values, (label, grids.seeded(seeds.size(), "bars: one standard deviation"))


def _of_last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """The last record of every training run; the whole frame of measurements without training."""
    if "step" not in frame:
        return frame
    runs = [name for name in ("run", labels.NETWORK, "seed") if name in frame]
    return frame[frame["step"] == frame.groupby(runs, observed=True)["step"].transform("max")]
