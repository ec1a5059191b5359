"""Lock files with an owner and a heartbeat: a run belongs to at most one process at a time.

A lock is a file ``<generation>.lock`` in the folder of a run; the process that creates the file owns the run.  If the
owner is dead, another process takes over the run with a lock of the next generation.  A living owner whose
heartbeat has stopped can lose a run, too.  `confirm` notices the loss and keeps this owner from writing a status.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.program import started
from gradscope.files import make_folder, parse_json, read_text

BEAT_SECONDS = 5.0
# An owner on another machine counts as dead after this many seconds without a heartbeat.
PATIENCE_SECONDS = 30.0
# A process that waits for a lock tries again after this many seconds.
WAIT_SECONDS = 0.2
# If a lock names no owner for this long, its owner died between creating the file and writing into it.
UNWRITTEN_SECONDS = 1.0
MOST_BYTES, MOST_PID = 10_000, 1 << 31  # of a lock; a process has a smaller number
LOCK = re.compile(r"\d{6}\.lock")


class LostLockError(OSError):
    """This process owned a run, and another process has taken over the run."""


@dataclass(frozen=True)
class _Lock:
    """A lock of this process.  ``content`` holds a random token, so no two locks have equal contents."""

    path: Path
    content: str

    def valid(self) -> bool:
        """Whether the file still exists, has this content, and is the newest lock of the run."""
        try:
            return self.path.read_text() == self.content and _newest(self.path.parent) == self.path
        except OSError:
            return False


_own: dict[Path, _Lock] = {}  # the locks of this process, by folder
# The last heartbeat of each lock that this process observes, and when this process first saw that heartbeat.
_seen: dict[Path, tuple[int, float]] = {}


@contextlib.contextmanager
def locked(folder: Path, patience: float = PATIENCE_SECONDS, *, wait: bool = False) -> Iterator[bool]:
    """Lock a run within a ``with`` block; yields whether locking succeeded.  ``wait``: retry until it succeeds."""
    folder = folder.absolute()
    make_folder(folder)
    while (lock := _acquire(folder, patience)) is None and wait:
        time.sleep(WAIT_SECONDS)
    if lock is None:
        yield False
        return
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
    beats.start()
    _own[folder] = lock
    try:
        yield True
    finally:
        stop.set()
        beats.join()
        del _own[folder]
        if lock.valid():
            lock.path.unlink(missing_ok=True)


def confirm(folder: Path) -> None:
    """Raise a `LostLockError` if this process has locked the run, but no longer owns the run."""
    lock = _own.get(folder.absolute())
    if lock is not None and not lock.valid():
        raise LostLockError(
            f"Another process has taken over the run {folder}: this process sent no heartbeat (it was suspended, or "
            "the disk was gone), or its lock was removed. If no other process finishes it, repeat the command."
        )


def held(folder: Path, now: float | None = None) -> bool:
    """Whether a living process owns the run.

    For an owner on another machine, wait for the next heartbeat.  With ``now`` (the time of `clock`) there is no wait:
    the age of the last heartbeat decides.
    """
    newest = _newest(folder)
    return newest is not None and _alive(newest, PATIENCE_SECONDS, now)


def clock(folder: Path) -> float:
    """The current time of the clock that stamps files in a folder; this machine's clock if the folder is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@cache
def machine() -> str:
    """Host name, boot id and process namespace (of a container).  If all agree, process ids can be compared."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


def _acquire(folder: Path, patience: float) -> _Lock | None:
    """A new lock of this process; None if another process owns the run."""
    newest = _newest(folder)
    if newest is not None and _alive(newest, patience):
        return None
    path = folder / f"{0 if newest is None else int(newest.stem) + 1:06d}.lock"
    owner = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid()), "token": uuid.uuid4().hex}
    lock = _Lock(path, json.dumps(owner))
    try:
        with path.open("x") as file:
            file.write(lock.content)
    except FileExistsError:
        return None
    except OSError as error:  # the disk is full; a lock without an owner would make others wait
        path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror} (the lock {path} cannot be written)") from error
    for old in _locks(folder):
        if old.stem < path.stem:
            with contextlib.suppress(OSError):  # removed meanwhile, or a folder that no process of ours has made
                old.unlink()
    return lock


def _locks(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if LOCK.fullmatch(entry.name)]
    except (FileNotFoundError, PermissionError):
        return []


def _newest(folder: Path) -> Path | None:
    return max(_locks(folder), default=None)


def _alive(lock: Path, patience: float, now: float | None = None) -> bool:
    """Whether the owner of a lock lives.  A process with the owner's id but another start time is not the owner."""
    try:
        owner = _owner(lock)
        if owner is None:
            return False
        if owner["machine"] == machine():
            return bool(owner["started"] == started(owner["pid"]))
        return now - lock.stat().st_mtime < patience if now is not None else _beats(lock, patience)
    except FileNotFoundError:
        # The owner released the lock, or another process took it over.  In both cases, do not take the run now.
        return True


def _owner(lock: Path) -> dict[str, Any] | None:
    """The content of a lock; None if the lock still names no owner after `UNWRITTEN_SECONDS`.

    A lock that cannot be read, of another user or on a failing disk, counts as that of another machine.
    """
    begin = time.monotonic()
    while True:
        with contextlib.suppress(ValueError):
            try:
                content = parse_json(read_text(lock, MOST_BYTES))
            except FileNotFoundError:
                raise
            except OSError:
                return {"machine": None}
            known = isinstance(content, dict) and isinstance(content.get("pid"), int) and 0 < content["pid"] < MOST_PID
            if known and {"machine", "started"} <= content.keys():
                return dict(content)
        if time.monotonic() - begin > UNWRITTEN_SECONDS:
            return None
        time.sleep(UNWRITTEN_SECONDS / 20)


def _beats(lock: Path, patience: float) -> bool:
    """Whether an owner on another machine sends a heartbeat within ``patience`` seconds of this process's clock.

    All locks of the sweep are observed at the same time, because a dead machine may have left many of them.
    """
    for other in lock.parent.parent.glob("*/*.lock"):
        with contextlib.suppress(FileNotFoundError):
            beat = other.stat().st_mtime_ns
            if _seen.get(other, (None,))[0] != beat:
                _seen[other] = beat, time.monotonic()
    beat, since = _seen.get(lock) or (lock.stat().st_mtime_ns, time.monotonic())
    while time.monotonic() - since < patience:
        time.sleep(min(1.0, patience / 4))
        if lock.stat().st_mtime_ns != beat:
            return True
    return False


def _beat(lock: _Lock, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        if not lock.valid():  # by now, the file of this name may belong to another process
            return
        with contextlib.suppress(OSError):
            os.utime(lock.path)
