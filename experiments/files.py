"""JSON files and tables, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from gradscope.files import parse_json, read_text, written


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file; returns its path."""
    return written(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file; returns its path."""
    return written(path, lambda temporary: table.to_parquet(temporary, index=False))


ONE_RUN, SWEEP = 1 << 20, 16 << 20  # bytes of a file that describes a run, or all runs of a sweep


def read_json(path: Path, most: int = ONE_RUN) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is missing, damaged, nested too deeply, too large, or not an object."""
    try:
        content = parse_json(read_text(path, most))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
