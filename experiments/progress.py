"""A progress bar for sweeps and long measurements: after two seconds, on a terminal; silent elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any, Self

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DELAY_SECONDS = 2.0


class SweepProgress(Callback):
    """Counts the runs of a ``-m`` sweep."""

    def __init__(self) -> None:
        self.bar: LateBar | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Work out how many runs the overrides and the study's own sweep make."""
        params = config.hydra.sweeper.get("params") or {}
        overrides = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
        parsed = OverridesParser.create().parse_overrides(overrides)
        self.bar = LateBar("runs", math.prod(len(list(o.sweep_iterator())) for o in parsed if o.is_sweep_override()))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """One run more."""
        if self.bar is not None:
            self.bar.advance(1)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class LateBar:
    """A rich progress bar that appears once the work has lasted two seconds; on a terminal only."""

    def __init__(self, what: str, total: float) -> None:
        self.began, self.total, self.done = time.monotonic(), total, 0.0
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn(what), BarColumn(),
            MofNCompleteColumn() if total > 1 else TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console, transient=True,
        )  # fmt: skip
        self.visible = console.is_terminal
        self.task = self.progress.add_task(what, total=total, text="")

    def advance(self, amount: float) -> None:
        """Some more is done."""
        self.show(self.done + amount)

    def show(self, done: float, text: str = "") -> None:
        """So much is done in all; ``text`` stands behind the time that is left."""
        self.done = done
        if self.visible and time.monotonic() - self.began > DELAY_SECONDS:
            self.progress.start()
        self.progress.update(self.task, completed=self.done, text=text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self.progress.live.is_started:  # rich prints an empty line otherwise
            self.progress.stop()
