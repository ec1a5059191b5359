"""The commands of the experiments, run from the folder that holds them: inside the package, or in the clone."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "measure": "measure networks at initialization: one run, or a sweep with -m",
    "train": "train networks with the monitor attached",
    "collect": "collect the runs of a sweep into one data set",
    "figures": "draw the figures of a study or sweep",
    "status": "show the progress of a sweep",
    "rerun": "repeat a run and compare the results",
}


def place() -> Path:
    """Return the folder that holds ``experiments`` and ``conf``.

    Raises:
        FileNotFoundError: This installation has no experiments.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "_commands", package.parent):
        if (folder / "experiments" / "measure.py").is_file():
            return folder
    raise FileNotFoundError(f"The experiments are missing beside {package}; install gradscope-toolkit from its wheel.")


def use() -> None:
    """Make ``experiments`` and the user's own modules importable, here and in worker processes."""
    paths = [str(place()), str(Path.cwd())]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one of `COMMANDS`; it reads and writes files below the current folder."""
    use()
    os.environ["GRADSCOPE_PROGRAM"] = "gradscope "
    sys.argv = [f"gradscope {name}", *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
