"""Records of a run while it runs: one line of JSON each, flushed, so that a kill costs at most the last line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.files import written

Record = dict[str, Any]


class Records:
    """Appends to a file of JSON lines that begins with the records ``kept`` from before.

    Raises:
        OSError: The disk is full or cannot be written; the message names the file.
    """

    def __init__(self, path: Path, kept: Iterable[Record] = ()) -> None:
        self.path = path
        with self._named():
            written(path, lambda temporary: temporary.write_text("".join(map(_line, kept))))
            self._file = path.open("a")

    def append(self, record: Record) -> None:
        """Write one record, so that another process sees it at once."""
        with self._named():
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        """No more records."""
        with self._named():  # what could not be written before is tried once more
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error}); the records before are intact. Free some space, and the "
                "same command goes on."
            ) from error


def read(path: Path) -> list[Record]:
    """All whole records of a file; none where it does not exist, and a torn last line is left out.

    Raises:
        ValueError: A line before the last is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove it, or the file.") from error
    return records


def _line(record: Record) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """NaN becomes null, and infinities words, which are no numbers in JSON."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    return value
