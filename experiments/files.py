"""Files that are written atomically: first under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from gradscope.frames import beside


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file; returns its path."""
    return written(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file; returns its path."""
    return written(path, lambda temporary: table.to_parquet(temporary, index=False))


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file of this process, and rename it to ``path``; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        write(temporary)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is missing, damaged, or not an object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
