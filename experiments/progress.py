"""A progress bar that appears after two seconds, on a terminal only."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DELAY_SECONDS = 2.0


class LateBar:
    """A progress bar of rich that appears after two seconds, on a terminal only."""

    def __init__(self, what: str, total: float) -> None:
        self.began, self.what, self.total = time.monotonic(), what, total
        self.console = Console(stderr=True)
        self.visible = self.console.is_terminal

    @cached_property
    def progress(self) -> Progress:
        """The bar with one task.  The bar is created at its first use, because creating a bar takes time."""
        progress = Progress(
            TextColumn(self.what), BarColumn(),
            MofNCompleteColumn() if self.total > 1 else TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=self.console, transient=True,
        )  # fmt: skip
        progress.add_task(self.what, total=self.total, text="")
        return progress

    def show(self, done: float, text: str = "") -> None:
        """Show that ``done`` of ``total`` is done; ``text`` is printed after the remaining time."""
        if self.visible:
            if time.monotonic() - self.began > DELAY_SECONDS:
                self.progress.start()
            self.progress.update(self.progress.task_ids[0], completed=done, text=text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self.visible and self.progress.live.is_started:  # rich prints an empty line otherwise
            self.progress.stop()
