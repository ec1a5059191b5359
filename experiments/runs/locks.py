"""A run belongs to one process at a time: lock files with an owner and a heartbeat.

A lock is the file ``<generation>.lock`` of a run.  Its exclusive creation decides who owns the run; a lock of
the next generation overrides that of a dead owner.  An owner that was overridden although it lives (its heartbeat had
stopped) finds no lock with its random token, and `confirm` keeps it from writing a status.
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

BEAT_SECONDS = 5.0
# An owner on another machine counts as dead after this long without a heartbeat, by this process's own clock.
PATIENCE_SECONDS = 30.0
# A process that waits for a lock tries this often.
WAIT_SECONDS = 0.2
# A lock that names no owner for this long was never written: its owner died in the moment of creating it.
UNWRITTEN_SECONDS = 1.0
LOCK = re.compile(r"\d{6}\.lock")


class LostLockError(OSError):
    """This process owned a run, and another process has taken it over."""


@dataclass(frozen=True)
class _Lock:
    """A lock of this process; ``content`` holds a random token, so no two locks have the same."""

    path: Path
    content: str

    def valid(self) -> bool:
        """Whether the file is still there, has this token, and is the newest."""
        try:
            return self.path.read_text() == self.content and _newest(self.path.parent) == self.path
        except OSError:
            return False


# The locks of this process by folder, and when it first saw each lock of another machine with its present heartbeat.
_own: dict[Path, _Lock] = {}
_seen: dict[Path, tuple[int, float]] = {}


@contextlib.contextmanager
def locked(folder: Path, patience: float = PATIENCE_SECONDS, *, wait: bool = False) -> Iterator[bool]:
    """Lock a run until the end of the context; yields whether that succeeded.  ``wait``: retry until it does."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
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
    """Check that this process, if it locked the run, still owns it; else raise a `LostLockError`."""
    lock = _own.get(folder.absolute())
    if lock is not None and not lock.valid():
        raise LostLockError(
            f"Another process has taken over {folder}: this one gave no sign of life (suspended, or without its file "
            "system?), or its lock was removed. If the run does not get done, run the same command again."
        )


def held(folder: Path, now: float | None = None) -> bool:
    """Whether a living process owns the run.

    An owner on another machine is observed for a heartbeat, or with ``now``, the `clock` of the folder, judged at once
    by the age of its last one.
    """
    newest = _newest(folder)
    return newest is not None and _alive(newest, PATIENCE_SECONDS, now)


def clock(folder: Path) -> float:
    """The present time by the clock that stamps files in a folder; this machine's if it may not write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@cache
def machine() -> str:
    """Where process numbers are comparable: host name, boot, and (of a container) namespace of processes."""
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
    for old in _locks(folder):
        if old.stem < path.stem:
            old.unlink(missing_ok=True)
    return lock


def _locks(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if LOCK.fullmatch(entry.name)]
    except FileNotFoundError:
        return []


def _newest(folder: Path) -> Path | None:
    return max(_locks(folder), default=None)


def _alive(lock: Path, patience: float, now: float | None = None) -> bool:
    """Whether the owner of a lock lives.  A process with its number but another start time is not the owner."""
    try:
        owner = _owner(lock)
        if owner is None:
            return False
        if owner["machine"] == machine():
            return bool(owner["started"] == started(owner["pid"]))
        return now - lock.stat().st_mtime < patience if now is not None else _beats(lock, patience)
    except FileNotFoundError:
        # Released, or overridden by another process: in both cases it is not ours to take now.
        return True


def _owner(lock: Path) -> dict[str, Any] | None:
    """The content of a lock; None if it names no owner, even after the moment between creating and writing it."""
    begin = time.monotonic()
    while True:
        with contextlib.suppress(ValueError):
            content = json.loads(lock.read_text())
            known = isinstance(content, dict) and isinstance(content.get("pid"), int)
            if known and {"machine", "started"} <= content.keys():
                return dict(content)
        if time.monotonic() - begin > UNWRITTEN_SECONDS:
            return None
        time.sleep(UNWRITTEN_SECONDS / 20)


def _beats(lock: Path, patience: float) -> bool:
    """Whether the owner, on another machine, sends a heartbeat within ``patience`` seconds of this process's time.

    All locks of the sweep are observed together, because a dead machine may have left many.
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
        if not lock.valid():  # the file of this name may belong to another process by now
            return
        with contextlib.suppress(OSError):
            os.utime(lock.path)


def started(pid: int) -> str | None:
    """When a process of this machine started, as the system says it; None if there is no such process."""
    try:
        state, *_, began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else began  # a zombie is dead
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
