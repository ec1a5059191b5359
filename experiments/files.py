"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from gradscope.frames import beside


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """A JSON file."""
    return written(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """A Parquet file."""
    return written(path, lambda temporary: table.to_parquet(temporary, index=False))


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """What ``write`` puts into a temporary file, renamed to ``path``; what was there before stays until then.

    The temporary name is the process's own, so that two processes that write the same file, on whatever machines, do
    not tear it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        write(temporary)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or what is there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
