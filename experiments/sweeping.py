"""What happens around the runs of a ``-m`` sweep: its plan, a progress bar, and at the end what failed."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from experiments import launches, ledger
from experiments.guard import ERROR
from experiments.manifest import COMMAND, command
from experiments.progress import LateBar

POLL_SECONDS = 0.5


class Sweeping(Callback):
    """Hydra's callback of a sweep; processes that only carry out single runs have one too, which does nothing."""

    def __init__(self) -> None:
        self.launch: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers send the callback to their workers, where it has nothing to watch."""
        return {"launch": None}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note what is planned, and watch it."""
        self.sweep = Path(config.results) / config.sweep
        runs = planned(config)
        self.launch = launches.begin(self.sweep, runs)
        os.environ[COMMAND] = command()
        self.bar, self.over = LateBar("runs", len(runs)), threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say what failed; exit with 1 if anything did."""
        if self.launch is None:
            return
        self.over.set()
        self.watcher.join()
        self.bar.close()
        ended = launches.ended(self.launch)
        stopped = launches.stopped()
        launches.end()
        os.environ.pop(COMMAND, None)
        failed = [run for run in ended if run["state"] == ledger.FAILED]
        busy = sum(run["state"] == ledger.BUSY for run in ended)
        if failed or busy or stopped:
            closing(self.sweep, ended, stopped)
        if failed:
            sys.exit(1)

    def _watch(self) -> None:
        assert self.launch is not None
        while not self.over.wait(POLL_SECONDS):
            self.bar.show(len(launches.ended(self.launch)))


def planned(config: DictConfig) -> list[tuple[str, ...]]:
    """The overrides of every run, in the words in which a run has them; nothing for a sweeper that searches.

    A key of the study's own sweep that is also on the command line has been taken out of the study's before.
    """
    if not config.hydra.sweeper._target_.endswith(("BasicSweeper", "ComposedSweeper")):
        return []
    params = config.hydra.sweeper.get("params") or {}
    words = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    choices = [_values(override) for override in OverridesParser.create().parse_overrides(words)]
    return list(itertools.product(*choices))


def closing(sweep: Path, ended: list[dict[str, Any]], stopped: bool) -> None:
    """Print how the runs of a launch ended, those that failed with their last line, and how to go on."""
    counts = Counter(run["state"] for run in ended)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if counts[ledger.FAILED]:
        console.print(f"{sweep.name}: {counts[ledger.FAILED]} of {len(ended)} runs failed.", style="bold red")
        errors: dict[str, list[str]] = {}
        for run in ended:
            if run["state"] == ledger.FAILED:
                errors.setdefault(run["error"], []).append(run["run"])
        for error, names in errors.items():
            more = f" and {len(names) - 1} more" if names[1:] else ""
            console.print(f"  {error}\n    {names[0]}{more}")
        console.print(f"Tracebacks: {sweep}/*/{ERROR}.  The same command runs those again that are not done.")
    if stopped:
        console.print("on_error=stop: the runs after the first failure were not begun.")
    if counts[ledger.BUSY]:
        console.print(f"{counts[ledger.BUSY]} runs were left to another launch that works on them.")


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
