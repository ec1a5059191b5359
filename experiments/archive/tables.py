"""One table for many runs: a folder of Parquet files, partitioned by model.  Column ``run``: name of the run's folder.

The files are read with Arrow, because pandas takes eight times as long for a small file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradscope import files, frames

RUN, MODEL = "run", "model"
MOST_MODEL = 80  # characters of the name of a model, which names a folder
ROWS = 20_000  # of one file, at least; the rows held in memory while a data set is written
TEXT = pa.large_string()
ARROW = {"str": TEXT, "int64": pa.int64(), "Int64": pa.int64(), "float64": pa.float64(),
         "boolean": pa.bool_()}  # fmt: skip
WITHOUT_NULLS = [name for name in frames.COLUMNS if name not in frames.NULLABLE and name != "log10_value"]


def read_part(path: Path, most: int | None = None) -> pa.Table:
    """The table of one run.  ValueError if the file is damaged or too large."""
    return files.read_parquet(path, most).replace_schema_metadata(None)


def read_frame(path: Path, most: int | None = None) -> pa.Table:
    """The tidy frame of one run, which has the columns of the schema; `of_runs` gives them their types."""
    table = files.read_parquet(path, most)
    frames.check_version(frames.version_of(table.schema), path)
    if missing := [name for name in frames.COLUMNS if name not in table.schema.names]:
        raise ValueError(f"It lacks the columns {missing}.")
    return table.replace_schema_metadata(None)


def of_runs(parts: Sequence[pa.Table], runs: Sequence[str], schema: Mapping[str, str]) -> pa.Table:
    """The rows of runs with the column ``run``; columns of ``schema`` have its types.  `check` compares their values.

    What is done to a table of many runs takes as long as for one run.

    Raises:
        ValueError: A run does not name one model, or a column cannot have its type.
    """
    first = parts[0].schema
    if not all(part.schema.equals(first) for part in parts[1:]):
        return together([of_runs([part], [run], schema) for part, run in zip(parts, runs, strict=True)])
    if MODEL not in first.names:
        raise ValueError(f"It lacks the column {MODEL!r}.")
    if RUN in first.names:
        raise ValueError(f"It has a column {RUN!r}, a name that is reserved for the folder of the run.")
    table = pa.concat_tables(parts)
    for place, (name, kind) in enumerate(zip(first.names, first.types, strict=True)):
        wanted = ARROW[schema[name]] if name in schema else TEXT if name == MODEL else kind
        if kind != wanted:
            table = table.set_column(place, name, table[place].cast(wanted))
    _check_models(table[MODEL], parts)
    sizes = [len(part) for part in parts]
    return table.append_column(RUN, pa.array(runs, TEXT).take(np.repeat(np.arange(len(parts)), sizes)))


def _check_models(models: pa.ChunkedArray, parts: Sequence[pa.Table]) -> None:
    """ValueError unless each part has one name of a model, or no rows."""
    if len(only := pc.unique(models)) > 1 and parts[1:]:
        first = 0
        for part in parts:
            _check_models(models.slice(first, len(part)), [part])
            first += len(part)
    elif len(only) and (len(only) > 1 or not 0 < len(only[0].as_py() or "") <= MOST_MODEL):
        raise ValueError(f"Its column {MODEL!r} must hold one name of at most {MOST_MODEL} characters.")


def check(table: pa.Table) -> None:
    """Check the values of a tidy frame as `frames.check` does, but in a tenth of the time."""
    wanted = ("value", "log10_value", "stderr_sample", *frames.OPTIONAL)
    numbers = {name: table[name].to_numpy() for name in wanted if name in table.column_names}
    holes = [name for name in WITHOUT_NULLS if table[name].null_count]
    signed = ~np.isnan(numbers["stderr_sample"]) | table["target"].is_null().to_numpy()
    unknown = np.isnan(numbers["log10_value"]) & ~signed
    if np.isnan(numbers["value"]).any() or unknown.any() or holes:
        raise ValueError(f"It has nulls in columns that allow none ({', '.join(holes) or 'value or log10_value'}).")
    frames.check_values(numbers)


@dataclass
class Update:
    """A data set that is written anew: the old rows of the runs in ``kept``, then the tables that are added.

    Only some thousand rows are held in memory.  `recover` undoes a killed update.
    """

    folder: Path
    kept: set[str]
    _held: list[pa.Table] = field(default_factory=list)
    _schemas: list[pa.Schema] = field(default_factory=list)
    _begun: bool = False

    def add(self, *tables: pa.Table) -> None:
        """Add the rows of these tables."""
        if not self._begun:
            self._begun = True
            recover(self.folder)
            names = pa.array(sorted(self.kept), pa.large_string())
            for table in _parts(self.folder):
                self.add(table.filter(pc.is_in(table[RUN], names)))
        self._held += [table for table in tables if len(table)]
        if sum(map(len, self._held)) >= ROWS:
            self._flush()

    def finish(self) -> None:
        """Replace the old data set by the new one."""
        self.add()
        self._flush()
        temporary, old = _part(self.folder), _old(self.folder)
        self._unify(temporary)
        if self.folder.is_dir():
            self.folder.rename(old)
        if self._schemas:
            temporary.rename(self.folder)
        remove(old)

    def _flush(self) -> None:
        if self._held:
            # Without `combine_chunks`, each run would become a row group, and files with many are slow to read.
            table = together(self._held).combine_chunks()
            form = f"{len(self._schemas):06d}-{{i}}.parquet"
            pq.write_to_dataset(
                table, _part(self.folder), partition_cols=[MODEL], basename_template=form,
                existing_data_behavior="overwrite_or_ignore", use_threads=False,
            )  # fmt: skip
            self._schemas.append(table.schema)
            self._held = []

    def _unify(self, folder: Path) -> None:
        """Give all files the same columns, so that other libraries can read the folder as one table."""
        if len(set(self._schemas)) > 1:
            common = together([schema.empty_table() for schema in self._schemas]).schema
            names = [name for name in common.names if name != MODEL]
            for path in sorted(folder.rglob("*.parquet")):
                table = pq.ParquetFile(path).read()
                pq.write_table(together([common.empty_table(), table]).select(names), path)


def recover(folder: Path) -> None:
    """Restore the data set after a killed update.  A data set with an unreadable file is removed, and so are links."""
    remove(_part(folder))
    if _old(folder).is_dir() and not _old(folder).is_symlink() and not folder.is_dir():
        _old(folder).rename(folder)
    remove(_old(folder))
    try:
        for path in _paths(folder):
            if RUN not in pq.read_schema(path).names:
                raise ValueError(f"{path} names no runs.")
    except (pa.ArrowException, OSError, ValueError):
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it names), or a folder with its content, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path) -> pd.DataFrame | None:
    """The data set as a frame; None if there is none.  ValueError if it is damaged or too large."""
    if not folder.is_dir():
        return None
    about = [pq.read_metadata(path) for path in _paths(folder)]
    columns = max((one.num_columns for one in about), default=0)
    files.check_size(folder, sum(one.num_rows for one in about) * columns * files.CELL, files.limit())
    table = together(list(_parts(folder)))
    names = [name for name in table.column_names if name != MODEL]
    return table.select([*names, MODEL]).to_pandas()


def num_rows(folder: Path) -> int:
    """The number of rows of a data set."""
    return sum(pq.read_metadata(path).num_rows for path in _paths(folder))


def _paths(folder: Path) -> list[Path]:
    """The files of a data set, in the order in which they were written.  ValueError if it holds anything else."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link.")
    paths = sorted(folder.rglob("*.parquet"), key=lambda path: (path.name, path.parent.name))
    for path in paths:
        files.size(path, files.limit())
    return paths


