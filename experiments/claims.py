"""A run belongs to one process at a time: lock files with an owner and a heartbeat.

A claim is the file ``<generation>.lock`` in the run's folder, made so that only one process can make it.  The claim of
an owner that is gone is not changed but topped by one of the next generation, which again only one process can make: so
two processes that find the same dead owner cannot both win.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BEAT_SECONDS = 5.0
# An owner on another machine counts as gone after so long without a beat, by this process's own clock.
PATIENCE_SECONDS = 30.0


@contextlib.contextmanager
def claimed(folder: Path, patience: float = PATIENCE_SECONDS) -> Iterator[bool]:
    """Claim a run; yields whether that succeeded, and gives it up at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _claim(folder, patience)
    if lock is None:
        yield False
        return
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
    beats.start()
    try:
        yield True
    finally:
        stop.set()
        beats.join()
        lock.unlink(missing_ok=True)


def owned(folder: Path) -> bool:
    """Whether a process holds the run that is not known to be gone."""
    newest = _newest(folder)
    return newest is not None and not _gone(newest)


def held(folder: Path, patience: float = PATIENCE_SECONDS) -> bool:
    """Whether a process holds the run, watching one on another machine for a sign of life."""
    newest = _newest(folder)
    return newest is not None and not _gone(newest) and not _silent(newest, patience)


def _claim(folder: Path, patience: float) -> Path | None:
    """The lock of this process, None where another holds the run."""
    newest = _newest(folder)
    if newest is not None and not _gone(newest) and not _silent(newest, patience):
        return None
    generation = 0 if newest is None else int(newest.stem) + 1
    lock = folder / f"{generation:06d}.lock"
    try:
        with lock.open("x") as file:
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}))
    except FileExistsError:
        return None
    for old in folder.glob("*.lock"):
        if old.stem < lock.stem:
            old.unlink(missing_ok=True)
    return lock


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("*.lock"), default=None)


def _gone(lock: Path) -> bool:
    """Whether the owner was on this machine and is no more; another process that has got its number does not count."""
    try:
        owner = json.loads(lock.read_text())
        if owner["host"] != socket.gethostname():
            return False
        return _started(owner["pid"]) != owner["started"]
    except FileNotFoundError:
        return False  # given up in this moment
    except (ValueError, KeyError):
        return _age_of_torn(lock) > 1.0  # made and not yet written, unless it stays so


def _silent(lock: Path, patience: float) -> bool:
    """Whether the owner, on another machine, does not beat any more.  Watches for so long, for clocks of two machines,
    or one that was set back, cannot be compared."""
    try:
        if json.loads(lock.read_text())["host"] == socket.gethostname():
            return False
        before, begin = lock.stat().st_mtime_ns, time.monotonic()
        while time.monotonic() - begin < patience:
            time.sleep(min(1.0, patience / 4))
            if lock.stat().st_mtime_ns != before:
                return False
    except (FileNotFoundError, ValueError, KeyError):
        return False
    return True


def _beat(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _started(pid: int) -> str | None:
    """When a process began, in words of the system; None where there is no such process."""
    try:
        state, *_, started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else started  # one that was killed and not yet waited for is gone
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _age_of_torn(lock: Path) -> float:
    """Seconds for which a lock has stood there without words."""
    begin = time.monotonic()
    while time.monotonic() - begin <= 1.0:
        time.sleep(0.05)
        with contextlib.suppress(OSError, ValueError):
            json.loads(lock.read_text())
            return 0.0
    return time.monotonic() - begin
