"""A run belongs to one process at a time: lock files with an owner and a heartbeat.

A claim is the file ``<generation>.lock`` in the run's folder, made so that only one process can make it.  The claim of
an owner that is gone is not changed but topped by one of the next generation, which again only one process can make: so
two processes that find the same dead owner cannot both win.  An owner that was topped though it lives (it could not
beat) finds that out, and `confirm` keeps it from saying that the run is done.
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
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0
# An owner on another machine counts as gone after so long without a beat, by this process's own clock.
PATIENCE_SECONDS = 30.0
# How often one that waits for a claim asks for it.
WAIT_SECONDS = 0.2
LOCK = re.compile(r"\d{6}\.lock")


class LostClaimError(OSError):
    """This process held a run, and holds it no more."""


@dataclass(frozen=True)
class _Claim:
    lock: Path
    words: str  # as in the file; no two claims have the same

    def stands(self) -> bool:
        """Whether the lock is still there, is this one, and is not topped."""
        try:
            return self.lock.read_text() == self.words and _newest(self.lock.parent) == self.lock
        except OSError:
            return False


# The claims of this process by folder, and when it first saw a lock of another machine as it is now.
_held: dict[Path, _Claim] = {}
_seen: dict[Path, tuple[int, float]] = {}


@contextlib.contextmanager
def claimed(folder: Path, patience: float = PATIENCE_SECONDS, *, wait: bool = False) -> Iterator[bool]:
    """Claim a run; yields whether that succeeded, and gives it up at the end.  ``wait``: until it does."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    claim = _claim(folder, patience)
    while claim is None and wait:
        time.sleep(WAIT_SECONDS)
        claim = _claim(folder, patience)
    if claim is None:
        yield False
        return
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(claim, stop), daemon=True)
    beats.start()
    _held[folder] = claim
    try:
        yield True
    finally:
        stop.set()
        beats.join()
        del _held[folder]
        if claim.stands():
            claim.lock.unlink(missing_ok=True)


def confirm(folder: Path) -> None:
    """See that this process, if it claimed the run, still holds it.

    Raises:
        LostClaimError: It does not.
    """
    claim = _held.get(folder.absolute())
    if claim is not None and not claim.stands():
        raise LostClaimError(
            f"{folder} was lost to another process, which found no sign of life of this one (suspended, or without "
            "its file system?), or somebody removed the lock; the run is left to it, or to the same command again."
        )


def owned(folder: Path, now: float | None = None) -> bool:
    """Whether a process holds the run that is not known to be gone; ``now`` is the folder's `clock`."""
    try:
        newest = _newest(folder)
        if newest is None or _gone(newest):
            return False
        if not _elsewhere(newest):
            return True
        return (clock(folder) if now is None else now) - newest.stat().st_mtime < PATIENCE_SECONDS
    except FileNotFoundError:
        return False  # given up in this moment


def clock(folder: Path) -> float:
    """The time now by the clock that times of files in a folder are of; this machine's where it may not write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def held(folder: Path, patience: float = PATIENCE_SECONDS) -> bool:
    """Whether a process holds the run, watching one on another machine for a sign of life."""
    try:
        newest = _newest(folder)
        return newest is not None and not _gone(newest) and not _silent(newest, patience)
    except FileNotFoundError:
        return False  # given up in this moment


def _claim(folder: Path, patience: float) -> _Claim | None:
    """The claim of this process, None where another holds the run."""
    newest = _newest(folder)
    if newest is not None and not _gone(newest) and not _silent(newest, patience):
        return None
    lock = folder / f"{0 if newest is None else int(newest.stem) + 1:06d}.lock"
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "id": uuid.uuid4().hex}
    claim = _Claim(lock, json.dumps(owner))
    try:
        with lock.open("x") as file:
            file.write(claim.words)
    except FileExistsError:
        return None
    for old in _locks(folder):
        if old.stem < lock.stem:
            old.unlink(missing_ok=True)
    return claim


def _locks(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in os.scandir(folder) if LOCK.fullmatch(entry.name)]


def _newest(folder: Path) -> Path | None:
    return max(_locks(folder), default=None)


def _owner(lock: Path) -> dict[str, Any] | None:
    """What a lock says; None where it says nothing of its owner, for it is not yet written, or of another make."""
    try:
        content = json.loads(lock.read_text())
    except ValueError:
        return None
    known = isinstance(content, dict) and isinstance(content.get("pid"), int) and {"host", "started"} <= content.keys()
    return content if known else None


def _elsewhere(lock: Path) -> bool:
    owner = _owner(lock)
    return owner is not None and owner["host"] != socket.gethostname()


def _gone(lock: Path) -> bool:
    """Whether the owner was on this machine and is no more; another process that has got its number does not count."""
    try:
        owner = _owner(lock)
        if owner is None:
            return _stays_torn(lock)  # made and not yet written, unless it stays so
    except FileNotFoundError:
        return False  # given up in this moment
    return owner["host"] == socket.gethostname() and started(owner["pid"]) != owner["started"]


def _silent(lock: Path, patience: float) -> bool:
    """Whether the owner, on another machine, does not beat any more.  Watches for so long, for clocks of two machines,
    or one that was set back, cannot be compared; all runs of the sweep together, for a machine that is gone has left
    many locks."""
    try:
        if not _elsewhere(lock):
            return False
        if _seen.get(lock, (None,))[0] != lock.stat().st_mtime_ns:
            _note(lock.parent.parent)
        noted, since = _seen[lock]
        while time.monotonic() - since < patience:
            time.sleep(min(1.0, patience / 4))
            if lock.stat().st_mtime_ns != noted:
                return False
    except (FileNotFoundError, KeyError):
        return False  # given up meanwhile
    return True


def _note(sweep: Path) -> None:
    """Note the last beat of every lock of a sweep, and since when it is the last."""
    now = time.monotonic()
    for lock in sweep.glob("*/*.lock"):
        with contextlib.suppress(FileNotFoundError):
            beat = lock.stat().st_mtime_ns
            if lock not in _seen or _seen[lock][0] != beat:
                _seen[lock] = beat, now


def _beat(claim: _Claim, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        if not claim.stands():  # a lock of that name may be another's by now
            return
        with contextlib.suppress(OSError):
            os.utime(claim.lock)


def started(pid: int) -> str | None:
    """When a process of this machine began, in words of the system; None where there is no such process."""
    try:
        state, *_, began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else began  # one that was killed and not yet waited for is gone
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def alive_since(pid: int, moment: float) -> bool:
    """Whether a process of this machine is alive that was so at a moment, in seconds of its clock."""
    began = started(pid)
    if began is None:
        return False
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + int(began) / os.sysconf("SC_CLK_TCK") <= moment + 1.0
    except (OSError, ValueError):
        return True  # a system that does not tell when it began


def _stays_torn(lock: Path) -> bool:
    """Whether a lock says nothing of its owner for a second.

    Raises:
        FileNotFoundError: It was given up meanwhile.
    """
    begin = time.monotonic()
    while time.monotonic() - begin <= 1.0:
        time.sleep(0.05)
        if _owner(lock) is not None:
            return False
    return True