def _parts(folder: Path) -> Iterator[pa.Table]:
    for path in _paths(folder):
        table = files.read_parquet(path)
        model = unquote(path.parent.name.partition("=")[2])
        yield table.append_column(MODEL, pa.repeat(model, len(table)).cast(pa.large_string()))


def together(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables.  Columns that a table lacks are null there; columns of mixed types become strings."""
    with contextlib.suppress(pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.concat_tables(tables, promote_options="permissive")
    types: dict[str, set[pa.DataType]] = {}
    for column in (column for table in tables for column in table.schema):
        types.setdefault(column.name, set()).add(column.type)
    mixed = {name for name, of in types.items() if not _promotable(of)}
    cast = [
        table.cast(pa.schema([column.with_type(pa.large_string()) if column.name in mixed else column
                              for column in table.schema]))
        for table in tables
    ]  # fmt: skip
    return pa.concat_tables(cast, promote_options="permissive")


def _promotable(types: set[pa.DataType]) -> bool:
    try:
        pa.unify_schemas([pa.schema([("", one)]) for one in types], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return False
    return True


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


@dataclass(frozen=True, eq=False)  # hashed by identity, so that studies can cache what they read from a frame
class Collected:
    """All finished runs of a sweep: a tidy frame, a table of training records (or None), and a common manifest."""

    frame: pd.DataFrame
    metrics: pd.DataFrame | None
    manifest: dict[str, Any]
