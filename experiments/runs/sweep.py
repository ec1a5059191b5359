"""What happens around the runs of a ``-m`` sweep: its plan, a progress bar, and at the end what failed.

How a run ended is read from its folder.  Hydra turns what its callbacks raise into warnings, so all of this happens in
the sweeper; sweepers of others, which search, have the callback `Sweeping`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from experiments.progress import LateBar
from experiments.runs import launches, locks, names
from experiments.runs import outcomes as run_outcomes
from experiments.runs.manifest import COMMAND, command
from experiments.runs.names import words
from experiments.runs.outcomes import BUSY, DONE, FAILED, MISSING, SKIPPED, TORN, Outcome, Status, closing
from experiments.runs.plan import Planned, place, planned
from experiments.runs.workers import Interrupted, Launching

POLL_SECONDS = 0.5
KILLED = "killed: by a signal, or out of memory"
# Launches in a row whose processes died before they began a run; then it is not the runs that they die of.
FRUITLESS = 2


class Sweep:
    """One launch of a sweep.  ``at_once``: most runs that are given to the launcher together; None: all."""

    def __init__(self, config: DictConfig, launcher: Launcher, at_once: int | None) -> None:
        self.config, self.launching, self.at_once = config, Launching(launcher), at_once
        self.folder = place(config)
        self.launch = launches.new(self.folder)
        self.errors: dict[Planned, str] = {}
        self.before: dict[Planned, tuple[int, int] | None] = {}
        self.num_launched = 0
        _name_command()
        launches.hand_over(config, self.launch)

    def carry_out(self, jobs: Sequence[Sequence[str]], loader: ConfigLoader) -> None:
        """Carry out all runs, given by their overrides, that are not done.

        Raises:
            ConfigCompositionException: A run's configuration cannot be composed.
            SystemExit: Not every run is done in the end (1); a signal asked to end (128 and its number); several
                processes carry out the same sweep, there are no runs, a name or ``on_error`` is wrong, or nothing can
                be written.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.exit("torchrun trains one network with several processes; give it one run at a time, without -m.")
        runs = planned(jobs, self.config, loader)
        try:
            for sweep in {run.sweep for run in runs}:
                of_sweep = {run.digest: words(run.overrides) for run in runs if run.sweep == sweep}
                launches.begin(self.launch, sweep, of_sweep)
        except OSError as error:
            sys.exit(f"cannot write to {self.folder}: {error.strerror}")
        try:
            with _bar(self.launch, len(runs)), self.launching:
                self._all(runs)
        except Interrupted as error:
            done = sum(outcome.state == DONE for outcome in self._look(runs).values())
            print(f"{self.folder.name}: stopped by {error}; {done} of {len(runs)} runs are done, the same command goes "
                  "on with the rest.", file=sys.stderr)  # fmt: skip
            sys.exit(128 + error.number)
        except Exception:
            closing(self.folder, list(self._look(runs).values()), False)
            raise
        outcomes = list(self._look(runs).values())
        if any(outcome.state != DONE for outcome in outcomes):
            closing(self.folder, outcomes, launches.stopped(self.launch))
            sys.exit(1)
        skipped = sum(note["state"] == SKIPPED for note in launches.ended(self.launch))
        before = f", {skipped} of them from before" if skipped else ""
        print(f"{self.folder.name}: all {len(runs)} runs are done{before}.", file=sys.stderr)

    def _all(self, runs: list[Planned]) -> None:
        self._survived(self._not_done(runs))
        busy = self._in(runs, BUSY)
        if busy and not launches.stopped(self.launch):
            folders = [outcome.folder for run, outcome in self._look(busy).items() if outcome.folder is not None]
            if any(locks.held(folder) for folder in folders):
                print(f"{self.folder.name}: waiting for {len(busy)} runs of another launch.", file=sys.stderr)
            while any(locks.held(folder) for folder in folders):
                time.sleep(POLL_SECONDS)
            # What the other one left half done.
            self._survived(self._in(busy, TORN, MISSING))

    def _not_done(self, runs: list[Planned]) -> list[Planned]:
        """Those that are not done, noting those that are: a cluster need not start a job to see it."""
        left = []
        for run, outcome in self._look(runs).items():
            if not run.rerun and outcome.folder is not None and run_outcomes.is_done(outcome.folder):
                launches.note(outcome.folder, SKIPPED, launch=self.launch)
            else:
                left.append(run)
                self.before[run] = _identity(outcome.folder)
        return left

    def _survived(self, runs: list[Planned]) -> None:
        """Launch runs; after the death of a process those that it has left.

        With one of its processes joblib gives up all, so each of the half-done runs might have been the cause, and is
        launched once more, alone: what kills its process then has failed.
        """
        left, fruitless = runs, 0
        while left and (died := self._launched(left)) is not None and not launches.stopped(self.launch):
            for run in self._in(left, TORN):
                if self._launched([run]) is not None and self._in([run], TORN):
                    self._killed(run)
            before, left = left, self._in(left, MISSING)
            fruitless = fruitless + 1 if len(left) == len(before) else 0
            if fruitless == FRUITLESS:
                self.errors |= dict.fromkeys(left, died)
                return

    def _launched(self, runs: list[Planned]) -> str | None:
        """What is known of processes that died, None where none did."""
        any_died = None
        step = self.at_once or len(runs)
        for begin in range(0, len(runs), step):
            batch = runs[begin : begin + step]
            errors, died = self.launching.launch([run.overrides for run in batch], self.num_launched)
            self.num_launched += len(batch)
            self.errors |= {run: error for run, error in zip(batch, errors, strict=True) if error is not None}
            any_died = died or any_died
        return any_died

    def _killed(self, run: Planned) -> None:
        """Write down that a run kills its process."""
        folder = self._look([run])[run].folder
        assert folder is not None
        with contextlib.suppress(OSError), locks.claimed(folder) as mine:
            if mine:
                Status(FAILED, run.overrides, error=KILLED).write(folder)
                launches.note(folder, FAILED, KILLED, launch=self.launch)

    def _in(self, runs: list[Planned], *states: str) -> list[Planned]:
        return [run for run, outcome in self._look(runs).items() if outcome.state in states]

    def _look(self, runs: list[Planned]) -> dict[Planned, Outcome]:
        """What has become of runs, by their folders; notes only give words to what has no status."""
        known = {sweep: names.digests(sweep) for sweep in {run.sweep for run in runs}}
        noted = {note["run"].rpartition("-")[2]: note["error"] for note in launches.ended(self.launch)}
        outcomes = {}
        for run in runs:
            folder = names.of_digest(known[run.sweep], run.digest)
            outcome = _ended(run, folder)
            state, error = outcome.state, outcome.error
            if run.rerun and state == DONE and _identity(folder) == self.before.get(run):
                state = MISSING  # what is done is so from before
            if run in self.errors:
                state, error = FAILED, self.errors[run]
            elif state in (TORN, MISSING):
                error = noted.get(run.digest)
            outcomes[run] = Outcome(outcome.name, folder, state, error)
        return outcomes


