"""Tables of many runs as one: a folder of Parquet, partitioned by model, with a column ``run`` for the run's folder.

All in Arrow, for pandas takes eight times as long to read a small file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RUN, MODEL = "run", "model"


def read_part(path: Path, run: str) -> pa.Table:
    """The table of one run.

    Raises:
        OSError: There is no such file.
        ValueError: It is no whole Parquet file.
    """
    table = pq.ParquetFile(path).read(use_threads=False).replace_schema_metadata(None)
    return table.append_column(RUN, pa.repeat(run, len(table)).cast(pa.large_string()))


def update(folder: Path, parts: Sequence[pa.Table], changed: set[str]) -> None:
    """Take the rows of runs that changed or are gone out of the data set, and put the new ones in; by rename."""
    before = [_table(folder)] if folder.is_dir() else []
    kept = [table.filter(pc.invert(pc.is_in(table[RUN], pa.array(changed, table[RUN].type)))) for table in before]
    tables = [table for table in (*kept, *parts) if len(table)]
    temporary, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    if tables:
        # A key that only some models have is null for the others, of whatever type.  One chunk, for each would become
        # a group of rows of its own, which makes files of many runs slow to read.
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        pq.write_to_dataset(table, temporary, partition_cols=[MODEL])
    if folder.is_dir():
        folder.rename(old)
    if tables:
        temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> pd.DataFrame | None:
    """The data set as a frame; None where there is none."""
    return _table(folder).to_pandas() if folder.is_dir() else None


def _table(folder: Path) -> pa.Table:
    table = pq.read_table(folder)
    position = table.schema.get_field_index(MODEL)
    return table.set_column(position, MODEL, table[MODEL].cast(pa.large_string()))
