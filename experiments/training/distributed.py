"""Several processes that train one network: which one is this, its share of a batch, and sums over all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This process is number ``rank`` of ``world``; alone: 0 of 1."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """What ``torch.distributed`` says."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """This process's equal share of the samples of a batch.

        Raises:
            ValueError: They cannot be shared equally, so that a mean over ranks would not be one over samples.
        """
        if num % self.world:
            raise ValueError(
                f"train.batch_size={num} is that of all processes together and must be a multiple of their number, "
                f"{self.world}."
            )
        part = num // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


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
