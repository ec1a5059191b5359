"""What figures draw: results as frames, the rows of a quantity, the curves among them, and the points of a curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope.choices import listed, require
from gradscope.coefficients.growth import Growth, growth
from gradscope.frames import NETWORK, SCHEMA, to_last_target

LABELS = {
    "gsc": r"$\log_{10}$ GSC (squared convention)",
    "parameter_gsc": r"$\log_{10}$ GSC of parameters (squared convention)",
    "preactivation_std": "pre-activation standard deviation",
    "sign_diversity": "sign diversity",
    "linear_fit_error": "linear fit error",
    "jacobian_coherence": "coherence of Jacobians",
    "depth_from_output": "layers to the target",
    "index": "layer, from the input",
}
MEASURED = "gradscope.gsc(model, data).to_frame()"
RECORDED = "gradscope.Monitor(...).to_frame()"
STATISTICS = "gradscope.measure(model, data)"
PLACES = ("layer", "index", "depth_from_output")  # columns that distinguish the layers of one curve
Z95 = 1.96
LN10 = float(np.log(10))


def frame_of(data: Any) -> pd.DataFrame:
    """Convert any result of the library to a tidy frame.  Every plot calls this function first.

    Arguments:
        data: A frame; anything with ``to_frame``, such as a `gradscope.Profile`, `gradscope.Matrix` or
            `gradscope.Monitor`; a list of these for networks that differ in their random numbers only (column
            ``seed``); or a dict from names of networks to any of these (column ``network``).

    Raises:
        ValueError: An empty list or dict.
        TypeError: Anything else.

    >>> both = frame_of({"a": pd.DataFrame({"x": [1]}), "b": [pd.DataFrame({"x": [2]}), pd.DataFrame({"x": [3]})]})
    >>> both.astype(object).where(both.notna(), None).to_numpy().tolist()
    [[1, 'a', None], [2, 'b', 0.0], [3, 'b', 1.0]]
    """
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, Mapping):
        return _joined(_named(frame_of(part), str(name)) for name, part in data.items())
    if isinstance(data, Sequence) and not isinstance(data, str):
        try:
            parts = [frame_of(part) for part in data]
        except RecursionError:
            raise ValueError("A plot takes no list that is nested this deeply: give a list of results.") from None
        return _joined(part if "seed" in part else part.assign(seed=seed) for seed, part in enumerate(parts))
    if hasattr(data, "to_frame") and not isinstance(data, type):
        return frame_of(data.to_frame())
    raise TypeError(
        f"A plot takes a Profile, a Matrix, a Monitor, a tidy frame, a list of these, or a dict of names to these; "
        f"got {type(data).__name__}."
    )


def _named(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    inner = name + ", " + frame[NETWORK].astype(str) if NETWORK in frame else name
    return frame.assign(**{NETWORK: inner})


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    if not (frames := list(parts)):
        raise ValueError("A plot takes a list or dict of at least one result, and this one is empty.")
    return pd.concat(frames, ignore_index=True)


def rows_of(data: Any, quantity: str, *needed: str, maker: str = STATISTICS) -> pd.DataFrame:
    """The rows of one quantity.

    Raises:
        ValueError: The frame lacks ``quantity``, ``layer``, ``index`` or one of the columns ``needed``, or it has no
            rows of that quantity; the message names the columns or the quantities of the frame.
    """
    frame = frame_of(data)
    require(frame, ("quantity", "layer", "index", *needed), maker)
    rows = frame[frame["quantity"] == quantity]
    if rows.empty:
        known = listed(frame["quantity"].unique())
        raise ValueError(f"The frame has no rows of quantity {quantity!r}; it has {known}. Draw a frame of {maker}.")
    return rows


def gsc_rows(data: Any, *needed: str, maker: str = MEASURED) -> pd.DataFrame:
    """The rows of GSC to the last target of each run; of the GSC of parameters, if the frame holds nothing else."""
    frame = frame_of(data)
    quantities = set(frame["quantity"]) if "quantity" in frame else set()
    quantity = "parameter_gsc" if "parameter_gsc" in quantities and "gsc" not in quantities else "gsc"
    return to_last_target(rows_of(frame, quantity, "depth_from_output", "log10_value", *needed, maker=maker))


def hue_of(rows: pd.DataFrame, hue: str | None, style: str | None = None, *, free: Sequence[str] = ()) -> str | None:
    """The column that determines the color of curves: ``hue``, or the only column that varies; None if none varies.

    Curves are means over seeds and nothing else.  Columns in ``free`` may vary.

    Raises:
        ValueError: Columns other than ``hue`` and ``style`` vary within a curve, or a curve has a layer twice.
    """
    named = [name for name in (hue, style) if name is not None]
    require(rows, named, "runs with these columns, or leave out hue= and style=")
    if places := [name for name in named if name in PLACES]:
        raise ValueError(f"hue and style must name columns that distinguish networks; {places[0]!r} varies in a curve.")
    keys = [name for name in _keys(rows, free) if rows[name].nunique(dropna=False) > 1]
    varying = _varying(rows, keys, named)
    if varying and hue is None:
        for name in sorted(varying, key=lambda name: name != NETWORK):
            if not _varying(rows, keys, [name, *named]):
                hue, varying = name, []
                break
    if varying:
        raise ValueError(
            f"{_differ(varying)} within a curve, but only seeds are averaged: name them as hue= and style=, or draw "
            f"one value, such as {_one_value(rows, varying[0])}."
        )
    _check_once(rows, [name for name in (hue, style) if name is not None], free)
    return hue


def one_network(rows: pd.DataFrame, *, free: Sequence[str] = ()) -> None:
    """ValueError that names the columns, if the rows belong to networks that differ in more than their seeds."""
    keys = _keys(rows, free)
    words = [name for name in keys if not pd.api.types.is_numeric_dtype(rows[name])]
    varying = [name for name in keys if name in (*_varying(rows, keys, free), *_varying(rows, words, []))]
    if varying:
        raise ValueError(
            f"{_differ(varying)}, but this figure shows one network and averages seeds only: draw one value at a time, "
            f"such as {_one_value(rows, varying[0])}."
        )
    _check_once(rows, [], free)


def _keys(rows: pd.DataFrame, free: Sequence[str]) -> list[str]:
    """The columns that distinguish networks."""
    own = (*(SCHEMA.keys() - {"reduction"}), "seed", *free)
    return [str(name) for name in rows if name not in own]


def _varying(rows: pd.DataFrame, keys: Sequence[str], named: Sequence[str]) -> list[str]:
    keys = [key for key in keys if key not in named]
    if not keys:
        return []
    groups = rows.groupby(list(named), observed=True, dropna=False) if named else rows.assign(_=0).groupby("_")
    most = groups[keys].nunique(dropna=False).max()
    return [key for key in keys if most[key] > 1]


def _differ(names: Sequence[str]) -> str:
    return f"Column {names[0]!r} varies" if len(names) == 1 else f"Columns {listed(names)} vary"


def _one_value(rows: pd.DataFrame, name: str) -> str:
    value = rows[name].iloc[0]
    return f"frame[frame[{name!r}] == {value.item() if isinstance(value, np.generic) else value!r}]"


def _check_once(rows: pd.DataFrame, named: Sequence[str], free: Sequence[str]) -> None:
    own = [name for name in ("layer", "index", "target", "seed", *named, *free) if name in rows]
    if "layer" in own and (twice := rows.duplicated(own)).any():
        raise ValueError(
            f"Layer {rows.loc[twice, 'layer'].iloc[0]!r} occurs more than once in a curve, and no column distinguishes "
            "the rows: draw a dict from names of networks to results, or a list of results of several seeds."
        )


def curve_names(hue: str | None, style: str | None, rows: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """The rows of each curve; the keys are its values of hue and style as text."""
    keys = [name for name in (hue, style) if name is not None]
    if not keys:
        return {(): rows}
    return {tuple(map(str, key)): part for key, part in rows.groupby(keys, observed=True, sort=False, dropna=False)}


def num_runs(rows: pd.DataFrame) -> int:
    """The number of seeds; 1 if the rows have no column ``seed``."""
    return int(rows["seed"].nunique()) if "seed" in rows else 1


def summary(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """One row per point of a curve, in order: columns x, mean, low, high (NaN if unknown) and zeros.

    With several seeds: the mean over the seeds where y is finite, one standard deviation to both sides, and the number
    of seeds where y is -inf.  With one seed: the number with its 95 % interval, or else 1.96 standard errors.
    """
    ends = _interval(rows, y)
    table = pd.DataFrame({x: rows[x], "layer": rows.get("layer", ""), "y": rows[y], **ends})
    table["zeros"] = np.isneginf(table["y"].astype(float))
    table["y"] = table["y"].where(np.isfinite(table["y"].astype(float)))
    groups = table.groupby([x, "layer"], sort=False, observed=True)
    found = groups.agg(mean=("y", "mean"), low=("low", "mean"), high=("high", "mean"), zeros=("zeros", "sum"))
    if num_runs(rows) > 1:
        spread = groups["y"].std()
        found["low"], found["high"] = found["mean"] - spread, found["mean"] + spread
    return found.reset_index().sort_values(x, kind="stable", ignore_index=True)


def _interval(rows: pd.DataFrame, y: str) -> dict[str, pd.Series]:
    """Both ends of the interval of each number, NaN where its error is unknown."""
    log10 = y == "log10_value"
    if log10 and {"log10_low", "log10_high"} <= set(rows):
        return {"low": rows["log10_low"].astype(float), "high": rows["log10_high"].astype(float)}
    names = ("log10_stderr_probe", "log10_stderr_sample")
    known = [rows[name].astype(float) for name in names if name in rows]
    error = pd.concat(known, axis=1).pow(2).sum(axis=1, min_count=1) ** 0.5 if known else rows[y] * np.nan
    if not log10:
        error = error * LN10 * rows[y].abs()
        error = rows["stderr_sample"].astype(float).fillna(error) if "stderr_sample" in rows else error
    return {"low": rows[y] - Z95 * error, "high": rows[y] + Z95 * error}


def growth_table(data: Any, by: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per network with the columns ``rate``, ``rate_low``, ``rate_high`` and ``verdict`` of `gradscope.Growth`.

    Arguments:
        data: A table with the column ``rate``, which is returned as it is; `gradscope.Growth`; or results as in
            `frame_of`.
        by: Columns that distinguish the networks; by default ``network``, or the only column that varies.

    Raises:
        ValueError: As `gradscope.growth`, with the name of the network.
    """
    if isinstance(data, Growth):
        data = {"network": data}
    if isinstance(data, Mapping) and all(isinstance(found, Growth) for found in data.values()) and data:
        return pd.DataFrame([{NETWORK: str(name), **asdict(found)} for name, found in data.items()])
    frame = frame_of(data)
    if "rate" in frame:
        return frame
    rows = gsc_rows(frame)
    if by is None:
        hue = hue_of(rows, None) or (NETWORK if NETWORK in rows else None)
        rows, by = rows.assign(**{NETWORK: rows[hue].astype(str) if hue else "network"}), [NETWORK]
    require(rows, by, MEASURED + " with these columns")
    table = []
    for names, part in rows.groupby(list(by), sort=False, observed=True, dropna=False):
        try:
            table.append({**dict(zip(by, names, strict=True)), **asdict(growth(part))})
        except ValueError as reason:
            raise ValueError(f"{', '.join(map(str, names))}: {reason}") from reason
    return pd.DataFrame(table)


def growth_words(rows: pd.DataFrame) -> str:
    """What `gradscope.Growth` says of the rows of one curve, in short and without its advice; "" without a rate."""
    try:
        found = growth(rows.drop(columns=[name for name in ("_place", "step") if name in rows]))
    except ValueError:
        return ""
    return str(replace(found, advice="")).replace("95 % interval ", "")


def finite_limits(values: npt.ArrayLike, *, symmetric: bool) -> tuple[float, float]:
    """The ends of a scale for all finite logarithms, optionally symmetric about 0; ValueError if none is finite."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ValueError("Every number is zero or not finite, so the frame has nothing to draw on a logarithmic scale.")
    largest = float(np.abs(finite).max())
    low, high = (-largest, largest) if symmetric else (float(finite.min()), float(finite.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)
