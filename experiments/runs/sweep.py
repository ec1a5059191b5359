"""One launch of a ``-m`` sweep: its plan, a progress bar, and at the end a summary of the failed runs.

Hydra turns exceptions in callbacks into warnings.  Therefore this code is called by the sweeper, not by a callback.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from experiments.program import world_size
from experiments.progress import LateBar
from experiments.runs import launches, locks, outcomes
from experiments.runs.names import words
from experiments.runs.outcomes import DONE, FAILED, HALF_DONE, MISSING, RUNNING, Outcome, print_summary
from experiments.runs.plan import Planned, place, planned
from experiments.runs.signals import Interrupted
from experiments.runs.workers import KILLED, Workers

POLL_SECONDS = 0.5
# If a process dies before any run begins, this many times in a row, the runs are not the cause.
FRUITLESS = 2


class Sweep:
    """One launch of a sweep.  ``at_once``: how many runs the launcher gets at a time (None: all of them)."""

    def __init__(self, config: DictConfig, launcher: Launcher, at_once: int | None) -> None:
        self.config, self.workers, self.at_once = config, Workers(launcher), at_once
        self.folder = place(config)
        self.launch = launches.new(self.folder, config)
        self.errors: dict[Planned, str] = {}
        self.before: dict[Planned, int] = {}
        self.num_launched = 0

    def run(self, jobs: Sequence[Sequence[str]], loader: ConfigLoader) -> None:
        """Execute runs, given by their overrides, except those that are done.

        Exits with code 1 if a run is not done at the end, or with 128 + n if signal number n ended the sweep.
        """
        if world_size() > 1:
            sys.exit("torchrun trains one network with several processes: use it for one run at a time, without -m.")
        runs = planned(jobs, self.config, loader)
        for sweep in {run.sweep for run in runs}:
            of_sweep = {run.digest: words(run.overrides) for run in runs if run.sweep == sweep}
            launches.begin(self.launch, sweep, of_sweep)
        try:
            with _bar(self.launch, len(runs)), self.workers:
                self._run_all(runs)
        except Interrupted as error:
            done = len(self._in(runs, DONE))
            name = signal.Signals(error.number).name
            print(f"{self.folder.name}: stopped by {name}; {done} of {len(runs)} runs are done, the same command "
                  "continues with the rest.", file=sys.stderr)  # fmt: skip
            sys.exit(128 + error.number)
        except Exception:
            print_summary(self.folder.name, list(self._outcomes(runs).values()), False)
            raise
        found = list(self._outcomes(runs).values())
        if any(outcome.state != DONE for outcome in found):
            print_summary(self.folder.name, found, launches.stopped(self.launch))
            sys.exit(1)
        skipped = sum(note["state"] == outcomes.SKIPPED for note in launches.ended(self.launch))
        before = f", {skipped} of them from earlier launches" if skipped else ""
        print(f"{self.folder.name}: all {len(runs)} runs are done{before}.", file=sys.stderr)

    def _run_all(self, runs: list[Planned]) -> None:
        self._run_despite_deaths(self._not_done(runs))
        elsewhere = {run: outcome.folder for run, outcome in self._outcomes(runs).items() if outcome.state == RUNNING}
        if elsewhere and not launches.stopped(self.launch):
            print(f"{self.folder.name}: waiting for {len(elsewhere)} runs of another launch.", file=sys.stderr)
            while any(locks.held(folder) for folder in elsewhere.values() if folder is not None):
                time.sleep(POLL_SECONDS)
            # The other launch may have left some of these runs unfinished.
            self._run_despite_deaths(self._in(list(elsewhere), HALF_DONE, MISSING))

    def _not_done(self, runs: list[Planned]) -> list[Planned]:
        """The runs that are not done.  Done runs are left out, because each would start a job on a cluster."""
        left = []
        for run, outcome in self._outcomes(runs).items():
            if not run.rerun and outcome.folder is not None and outcomes.is_done(outcome.folder):
                launches.note(outcome.folder, outcomes.SKIPPED, launch=self.launch)
            else:
                left.append(run)
                self.before[run] = outcome.changed
        return left

    def _run_despite_deaths(self, runs: list[Planned]) -> None:
        """Launch runs.  If a process dies, launch the remaining runs again.

        Any half-done run may be the cause, so each is launched again alone.  If its process dies again, the run failed.
        """
        left, fruitless = runs, 0
        while left and (died := self._launch(left)) is not None and not launches.stopped(self.launch):
            for run in self._in(left, HALF_DONE):
                killed = self._launch([run])
                if killed is not None and self._in([run], HALF_DONE):
                    self._mark_failed(run, killed if self.workers.jobs else KILLED)
            before, left = left, self._in(left, MISSING)
            fruitless = fruitless + 1 if len(left) == len(before) else 0
            if fruitless == FRUITLESS:
                self.errors |= dict.fromkeys(left, died)
                return

    def _launch(self, runs: list[Planned]) -> str | None:
        """Launch runs; returns the error of a process that died, or None if no process died."""
        any_died = None
        step = self.at_once or len(runs)
        for begin in range(0, len(runs), step):
            batch = runs[begin : begin + step]
            errors, died = self.workers.launch([run.overrides for run in batch], self.num_launched)
            self.num_launched += len(batch)
            failed = {run: error for run, error in zip(batch, errors, strict=True) if error is not None}
            for run in self._in(list(failed), HALF_DONE) if failed else []:
                self._mark_failed(run, failed[run])
            self.errors |= failed
            any_died = died or any_died
        return any_died

    def _mark_failed(self, run: Planned, error: str) -> None:
        """Write the status of a run whose process has ended without one."""
        folder = self._outcomes([run])[run].folder
        assert folder is not None
        with contextlib.suppress(OSError), locks.locked(folder) as mine:
            if mine:
                outcomes.Status(FAILED, run.overrides, error=error).write(folder)
                launches.note(folder, FAILED, error, launch=self.launch)

    def _in(self, runs: list[Planned], *wanted: str) -> list[Planned]:
        return [run for run, outcome in self._outcomes(runs).items() if outcome.state in wanted]

    def _outcomes(self, runs: list[Planned]) -> dict[Planned, Outcome]:
        """The outcomes of runs, read from their folders.  The file of this launch explains why a status is missing."""
        found = {
            (sweep, outcome.digest): outcome
            for sweep in {run.sweep for run in runs}
            for outcome in outcomes.states(sweep, {run.digest for run in runs})
        }
        noted = {note["run"].rpartition("-")[2]: note["error"] for note in launches.ended(self.launch)}
        result = {}
        for run in runs:
            missing = Outcome(",".join(words(run.overrides)), run.digest, MISSING)
            outcome = found.get((run.sweep, run.digest), missing)
            if run.rerun and outcome.state == DONE and outcome.changed == self.before.get(run):
                outcome = replace(outcome, state=MISSING)  # done by an earlier launch
            if run in self.errors and outcome.state != DONE:
                outcome = replace(outcome, state=FAILED, error=self.errors[run])
            elif outcome.state in (HALF_DONE, MISSING):
                outcome = replace(outcome, error=noted.get(run.digest))
            result[run] = outcome
        return result


class Sweeping(Callback):
    """Hydra's callback for sweepers of other packages, which choose runs by earlier results, so there is no plan."""

    def __init__(self) -> None:
        self.launch: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin a launch."""
        if config.hydra.sweeper._target_.endswith("ComposedSweeper"):
            return
        self.folder = Path(config.results) / config.sweep
        self.launch = launches.new(self.folder, config)
        launches.begin(self.launch, self.folder, {})
        # Hydra calls no callback after an exception in a sweeper.  Optuna's sweeper raises one if every run failed.
        atexit.register(self._close, self.launch)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print which runs failed, and exit with code 1 if there are any."""
        if self.launch is not None:
            atexit.unregister(self._close)
            if self._close(self.launch):
                sys.exit(1)

    def _close(self, launch: Path) -> bool:
        """Print which runs failed; returns whether any failed."""
        found = [
            Outcome(note["run"], "", note["state"], self.folder / note["run"], error=note["error"])
            for note in launches.ended(launch)
        ]
        if any(outcome.state in (FAILED, RUNNING) for outcome in found):
            print_summary(self.folder.name, found, launches.stopped(launch))
        return any(outcome.state == FAILED for outcome in found)


@contextlib.contextmanager
def _bar(launch: Path, num: int) -> Iterator[None]:
    """A progress bar that counts how many runs of a launch have ended."""
    bar, over = LateBar("runs", num), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            bar.show(len({note["run"] for note in launches.ended(launch)}))
            with contextlib.suppress(OSError):
                os.utime(launch)  # shows `launches.active`, here and on other machines, that this launch lives

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.close()
