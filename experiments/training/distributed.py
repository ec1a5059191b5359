"""Training with several processes: ranks, shares of a batch, sums over all processes, errors, and Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from experiments.program import world_size
from experiments.runs import Interrupted
from gradscope.distributed import parallel

PATIENCE_SECONDS = 1.5  # after Ctrl-C, a step may take this long to end
FAILURE, FAILURE_SECONDS = "gradscope/failure", 2.0  # the key of an error, and how long it may take to arrive
STDERR = 2
NOTICE = b"\nInterrupted: ending this step and saving a checkpoint; Ctrl-C again stops at once.\n"

_stores: list[Any] = []  # that of the process group, while there is one


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


class LostProcessError(ConnectionError):
    """Another process of this training has failed or was killed."""


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[torch.device]:
    """Join the process group if ``torchrun`` started this process; yields the device to use.

    If the process fails, the others receive its error: see `together`.
    """
    if world_size() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world
    )
    _stores.append(store)
    try:
        yield device
    except (Exception, SystemExit) as error:
        if not isinstance(error, LostProcessError):
            store.set(FAILURE, f"process {rank} has failed: {type(error).__name__}: {error}")
        raise
    finally:
        _stores.clear()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wait for all processes, and then let the error of one be the error of all.

    If a process ends, the collective operations of the others fail with a message of gloo or NCCL.  Instead of this
    message, the error of the process that has failed is raised, as a `LostProcessError`.
    """
    try:
        if _stores:
            # Checkpoints are read when the first process has locked the run, and not while another launch writes them.
            torch.distributed.barrier()
        yield
    except RuntimeError as error:
        if not _stores or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        # torchrun now ends this process, too, but the run shall have a status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise LostProcessError(_failure(_stores[-1])) from error


def _failure(store: Any) -> str:
    """Which process has failed, and why.  A process that is killed cannot say so."""
    begin = time.monotonic()
    with contextlib.suppress(RuntimeError):  # the store may be lost, too
        while time.monotonic() < begin + FAILURE_SECONDS:
            if store.check([FAILURE]):
                return str(store.get(FAILURE).decode())
            time.sleep(0.1)
    return "another process of this training has ended without a message: it was killed, or memory ran out"


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
