"""One run: left alone where it is done, claimed, carried out, and its end written down, whatever the end is."""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.files import written
from experiments.runs import launches, locks, outcomes
from experiments.runs.launches import ON_ERROR, follow
from experiments.runs.outcomes import BUSY, DONE, ERROR, FAILED, SKIPPED, Status


@contextlib.contextmanager
def explained(alone: bool) -> Iterator[None]:
    """What a user can mend, and Ctrl-C, is told without a traceback where the run stands ``alone``; ``error.txt`` has
    that of an error."""
    try:
        yield
    except KeyboardInterrupt:
        if not alone:
            raise
        print("Interrupted: the run is half done; the same command begins it anew.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        notes, plain = getattr(error, "__notes__", []), isinstance(error, (ValueError, OSError, ModuleNotFoundError))
        if not alone or not (plain or notes):
            raise
        sys.exit("\n".join([f"Error: {'' if plain else f'{type(error).__name__}: '}{error}", *notes]))


def carry_out(
    cfg: DictConfig, folder: Path, overrides: Sequence[str], work: Callable[[], float | None], *, alone: bool
) -> float | None:
    """Carry out one run in its folder; returns what ``work`` does, or did when the run was done before.

    ``work`` writes its results into the folder; ``status.json`` is written after it, so a run without one is half done
    and is carried out again.  In a sweep an exception is written to ``error.txt`` with the configuration, and the sweep
    goes on, or with ``on_error=stop`` begins no further run; a run that another process holds is left to it.

    ``alone``: not in a sweep, so it is always carried out, and its exception is the user's.

    Raises:
        ValueError: ``on_error`` is neither.
        OSError: Alone, and the folder cannot be written.
        RuntimeError: Alone, and another process holds the run.
    """
    if cfg.on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {cfg.on_error!r}.")
    if not alone:
        follow()
        if launches.stopped():
            return None
    if not (alone or cfg.rerun) and outcomes.is_done(folder):
        return _skipped(folder)
    _keep_what_is_loaded()
    with contextlib.ExitStack() as held:
        try:
            mine = held.enter_context(locks.claimed(folder))
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
                raise RuntimeError(f"{folder} is held by another process that works on the same run; wait for it.")
            launches.note(folder, BUSY)
            return None
        if not (alone or cfg.rerun) and outcomes.is_done(folder):  # by the one that held it until now
            return _skipped(folder)
        return _worked(cfg, folder, tuple(overrides), work, alone)


def _worked(
    cfg: DictConfig, folder: Path, overrides: tuple[str, ...], work: Callable[[], float | None], alone: bool
) -> float | None:
    begin = time.perf_counter()
    try:
        # What an earlier attempt left: its status, and files that a kill kept it from finishing.
        for path in (folder / outcomes.STATUS, folder / ERROR, *folder.rglob("*.part")):
            path.unlink(missing_ok=True)
        value = work()
        if value is not None and math.isnan(value):
            value = None  # a sweeper that searches would end at a NaN
        Status(DONE, overrides, outcomes.outputs(folder), time.perf_counter() - begin, value).write(folder)
    except Exception as error:
        last = f"{type(error).__name__}: {error}".splitlines()[0]
        if cfg.on_error == "stop":
            launches.stop()
        # A run that diverged has a result: the records up to there.
        files = outcomes.outputs(folder) if isinstance(error, FloatingPointError) else ()
        _write_down(cfg, folder, Status(FAILED, overrides, files, time.perf_counter() - begin, None, last))
        launches.note(folder, FAILED, last)
        if alone:
            error.add_note(f"Traceback: {folder / ERROR}")
            raise
        return None
    launches.note(folder, DONE)
    return value


def _write_down(cfg: DictConfig, folder: Path, status: Status) -> None:
    """The traceback of what was just raised, the configuration with its seed, and the status."""
    text = f"{traceback.format_exc()}\n{OmegaConf.to_yaml(cfg, resolve=True)}"
    try:
        locks.confirm(folder)  # else both would stand beside what another process makes of the run
        written(folder / ERROR, lambda temporary: temporary.write_text(text))
        status.write(folder)
    except OSError:
        pass  # a full disk may be what went wrong; without a status the run counts as half done


@cache
def _keep_what_is_loaded() -> None:
    """Leave the objects of torch, pandas and Hydra out of garbage collections, once a process.

    A full collection takes more than 0.1 s to look at them, and is due whenever some hundred small frames were made.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries count what was never collected, and say so


def _skipped(folder: Path) -> float | None:
    status = Status.read(folder)
    launches.note(folder, SKIPPED)
    return None if status is None else status.value
