"""How the user starts the commands of the experiments, and the folders of configurations."""

import os
import signal
import threading
import time
from functools import cache
from pathlib import Path

CONF = Path(__file__).parent.parent / "conf"
PROGRAM = "GRADSCOPE_PROGRAM"  # an environment variable, set by the command ``gradscope``
PARENT = "GRADSCOPE_PARENT"  # an environment variable of worker processes: the id of the process that starts them
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


@cache
def end_with(parent: int) -> None:
    """End this process soon after its parent, given by its id, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
