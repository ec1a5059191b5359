"""Execute one run: skip it if it is done, else lock it, execute it, and record how it ended."""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.program import world_size
from experiments.runs import launches, locks, outcomes, signals, slurm
from experiments.runs.outcomes import DONE, ERROR, FAILED, RUNNING, SKIPPED, Status
from gradscope.files import written


@contextlib.contextmanager
def explained(alone: bool) -> Iterator[None]:
    """For a single run (``alone``), print user errors and signals without a traceback; see ``error.txt``.

    SIGTERM acts as Ctrl-C.  Not with several processes: one of them may wait for another that has ended.
    """
    takes = alone and threading.current_thread() is threading.main_thread() and world_size() == 1
    try:
        with signals.taken() if takes else contextlib.nullcontext():
            yield
    except KeyboardInterrupt as error:
        if not alone:
            raise
        print("Interrupted: the run is half done; the same command starts it again.", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    except Exception as error:
        notes, plain = getattr(error, "__notes__", []), isinstance(error, (ValueError, OSError, ModuleNotFoundError))
        if not alone or not (plain or notes):
            raise
        what = error.full_key if isinstance(error, OmegaConfBaseException) else "" if plain else type(error).__name__
        text = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else str(error)
        sys.exit("\n".join([f"Error: {what and f'{what}: '}{text}", *notes]))


def run_once(
    cfg: DictConfig, folder: Path, overrides: Sequence[str], work: Callable[[], float | None], *, alone: bool
) -> float | None:
    """Execute one run in its folder.  Returns the value of ``work``; if the run is already done, the stored value.

    ``status.json`` is written after ``work``, so a run without this file is half done and is executed again.  An error
    is written to ``error.txt`` with the configuration.  In a sweep, the error is not raised, and a run that another
    process has locked is skipped.  ``alone``: the run is not part of a sweep, and is executed even if it is done.

    Raises:
        OSError: The folder of a single run cannot be written.
        BlockingIOError: Another process works on this single run.
    """
    if not alone:
        launches.follow()
        if launches.stopped():
            return None
    again = alone or cfg.rerun
    if not again and (status := outcomes.finished(folder)) is not None:
        launches.note(folder, SKIPPED)
        return status.value
    _freeze_loaded_objects()
    with contextlib.ExitStack() as held:
        try:
            if folder.is_symlink():
                raise OSError(0, "it is a link, and a run writes only into a folder of its sweep")
            mine = held.enter_context(locks.locked(folder))
        except OSError as error:
            what = f"cannot write to {folder}: {error.strerror}"
            if alone:
                raise OSError(what) from error
            if cfg.on_error == "stop":
                launches.stop()
            launches.note(folder, FAILED, what)
            return None
        if not mine:
            if alone:
                raise BlockingIOError(
                    f"Another process is working on the run {folder}: wait until it ends, or follow it in its files."
                )
            launches.note(folder, RUNNING)
            return None
        if not again and (status := outcomes.finished(folder)) is not None:  # done by the last owner of the lock
            launches.note(folder, SKIPPED)
            return status.value
        return _executed(cfg, folder, tuple(overrides), work, alone)


def _executed(
    cfg: DictConfig, folder: Path, overrides: tuple[str, ...], work: Callable[[], float | None], alone: bool
) -> float | None:
    begin = time.perf_counter()
    try:
        # Remove the status of an earlier attempt, and incomplete files of an attempt that was killed.
        linked = folder.glob("checkpoints/*.pt.*.part")  # this folder may lie on another disk
        for path in (folder / outcomes.STATUS, folder / ERROR, *folder.rglob("*.part"), *linked):
            path.unlink(missing_ok=True)
        value = work()
        if value is not None and math.isnan(value):
            value = None  # a NaN would end a search such as Optuna's
        Status(DONE, overrides, outcomes.outputs(folder), time.perf_counter() - begin, value).write(folder)
    except Exception as error:
        # Submitit raises this exception when Slurm warns the job that its time ends.
        error = TimeoutError(slurm.TIMED_OUT) if type(error).__name__ == "UncompletedJobError" else error
        last = f"{type(error).__name__}: {error}".splitlines()[0]
        if cfg.on_error == "stop":
            launches.stop()
        # A run that diverged has results: its records up to the step where it diverged.
        files = outcomes.outputs(folder) if isinstance(error, FloatingPointError) else ()
        _record_failure(cfg, folder, Status(FAILED, overrides, files, time.perf_counter() - begin, None, last))
        launches.note(folder, FAILED, last)
        if alone:
            error.add_note(f"Traceback: {folder / ERROR}")
            raise
        return None
    launches.note(folder, DONE)
    return value


def _record_failure(cfg: DictConfig, folder: Path, status: Status) -> None:
    text = f"{traceback.format_exc()}\n{OmegaConf.to_yaml(cfg, resolve=True)}"
    with contextlib.suppress(OSError):  # if the disk is full, the run has no status and counts as half done
        locks.confirm(folder)  # if another process has taken over the run, write nothing
        written(folder / ERROR, lambda temporary: temporary.write_text(text))
        status.write(folder)


@cache
def _freeze_loaded_objects() -> None:
    """Exclude the objects of torch, pandas and Hydra from garbage collection; visiting them takes 0.1 s."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries warn at exit about objects that were never collected
