"""A progress bar for sweeps, training and long measurements: after two seconds, on a terminal; silent elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DELAY_SECONDS = 2.0


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