class Sweeping(Callback):
    """Hydra's callback of a sweep, for sweepers of others: they search, so what they set out to do is not known."""

    def __init__(self) -> None:
        self.launch: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin a launch.

        Raises:
            SystemExit: Nothing can be written.
        """
        if config.hydra.sweeper._target_.endswith("ComposedSweeper"):
            return
        self.folder = Path(config.results) / config.sweep
        self.launch = launches.new(self.folder)
        _name_command()
        launches.hand_over(config, self.launch)
        try:
            launches.begin(self.launch, self.folder, {})
        except OSError as error:
            sys.exit(f"cannot write to {self.folder}: {error.strerror}")
        # A sweeper that raises, as that of Optuna where no run succeeded, is not called back.
        atexit.register(self._closed, self.launch)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say what failed.

        Raises:
            SystemExit: A run failed.
        """
        if self.launch is None:
            return
        atexit.unregister(self._closed)
        if self._closed(self.launch):
            sys.exit(1)

    def _closed(self, launch: Path) -> bool:
        """Print what failed; returns whether anything did."""
        notes = launches.ended(launch)
        outcomes = [Outcome(note["run"], self.folder / note["run"], note["state"], note["error"]) for note in notes]
        if any(outcome.state in (FAILED, BUSY) for outcome in outcomes):
            closing(self.folder, outcomes, launches.stopped(launch))
        return any(outcome.state == FAILED for outcome in outcomes)


def _name_command() -> None:
    """Tell the manifests of all runs, in whatever process, how the sweep was begun."""
    os.environ.pop(COMMAND, None)
    os.environ[COMMAND] = command()


def _identity(folder: Path | None) -> tuple[int, int] | None:
    """What tells one status of a run from the next: it is renamed into its place."""
    try:
        status = (folder / run_outcomes.STATUS).stat() if folder is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_ino, status.st_mtime_ns)


def _ended(run: Planned, folder: Path | None) -> Outcome:
    if folder is None:
        return Outcome(f"{','.join(words(run.overrides))}", None, MISSING)
    status = Status.read(folder)
    if status is not None and status.state == DONE:
        return Outcome(folder.name, folder, DONE)
    if locks.owned(folder):
        return Outcome(folder.name, folder, BUSY)
    return Outcome(folder.name, folder, TORN) if status is None else Outcome(folder.name, folder, FAILED, status.error)


@contextlib.contextmanager
def _bar(launch: Path, num: int) -> Iterator[None]:
    """A progress bar over the runs of a launch that came to their end."""
    bar, over = LateBar("runs", num), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            bar.show(len({note["run"] for note in launches.ended(launch)}))
            with contextlib.suppress(OSError):
                os.utime(launch)  # a sign of life, for those who watch from another machine

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        bar.close()
