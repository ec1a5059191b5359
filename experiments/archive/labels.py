"""The keys in which the networks of a sweep differ, and their names in tables and figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Number
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from experiments.config.columns import CLASS
from gradscope import frames

NETWORK = "network"
NAMES = {"alexnet_a": "AlexNet A", "alexnet_a_no_dropout": "AlexNet A without dropout", "alexnet_b": "AlexNet B"}


def network_keys(frame: pd.DataFrame) -> list[str]:
    """The configuration columns in which the networks of a sweep differ, without seeds and steps.

    Left out if other columns determine them: ``_target_``, ``data``, ``model``, and keys that some networks lack.
    """
    own = [name for name in frame.columns if name not in (*frames.SCHEMA, "seed", "step", "run")]
    networks = frame[own].drop_duplicates()
    varying = [name for name in own if networks[name].nunique(dropna=False) > 1]
    holes = [name for name in varying if networks[name].isna().any()]
    classes = [name for name in varying if name.endswith(f".{CLASS}")]
    for name in dict.fromkeys([*holes, *classes, "data", "model"]):
        rest = [other for other in varying if other != name]
        needed = name == "model" and any(other in holes for other in rest)  # the model shows why others lack a key
        if name in varying and rest and not needed:
            values = networks.groupby(rest, dropna=False, observed=True)[name].nunique(dropna=False)
            varying = rest if (values == 1).all() else varying
    return varying or ["model"]


def in_order(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The rows sorted by these keys: numbers by size, words by first appearance."""
    ranks = {}
    for key in keys:
        codes, values = pd.factorize(frame[key], use_na_sentinel=False)
        holes = pd.isna(values)
        if all(isinstance(value, Number) for value in values[~holes]):
            sizes = np.array([np.inf if hole else float(value) for value, hole in zip(values, holes, strict=True)])
            codes = np.argsort(np.argsort(sizes, kind="stable"))[codes]
        ranks[key] = codes
    order = pd.DataFrame(ranks).sort_values(list(keys), kind="stable").index
    return frame.iloc[order].reset_index(drop=True)


def label(key: str, value: Any) -> str:
    """A short label of a value: ``relu`` for a word, ``depth=10`` for a number, a boolean or null."""
    if isinstance(value, str):
        return NAMES.get(value, value)
    short = _short(key)
    if value is None or pd.isna(value):
        return f"{short}=null"
    return f"{short}={str(value).lower() if isinstance(value, (bool, np.bool_)) else f'{value:g}'}"


def _short(key: str) -> str:
    return key if key.endswith(f".{CLASS}") else key.rpartition(".")[2]


def in_words(key: str, values: pd.Series) -> pd.Series:
    """The label of each row together with its key, such as ``norm=batch``."""
    names = labeled(values.to_frame(key), [key])[key]
    short = _short(key)
    return names.where(names.str.startswith(f"{short}="), f"{short}=" + names)


def suffixed(key: str, label: str) -> str:
    """The label with its key in words, such as ``batch norm`` and ``no norm``; labels of numbers have theirs.

    >>> suffixed("norm", "batch"), suffixed("norm", "none"), suffixed("width", "width=50")
    ('batch norm', 'no norm', 'width=50')
    """
    if "=" in label:
        return label
    return f"{'no' if label == 'none' else label} {_short(key).replace('_', ' ')}"


def labeled(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The labels of each row, one column per key."""
    columns = {}
    for key in keys:
        codes, values = pd.factorize(table[key], use_na_sentinel=False)
        columns[key] = np.array([label(key, value) for value in values], dtype=object)[codes]
    return pd.DataFrame(columns, index=table.index)


def network_name(labels: Iterable[object]) -> str:
    """The name of a network, such as ``relu+batch``.  Labels "none" are left out, unless there are no others."""
    return "+".join(str(value) for value in labels if value != "none") or "none"


def wrapped(name: str, width: int) -> str:
    """The name in lines of about ``width`` characters, broken after spaces and "+" only."""
    text = fill(name.replace("+", "+\0 "), width, break_long_words=False, break_on_hyphens=False)
    return text.replace("+\0 ", "+").replace("+\0", "+")


def in_prose(name: str) -> str:
    """The name as figures show it: settings after commas, and keys without underscores.

    >>> in_prose("width=50+relu+batch+bias_variance=0.1")
    'width=50, relu+batch, bias variance=0.1'
    >>> in_prose("lr=1e+05+relu")
    'lr=1e+05+relu'
    """
    apart = re.sub(r"(=[^+,]*)(?<!\de)\+|(?<!\de)\+(?=[^+,]*=)", lambda end: f"{end[1] or ''}, ", name)
    return re.sub(r"\w+=", lambda key: key[0].replace("_", " "), apart)


def with_networks(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The table with a column ``network``.  If names without keys would be ambiguous, the names contain the keys."""
    parts = labeled(table, keys)
    networks = parts.drop_duplicates()
    names = networks.apply(network_name, axis=1)
    if names.duplicated().any():
        parts = pd.DataFrame({key: in_words(key, table[key]) for key in keys})
        networks = parts.drop_duplicates()
        names = networks.apply("+".join, axis=1)
    of_row = parts.merge(networks.assign(**{NETWORK: names}), on=list(keys), how="left")[NETWORK]
    return table.assign(**{NETWORK: of_row.to_numpy()})
