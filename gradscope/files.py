"""Files: written atomically, read only if they are regular and not too large, and their words made printable."""

from __future__ import annotations

import csv
import errno
import json
import os
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LIMIT = "GRADSCOPE_READ_MB"  # an environment variable: the most mebibytes that one table may take in memory
DEFAULT_MB = 256
MOST_TEXT = 16 << 20  # bytes of a file of text, or of the first line of a table
MOST_NESTED = 50  # levels of lists and objects in JSON
MOST_COLUMNS, MOST_LETTERS = 256, 200  # of a table, and of the name of a column
CELL = 8  # bytes of a number


class TooLargeError(ValueError):
    """A file, or the table in it, is larger than the limit."""


def limit() -> int:
    """Return the most bytes that one table may take in memory."""
    return int(float(os.environ.get(LIMIT, DEFAULT_MB)) * (1 << 20))


def check_size(path: Path, num_bytes: int, most: int) -> None:
    """Raise `TooLargeError` if a file, or the table in it, takes more than ``most`` bytes."""
    if num_bytes > most:
        hint = f": set {LIMIT} to read it all the same." if most == limit() else "."
        raise TooLargeError(
            f"{path} would take {num_bytes / 1e6:,.0f} MB of memory, and the limit is {most / 1e6:,.0f} MB{hint}"
        )


def size(path: Path, most: int) -> int:
    """Return the size of a regular file.  ValueError for anything else: reading a pipe or a device may never end."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "No such file, check path", str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    check_size(path, found.st_size, most)
    return found.st_size


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Return the text of a regular file; ValueError if it is too large or not UTF-8."""
    size(path, most)
    with path.open("rb") as file:
        content = file.read(most + 1)  # a file of the system may have size 0 and never end
    check_size(path, len(content), most)
    return content.decode()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is damaged or nested too deeply."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_NESTED} levels deep") from None
    level = [found]
    for _ in range(MOST_NESTED):
        level = [part for one in level if isinstance(one, (dict, list)) and one
                 for part in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if not level:
            return found
    raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")


def read_parquet(path: Path, most: int | None = None) -> pa.Table:
    """Return the table of a Parquet file; what it takes in memory is bounded before it is read.

    Raises:
        TooLargeError: The table takes more than ``most`` bytes (default: `limit`).
        ValueError: The file is damaged, a column occurs twice or holds no plain values, or a name is too long.
    """
    most = limit() if most is None else most
    size(path, limit())
    try:
        with pa.OSFile(str(path)) as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            about = file.metadata
            if not _sound or not about.schema.equals(_sound[0].schema) or about.metadata != _sound[0].metadata:
                check_columns(file.schema_arrow)
                _sound[:] = [about]
            stored = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
            check_size(path, max(stored, about.num_rows * about.num_columns * CELL), most)
            if about.num_rows * stored <= most:  # even if every row held the longest text
                return file.read(use_threads=False)
            return _decoded(path, source, file.schema_arrow, most)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, (ValueError, FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{path.name} is not readable Parquet: {error}") from error


_sound: list[pq.FileMetaData] = []  # of the last file whose columns passed: the runs of a sweep have the same ones


def read_csv(path: Path, text: Mapping[str, str]) -> pd.DataFrame:
    """Return the table of a CSV file, whose size is bounded before it is read.

    ``text``: the dtypes of columns that are not read as numbers.  Only an empty field is null: "none" is the name of a
    norm, and "NA" and "1.10" may be names of layers.
    """
    size(path, limit())
    with path.open("rb") as file:
        header = file.readline(MOST_TEXT).decode()
        names = next(csv.reader([header]), [])
        check_names(names)
        rows = sum(part.count(b"\n") + part.count(b"\r") for part in iter(lambda: file.read(1 << 20), b""))
    check_size(path, (rows + 1) * len(names) * CELL, limit())
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict(text))


def _decoded(path: Path, source: pa.NativeFile, schema: pa.Schema, most: int) -> pa.Table:
    """A table whose texts are first read as references to a list of texts, because a long one may repeat often."""
    source.seek(0)
    words = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    table = pq.ParquetFile(source, read_dictionary=words, pre_buffer=False).read(use_threads=False)
    num_bytes = table.nbytes
    for part in (part for column in table.columns for part in column.chunks if pa.types.is_dictionary(part.type)):
        if not pa.types.is_primitive(part.type.value_type):
            lengths = pc.binary_length(part.dictionary)
            num_bytes += pc.sum(lengths.take(part.indices)).as_py() or 0
    check_size(path, num_bytes, most)
    return table.cast(schema)


def check_columns(schema: pa.Schema) -> None:
    """Raise ValueError unless a table has at most 256 columns of plain values with different, short names."""
    check_names(schema.names)
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_nested(kind) or not (
            pa.types.is_primitive(kind)
            or pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_null(kind)
        ):
            raise ValueError(f"Column {field.name!r} holds {kind}, not numbers or texts.")


def check_names(names: list[str]) -> None:
    """Raise ValueError if there are too many names of columns, or one occurs twice or is too long."""
    if len(names) > MOST_COLUMNS:
        raise ValueError(f"It has {len(names)} columns, more than {MOST_COLUMNS}.")
    if long := [name for name in names if len(name) > MOST_LETTERS]:
        raise ValueError(f"The name of column {long[0][:20]!r}... has {len(long[0])} letters, at most {MOST_LETTERS}.")
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f"It has the column {twice[0]!r} more than once.")


def printable(text: object, most: int | None = None) -> str:
    r"""Return a text whose characters that control a terminal are escaped, cut to ``most`` characters.

    >>> printable("red: \x1b[31m, reversed: \u202e")
    'red: \\x1b[31m, reversed: \\u202e'
    """
    words = str(text)
    if most is not None and len(words) > most:
        words = f"{words[:most]}..."
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in words)


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file, and rename it to ``path``; return ``path``.

    A link of that name is replaced, not followed.
    """
    if path.is_dir():
        raise ValueError(f"path must name a file, but {path} is a folder.")
    make_folder(path.parent)
    temporary = beside(path)
    try:
        write(temporary)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # leave no partial file, for example on a full disk
        raise


def make_folder(folder: Path) -> None:
    """Create a folder, and those that contain it, if it does not exist.  FileNotFoundError names a link to nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        dangling = [path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()]
        if not dangling:
            raise
        reason = f"the link {dangling[0]} leads to {dangling[0].readlink()}, which does not exist"
        raise FileNotFoundError(errno.ENOENT, reason) from error


def beside(path: Path) -> Path:
    """Return a temporary file name with a random part, so that writers do not overwrite each other."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
