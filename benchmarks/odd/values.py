"""Values that no argument, or hardly any, should have."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn


class Endless:
    """An iterable without an end."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return itertools.repeat(torch.ones(4, 6))


class Hostile:
    """An object whose every question raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __float__(self) -> float:
        raise RuntimeError("no number")


def raising(*_: Any, **__: Any) -> Any:
    """A function of the user that fails."""
    raise ValueError("raised by the function of the user")


def endless() -> Iterator[torch.Tensor]:
    """A generator without an end."""
    while True:
        yield torch.ones(4, 6)


def recursive() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


def nested(depth: int = 2000) -> list[Any]:
    """A list in a list, 2000 times."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


# Each value is made anew for every call, because a call may change it.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "0": lambda: 0, "1": lambda: 1,
    "-1": lambda: -1, "3": lambda: 3, "2.5": lambda: 2.5, "nan": lambda: math.nan, "inf": lambda: math.inf,
    "-inf": lambda: -math.inf, "10**400": lambda: 10**400, "-10**400": lambda: -(10**400), "10**12": lambda: 10**12,
    "10**6": lambda: 10**6, "2**31": lambda: 2**31, "2**63": lambda: 2**63, "1e308": lambda: 1e308,
    "1e-320": lambda: 1e-320, "1j": lambda: 1j, "-0.0": lambda: -0.0, "empty text": lambda: "", "text a": lambda: "a",
    "auto": lambda: "auto", "exact": lambda: "exact", "NUL": lambda: "\0", "relu": lambda: "relu",
    "text 3": lambda: "3", "text nan": lambda: "nan", "path text": lambda: "missing/folder/x.parquet",
    "surrogate": lambda: "\udc80", "long text": lambda: "x" * 100_000, "bytes": lambda: b"ab",
    "[]": list, "[None]": lambda: [None], "[1, 2]": lambda: [1, 2], "[nan, 1]": lambda: [math.nan, 1.0],
    "['a']": lambda: ["a"], "[[1], [1, 2]]": lambda: [[1], [1, 2]], "()": tuple, "(1,)": lambda: (1,),
    "(1, 2, 3)": lambda: (1, 2, 3), "(nan, inf)": lambda: (math.nan, math.inf), "('a', 'b')": lambda: ("a", "b"),
    "(2, 1)": lambda: (2, 1), "{}": dict, "{'a': 1}": lambda: {"a": 1}, "{1: 2}": lambda: {1: 2},
    "{'x': tensor}": lambda: {"x": torch.ones(4, 6)}, "set()": set, "range(3)": lambda: range(3),
    "range(10**12)": lambda: range(10**12), "finite generator": lambda: (torch.ones(4, 6) for _ in range(3)),
    "generator of numbers": lambda: (n for n in range(3)), "count()": itertools.count,
    "cycle": lambda: itertools.cycle([torch.ones(4, 6)]), "endless generator": endless, "Endless": Endless,
    "empty iterator": lambda: iter(()), "array()": lambda: np.array([]), "array(nan)": lambda: np.array(math.nan),
    "array [nan, 1]": lambda: np.array([math.nan, 1.0]), "array of texts": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, "a"], dtype=object), "array (2, 0)": lambda: np.zeros((2, 0)),
    "array (2, 3)": lambda: np.ones((2, 3)), "array complex": lambda: np.ones((2, 2)) * 1j,
    "float32": lambda: np.float32(0.5), "int64": lambda: np.int64(3), "bool_": lambda: np.bool_(True),
    "datetime64": lambda: np.datetime64("2020-01-01"), "NA": lambda: pd.NA, "NaT": lambda: pd.NaT,
    "empty frame": pd.DataFrame, "frame a": lambda: pd.DataFrame({"a": [1.0]}),
    "frame of texts": lambda: pd.DataFrame({"layer": ["a"], "value": ["b"], "quantity": [1]}),
    "series": lambda: pd.Series([1.0, 2.0]), "tensor(nan)": lambda: torch.tensor(math.nan),
    "tensor(3)": lambda: torch.tensor(3), "tensor(0.5)": lambda: torch.tensor(0.5),
    "tensor (0,)": lambda: torch.zeros(0),
    "tensor (2, 3)": lambda: torch.ones(2, 3), "tensor (4, 6)": lambda: torch.ones(4, 6),
    "tensor nan": lambda: torch.full((4, 6), math.nan), "tensor int": lambda: torch.tensor([1, 2]),
    "tensor complex": lambda: torch.ones(4, 6) * 1j, "tensor bool": lambda: torch.ones(4, 6) > 0,
    "tensor meta": lambda: torch.ones(4, 6, device="meta"), "number meta": lambda: torch.ones((), device="meta"),
    "tensor sparse": lambda: torch.eye(6).to_sparse(), "tensor half": lambda: torch.ones(4, 6, dtype=torch.float16),
    "tensor grad": lambda: torch.ones(4, 6, requires_grad=True), "tensor (4, 6, 2, 2)": lambda: torch.ones(4, 6, 2, 2),
    "generator": lambda: torch.Generator().manual_seed(0), "Linear": lambda: nn.Linear(2, 3), "Module": nn.Module,
    "Identity": nn.Identity, "class": lambda: int, "module": lambda: math, "object": object,
    "lambda: None": lambda: lambda: None, "lambda *a: None": lambda: lambda *a, **k: None,
    "lambda *a: text": lambda: lambda *a, **k: "x", "lambda *a: nan": lambda: lambda *a, **k: torch.tensor(math.nan),
    "raising": lambda: raising, "len": lambda: len, "Decimal": lambda: Decimal("1.5"),
    "Fraction": lambda: Fraction(1, 2), "date": lambda: datetime.date(2020, 1, 1), "Path": lambda: Path("missing/x"),
    "Path .": lambda: Path(), "Ellipsis": lambda: ..., "NotImplemented": lambda: NotImplemented,
    "Hostile": Hostile, "recursive list": recursive, "nested list": nested, "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"), "slice": lambda: slice(None), "error": lambda: ValueError("x"),
}  # fmt: skip
