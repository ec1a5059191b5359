"""Which configuration key of a sweep a figure shows as x axis, color, column, row, dash or page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import pandas as pd

from experiments.archive import labels
from gradscope import frames

# Largest number of values of each role. A numeric key can have `SHADES` colors: shades from dark to light.
MOST = {"hue": 10, "col": 6, "row": 6, "style": 4}
SHADES = 24
MOST_PANELS = 24  # largest number of columns or rows that a user may ask for
PAGE = "page"


@dataclass(frozen=True)
class Choice:
    """What a user wants to see.  Keys may be joined with commas; None leaves the choice to `assign`.

    Arguments:
        x: A key, "layer", "step" or "epoch".
        y: A quantity of the frame, a column of the training records, or "rate".
        hue, col, row: Keys to distinguish by color, by column and by row of panels.
    """

    x: str | None = None
    y: str | None = None
    hue: str | None = None
    col: str | None = None
    row: str | None = None

    def __bool__(self) -> bool:
        return any((self.x, self.y, self.hue, self.col, self.row))

    def keys(self, frame: pd.DataFrame) -> dict[str, list[str]]:
        """The columns for each role that the user chose; x only if it is a configuration key."""
        x = None if self.x in ("layer", "step", "epoch") else self.x
        given = {"x": x, "hue": self.hue, "col": self.col, "row": self.row}
        found = {role: [_column(frame, role, key) for key in text.split(",")] for role, text in given.items() if text}
        used = [key for of in found.values() for key in of]
        if twice := [key for key in used if used.count(key) > 1]:
            raise ValueError(f"{twice[0]} is given for two of x=, hue=, col= and row=; give it once.")
        if len(found.get("x", [])) > 1:
            raise ValueError(f"x={self.x} must be a single key; join keys in hue=, col= or row=.")
        for role, keys in found.items():
            most = SHADES if role == "hue" and _ordered(frame, keys) else MOST_PANELS if role != "hue" else MOST["hue"]
            if role != "x" and (size := _size(frame, keys)) > most:
                raise ValueError(f"{role}={','.join(keys)} has {size} values, but {role}= shows {most} at most; "
                                 "use another of hue=, col=, row= or x=.")  # fmt: skip
        return found


def _column(frame: pd.DataFrame, role: str, key: str) -> str:
    """The column of a key, which may be given by its whole path."""
    own = [name for name in frame.columns if name not in (*frames.SCHEMA, "seed", "run", labels.NETWORK)]
    for name in (key, key.rpartition(".")[2]):
        if name in own:
            return name
    close = get_close_matches(key, own, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"keys that vary: {', '.join(labels.network_keys(frame))}."
    raise ValueError(f"{role}={key}: the sweep has no configuration key {key!r}; {hint}")


def assign(
    frame: pd.DataFrame, keys: Sequence[str], chosen: Mapping[str, list[str]] | None = None
) -> dict[str, list[str]]:
    """The keys of every role, so that each curve or point is one network.

    The role of a key in ``chosen`` is fixed.  The other keys get color, column, row and dash: the key with most values
    chooses first.  If no role is free, the key is joined with the keys of columns or rows.  If these become too many,
    each value of the key gets its own figure (page).
    """
    roles = {role: list(of) for role, of in (chosen or {}).items()}
    used = [key for of in roles.values() for key in of]
    frame = frame[list(dict.fromkeys([*keys, *used]))].drop_duplicates()
    if used:  # a key with one value per combination of the chosen keys needs no role
        groups = frame.groupby(used, dropna=False, observed=True)
        keys = [key for key in keys if key not in used and groups[key].nunique(dropna=False).max() > 1]
    for key in sorted(keys, key=lambda key: -_size(frame, [key])):
        if fixed := [of for role, of in roles.items() if role != "x" and _size(frame, [*of, key]) == _size(frame, of)]:
            fixed[0].append(key)  # the values of the role determine this key, so the number of values stays
            continue
        free = [role for role in MOST if role not in roles]
        joined = [role for role in ("col", "row") if role in roles and role not in (chosen or {})]
        for role in [*free, *joined]:
            both = [*roles.get(role, []), key]
            if _size(frame, both) <= (SHADES if role == "hue" and _ordered(frame, both) else MOST[role]):
                roles[role] = both
                break
        else:  # `with_roles` spreads colors over pages, so color has room for any number of values
            roles.setdefault("hue" if "hue" not in roles else PAGE, []).append(key)
    return roles


def with_roles(table: pd.DataFrame, roles: Mapping[str, list[str]]) -> pd.DataFrame:
    """The table with one column of labels per role, whose categories have the order of the rows.

    If a role has several keys and none of the keys is numeric, labels look like names of networks: ``relu+batch``.
    """
    columns, words = {}, {key for of in roles.values() for key in of if not pd.api.types.is_numeric_dtype(table[key])}
    for role, keys in roles.items():
        if role == "x":
            continue
        if len(keys) > 1 and {*keys} == words:
            text = labels.with_networks(table, keys)[labels.NETWORK]
        else:
            text = pd.DataFrame({key: labels.in_words(key, table[key]) for key in keys}).agg(", ".join, axis=1)
        columns[role] = pd.Categorical(text, list(pd.unique(text)), ordered=_ordered(table, keys))
    if "hue" in columns and len(names := columns["hue"].categories) > (
        most := SHADES if _ordered(table, roles["hue"]) else MOST["hue"]
    ):
        pages = [f"colors {place // most * most + 1} to {min(place // most * most + most, len(names))}"
                 for place in columns["hue"].codes]  # fmt: skip
        if PAGE in columns:
            pages = [f"{page}, {colors}" for page, colors in zip(columns[PAGE], pages, strict=True)]
        columns[PAGE] = pd.Categorical(pages, list(pd.unique(pd.Series(pages))))
    return table.assign(**columns)


def _size(frame: pd.DataFrame, keys: Sequence[str]) -> int:
    return len(frame[list(keys)].drop_duplicates())


def _ordered(frame: pd.DataFrame, keys: Sequence[str]) -> bool:
    """Whether this is a single key, whose values are numbers."""
    return len(keys) == 1 and pd.api.types.is_numeric_dtype(frame[keys[0]])
