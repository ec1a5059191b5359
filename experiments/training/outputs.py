"""Where records go while a network trains: files of JSON lines, sinks, the terminal; at the end two tables."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import gradscope as gs
from experiments.files import write_table
from experiments.progress import LateBar
from experiments.training import checkpoints, records, sinks
from experiments.training.distributed import Ranks
from experiments.training.records import Record, Records

# What stands in a run folder besides checkpoints, and of a run that begins anew would be taken for its own.
WRITTEN = ("*.jsonl", "*.parquet", "manifest.json", "nonfinite.pt", sinks.MLFLOW_ID)


def clear(folder: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing of it is gone on from or taken for the new."""
    if (folder / checkpoints.FOLDER).is_dir():
        shutil.rmtree(folder / checkpoints.FOLDER)
    for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
        path.unlink()


class Outputs:
    """All places for the records of one run, open while it trains; they are closed, and both tables written, also when
    it is stopped by an error.  What goes wrong then is added to that error and does not hide it.

    ``steps``: how many there will be; ``state``: the checkpoint that the run goes on from; ``columns``: the
    configuration, which every row of ``metrics.parquet`` and ``monitor.parquet`` has.  Of several processes only the
    first writes anything.
    """

    def __init__(
        self, cfg: DictConfig, folder: Path, console: Console, steps: int, state: dict[str, Any] | None,
        columns: dict[str, Any],
    ) -> None:  # fmt: skip
        self.folder, self.console, self.columns, self.active = folder, console, columns, Ranks.here().first
        self.begin, self.accuracy = 0 if state is None else state["step"], ""
        self.records: list[Record] = [] if state is None else list(state["records"])
        earlier = [] if state is None else records.read(folder / "monitor.jsonl")
        measured = [record for record in earlier if record["step"] < self.begin]
        self.frames = [_from_record(record) for record in measured]
        if not self.active:
            return
        self.metrics = Records(folder / "metrics.jsonl", self.records)
        self.monitored = Records(folder / "monitor.jsonl", measured)
        plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self.sinks = sinks.make(cfg.sinks, folder, plain, self.begin)
        for record in self.records:
            if record["step"] == self.begin:  # TensorBoard forgets from this step on
                self._sink(record["step"], sinks.of_record(record))
        self.bar = LateBar("steps", steps)
        self.bar.show(self.begin)

    def __enter__(self) -> Self:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.showwarning = self._warned(warnings.showwarning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warnings.__exit__(kind, error, trace)
        if not self.active:
            return
        sinks_closed: list[Callable[[], None]] = [partial(sink.close, error) for sink in self.sinks]
        problems: list[Exception] = []
        for end in [self.bar.close, self.metrics.close, self.monitored.close, *sinks_closed, self._tables]:
            try:
                end()
            except Exception as problem:
                problems.append(problem)
        if error is None and problems:
            error = problems.pop(0)
            _add(error, problems)
            raise error
        _add(error, problems)

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar where there is one."""
        console = self.bar.console if self.active and self.bar.visible else self.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def trained(self, record: Record) -> None:
        """A record of training."""
        if not self.active:
            return
        self.records.append(record)
        self.metrics.append(record)
        self._sink(record["step"], sinks.of_record(record))
        tested = "test_accuracy" in record
        if tested:
            self.accuracy = f"  test accuracy {100 * record['test_accuracy']:.2f} %"
        text = f"loss {record['train_loss']:.4f}{self.accuracy}  {record['images_per_second']:.0f} images/s"
        self.bar.show(record["step"], text)
        if tested:
            self.say(f"epoch {record['epoch']:.2f}  {text}")

    def measured(self, frame: pd.DataFrame) -> None:
        """A record of the monitor."""
        self.frames.append(frame)
        if not self.active:
            return
        values = {str(name): frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
        self.monitored.append(values | {"step": int(frame["step"].iloc[0])})
        self._sink(int(frame["step"].iloc[0]), sinks.of_frame(frame))

    def _sink(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def _tables(self) -> None:
        """Both tables, as far as there is anything to stand in them."""
        if self.records:
            write_table(self.folder / "metrics.parquet", pd.DataFrame(self.records).assign(**self.columns))
        if self.frames:
            frame = pd.concat(self.frames, ignore_index=True).assign(**self.columns)
            gs.frames.save(frame, self.folder / "monitor.parquet")

    def _warned(self, always: Callable[..., None]) -> Callable[..., None]:
        """Warnings of the monitor in one line, without the place in the code; others as always."""

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, gs.MonitorWarning):
                self.say(f"Warning: {message}")
            else:
                always(message, category, *place)

        return show


def _add(error: BaseException | None, problems: list[Exception]) -> None:
    for problem in problems:
        if error is not None and str(problem) != str(error):
            error.add_note(f"Besides: {problem}")


def _from_record(record: Record) -> pd.DataFrame:
    """A record of the monitor as the frame it was."""
    return gs.frames.typed(pd.DataFrame(record)).astype({"step": "int64"})
