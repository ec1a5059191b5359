"""Measurements that disturb the sweep that they belong to, and a network that disturbs its training."""

import os
import signal
import time
from pathlib import Path

import pandas as pd
import torch
from hydra.core.plugins import Plugins

import gradscope as gs
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


def counts(model, x, *, generator):
    """The coefficients, and how many runs there were since Hydra was set up in this process."""
    Plugins.instance().runs = getattr(Plugins.instance(), "runs", 0) + 1
    coefficients = gs.gsc(model, x, probes=2, generator=generator).to_frame()
    return pd.concat([coefficients, observed("number", Plugins.instance().runs)], ignore_index=True)


def interrupts(model, x, *, generator, number):
    """Number 1 asks its process to end."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return observed("number", number)


def warned(model, x, *, generator, number):
    """Number 1 is warned by Slurm that its time ends, as submitit passes it on."""
    from submitit.core.utils import UncompletedJobError

    if number == 1:
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")
    return observed("number", number)


def fails():
    """Not a measurement: a function that submitit submits."""
    raise ValueError("the last line")


class Network(torch.nn.Linear):
    """In the process with number ``rank``: raises an error in the step after ``steps``, or is killed."""

    def __init__(self, rank, steps, kills=False):
        super().__init__(3072, 10)
        self.left, self.kills = steps if int(os.environ["RANK"]) == rank else -1, kills

    def forward(self, x):
        if self.training and self.left == 0:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the reason")
        self.left -= self.training
        return super().forward(x.flatten(1))
