"""Records of a run as JSON lines, flushed one by one, so that a killed run loses at most its last line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gradscope.files import parse_json, written

Record = dict[str, Any]


class Records:
    """A file of JSON lines, open for appending.  The records ``kept`` of an interrupted run are written first."""

    def __init__(self, path: Path, kept: Iterable[Record] = ()) -> None:
        self.path = path
        with self._named():
            written(path, lambda temporary: temporary.write_text("".join(map(_line, kept))))
            self._file = path.open("a")

    def append(self, record: Record) -> None:
        """Write one record and flush it, so that other processes see it at once."""
        with self._named():
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._named():  # closing writes the rest of the buffer
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"Could not write {self.path} ({error}); earlier records are intact. Free disk space and run the same "
                "command to resume."
            ) from error


def read(path: Path) -> list[Record]:
    """All complete records of a file.  A missing file gives none; an incomplete last line is skipped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}, is not JSON ({error}); delete the line or the file."
                ) from error
            continue
        if not is_record(record):
            raise ValueError(f"{path}, line {number}, is not a record with a step; delete the line or the file.")
        records.append(record)
    return records


def is_record(value: object) -> bool:
    """Whether a value from a file is a record: an object with the number of its step."""
    return isinstance(value, dict) and isinstance(value.get("step"), int)


def _line(record: Record) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: NaN becomes null, infinities become strings."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    return value
