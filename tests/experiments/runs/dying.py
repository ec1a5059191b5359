"""Measurements that disturb the sweep that they belong to."""

import os
import signal
import time
from pathlib import Path

from hydra.core.plugins import Plugins

from gradscope.frames import observed


def kills(model, x, *, generator, number, marks):
    """Number 1 kills its process the first time, 2 every time."""
    mark = Path(marks) / str(number)
    if number == 2 or (number == 1 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return observed("number", number)


def sleeps(model, x, *, generator, number, seconds):
    """At work for so long."""
    time.sleep(seconds)
    return observed("number", number)


def counts(model, x, *, generator, number):
    """How many runs there were since Hydra was set up in this process."""
    Plugins.instance().runs = getattr(Plugins.instance(), "runs", 0) + 1
    return observed("number", Plugins.instance().runs)


def interrupts(model, x, *, generator, number):
    """Number 1 asks its process to end."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return observed("number", number)
