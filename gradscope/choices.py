"""Checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches


def check_choice(name: str, choice: object, known: Iterable[str]) -> None:
    """Raise ValueError if ``choice``, the value of argument ``name``, is not in ``known``; suggest the closest name."""
    if choice not in tuple(known):
        close = get_close_matches(str(choice), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {choice!r}{hint}")


def check_nonnegative(**arguments: float) -> None:
    """Raise ValueError for the first keyword argument that is not a finite number >= 0."""
    for name, value in arguments.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
