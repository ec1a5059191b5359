"""Training with several processes: ranks, shares of a batch, sums over all processes, and handling of Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from experiments.program import world_size
from experiments.runs import Interrupted
from gradscope.distributed import parallel

PATIENCE_SECONDS = 1.5  # after Ctrl-C, a step may take this long to end
STDERR = 2
NOTICE = b"\nInterrupted: ending this step and saving a checkpoint; Ctrl-C again stops at once.\n"


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes, according to ``torch.distributed``."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The rank of this process and the number of processes; 0 and 1 if there is only one process."""
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size()) if parallel() else cls()

    @property
    def first(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """The part of a batch of ``num`` samples that this process takes."""
        if num % self.world:  # with unequal shares, the mean over ranks is not the mean over samples
            raise ValueError(
                f"train.batch_size={num} counts the samples of all processes and must be a multiple of the number of "
                f"processes, {self.world}."
            )
        part = num // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, returned on each of them.  Changes ``value`` in place."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that gradients are averaged over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[torch.device]:
    """Join the process group if ``torchrun`` started this process; yields the device to use."""
    if world_size() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def noticed(alone: bool = True) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed, or (``alone``: not in a sweep) SIGTERM received.

    A second signal raises `Interrupted`.  So does the first one if the function is not called within
    `PATIENCE_SECONDS`.  With several processes, signals act as usual, because each process would notice them at a
    different step.
    """
    asked: list[int] = []
    again = threading.Timer(PATIENCE_SECONDS, _interrupt_main)
    again.daemon = True

    def notice(number: int, frame: FrameType | None) -> None:
        Interrupted.noticed.set()
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(STDERR, NOTICE)  # printing is not safe in a signal handler
        again.start()

    def pressed() -> bool:
        if asked:
            again.cancel()
        return bool(asked)

    if threading.current_thread() is not threading.main_thread() or Ranks.here().world > 1:
        yield pressed
        return
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = [signal.signal(number, notice) for number in numbers]
    try:
        yield pressed
    except KeyboardInterrupt as error:
        raise Interrupted(asked[0] if asked else signal.SIGINT, *error.args) from error
    finally:
        again.cancel()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _interrupt_main() -> None:
    """As Ctrl-C: ends a wait of the main thread, too."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()
