"""Ctrl-C and SIGTERM end a run with one sentence within two seconds, whatever torch computes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import ClassVar

NUMBERS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_SECONDS = 1.5  # Python runs no handler during one call of torch; after this time the process is ended
STDERR = 2
ENDED = (
    b"\nInterrupted within a long computation: the same command resumes from the last checkpoint, or starts again.\n"
)


class Interrupted(KeyboardInterrupt):
    """A signal has asked the run or the sweep to end.  ``noticed``: whether a handler has run since `taken` began."""

    noticed: ClassVar = threading.Event()

    def __init__(self, number: int, *text: str) -> None:
        super().__init__(*text or [signal.Signals(number).name])
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends what runs, as Ctrl-C does."""
    Interrupted.noticed.set()
    raise Interrupted(number)


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Within the context, both signals raise `Interrupted`.  Handlers set inside of it must set its ``noticed``.

    The C code of Python writes the number of a signal to a pipe at once.  A thread reads the pipe, and ends the process
    if no handler runs in time.  The files of a run are written atomically, so the last checkpoint stays intact.
    """
    here, there = os.pipe()
    os.set_blocking(there, False)

    def watch() -> None:
        while number := os.read(here, 1):
            if number[0] in NUMBERS and not Interrupted.noticed.wait(PATIENCE_SECONDS):
                os.write(STDERR, ENDED)
                os._exit(128 + number[0])
        os.close(here)

    Interrupted.noticed.clear()
    before = [signal.signal(number, interrupt) for number in NUMBERS]
    last = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        Interrupted.noticed.set()  # nothing is left to be ended
        signal.set_wakeup_fd(last)
        os.close(there)
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
