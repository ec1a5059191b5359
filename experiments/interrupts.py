"""Ctrl-C while a network trains: the first ends the run after its step, with a checkpoint; a second one at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from experiments.parallel import Ranks


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed.

    Several processes that train together stop as ever, at once: each would notice it at another step.
    """
    asked = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread() or Ranks.here().world > 1:
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, notice)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
