"""Outputs of a training run: JSON lines, sinks and terminal lines during training, two Parquet tables at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from gradscope.sinks import SinkWarning, values_of

# Files of a run folder besides checkpoints.  A run that starts anew deletes old ones: it would take them for its own.
WRITTEN = ("*.jsonl", "*.parquet", "manifest.json", "nonfinite.pt", sinks.TRACKED.format("*"))


def clear(folder: Path) -> None:
    """Delete checkpoints and records of an earlier run from its folder.

    The folder of checkpoints may be a link to another disk, where other files stay.
    """
    for path in [path for pattern in (*WRITTEN, *checkpoints.WRITTEN) for path in folder.glob(pattern)]:
        path.unlink()


class Outputs:
    """Context manager that holds the outputs of one run open.

    On exit, all outputs are closed and both tables are written, even after an error.  Errors while closing are added to
    the first error as notes.  With several processes, only the first process writes.

    Arguments:
        steps: Total number of steps, for the progress bar.
        state: The checkpoint that the run resumes from.
        columns: The configuration, added to every row of both tables.
        every: Without a progress bar, print a line for every record, and not only at the end of each epoch.
    """

    def __init__(
        self, cfg: DictConfig, folder: Path, console: Console, steps: int, state: dict[str, Any] | None,
        columns: dict[str, Any], every: bool = True,
    ) -> None:  # fmt: skip
        self.steps, self.every = steps, every
        self.folder, self.console, self.columns, self.active = folder, console, columns, Ranks.here().first
        self.begin, self.accuracy = 0 if state is None else state["step"], ""
        self.records: list[Record] = [] if state is None else list(state["records"])
        measured = [record for record in records.read(folder / "monitor.jsonl") if record["step"] < self.begin]
        try:
            self.frames = [gs.frames.typed(pd.DataFrame(record)).astype({"step": "int64"}) for record in measured]
        except Exception as error:  # records from elsewhere can hold anything
            raise ValueError(
                f"{folder / 'monitor.jsonl'} holds no frames ({error}); restart with resume=none."
            ) from error
        if not self.active:
            return
        self.metrics = Records(folder / "metrics.jsonl", self.records)
        self.monitored = Records(folder / "monitor.jsonl", measured)
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self.sinks = sinks.make(cfg.sinks, folder, config, self.begin)
        for record in self.records:
            if record["step"] == self.begin:  # TensorBoard has dropped values of this step and later
                self.sinks.write(record["step"], sinks.of_record(record))
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
        if self.active:
            self.sinks.close(error)
        self._warnings.__exit__(kind, error, trace)
        if not self.active:
            return
        problems: list[BaseException] = [] if error is None else [error]
        for end in (self.bar.close, self.metrics.close, self.monitored.close, self._tables):
            try:
                end()
            except Exception as problem:
                problems.append(problem)
        for further in problems[1:]:
            if str(further) != str(problems[0]):
                problems[0].add_note(f"In addition: {further}")
        if error is None and problems:
            raise problems[0]

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar if there is one."""
        console = self.bar.console if self.active and self.bar.visible else self.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def trained(self, record: Record) -> None:
        """Write a record of training to the file, the sinks and the terminal."""
        if not self.active:
            return
        self.records.append(record)
        self.metrics.append(record)
        self.sinks.write(record["step"], sinks.of_record(record))
        if tested := "test_accuracy" in record:
            self.accuracy = f"  test accuracy {100 * record['test_accuracy']:.2f} %"
            if "test_bits" in record:  # a language model
                loss, bits = record["test_loss"], record["test_bits"]
                self.accuracy = f"  test loss {loss:.4f} nats ({bits:.3f} bits) per token{self.accuracy}"
        text = f"loss {record['train_loss']:.4f}{self.accuracy}  {record['images_per_second']:.0f} samples/s"
        self.bar.show(record["step"], text)
        if tested or (self.every and not self.bar.visible):
            self.say(f"step {record['step']} of {self.steps}  epoch {record['epoch']:.2f}  {text}")

    def measured(self, frame: pd.DataFrame) -> None:
        """Write a record of the monitor to the file and the sinks, and keep it for the table."""
        self.frames.append(frame)
        if not self.active:
            return
        step = int(frame["step"].iloc[0])
        values = frame.astype(object).where(frame.notna(), None)
        self.monitored.append({**{str(name): list(values[name]) for name in values}, "step": step})
        self.sinks.write(step, values_of(frame))

    def _tables(self) -> None:
        """Write both tables, except empty ones."""
        if self.records:
            write_table(self.folder / "metrics.parquet", pd.DataFrame(self.records).assign(**self.columns))
        if self.frames:
            frame = pd.concat(self.frames, ignore_index=True).assign(**self.columns)
            gs.frames.save(frame, self.folder / "monitor.parquet")

    def _warned(self, always: Callable[..., None]) -> Callable[..., None]:
        """A ``warnings.showwarning`` that prints warnings of monitor and sinks in one line, without the place."""

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, (gs.MonitorWarning, SinkWarning)):
                self.say(f"Warning: {message}")
            else:
                always(message, category, *place)

        return show
