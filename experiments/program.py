"""How the user starts the commands of the experiments, and the folders of configurations."""

import os
import signal
import socket
import sys
import threading
import time
from functools import cache
from pathlib import Path

CONF = Path(__file__).parent.parent / "conf"
PROGRAM = "GRADSCOPE_PROGRAM"  # an environment variable, set by the command ``gradscope``
PARENT = "GRADSCOPE_PARENT"  # an environment variable of worker processes: the id of the process that launched them
TORCHRUN = "TORCHELASTIC_RUN_ID"  # an environment variable of the processes that torchrun starts
WATCH_SECONDS = 1.0


def program(name: str) -> str:
    """The words that start the command ``name`` here: ``gradscope name`` or ``python -m experiments.name``."""
    return f"{os.environ.get(PROGRAM, 'python -m experiments.')}{name}"


def conf_folders() -> list[Path]:
    """The folders of configurations: the user's folder ``conf`` in the current folder first, if there is one."""
    own = Path.cwd() / "conf"
    return [own, CONF] if own.is_dir() and not own.samefile(CONF) else [CONF]


def world_size() -> int:
    """The number of processes in which ``torchrun`` has started this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_torchrun() -> None:
    """End this process, started by ``torchrun``, soon after ``torchrun`` has ended.

    If this happened before, the process has another parent by now, but nothing answers at the address of the store.
    """
    end_with(os.getppid())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
        except OSError:
            sys.exit("torchrun has ended, so this process ends, too.")


@cache
def end_with(process: int) -> None:
    """End this process soon after another process of this machine, given by its id, has ended."""
    began = started(process)

    def watch() -> None:
        while began is not None and started(process) == began:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def started(pid: int) -> str | None:
    """The start time of a process of this machine, as the system prints it; None if there is no such process."""
    try:
        state, *_, began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else began  # a zombie has ended
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
