"""The processes of a launch, started by Hydra's launchers: one that dies does not end the sweep, none outlives it."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
from omegaconf import DictConfig, open_dict

from experiments.runs import launches

PROCESSES = "GRADSCOPE_PROCESSES"


class Interrupted(KeyboardInterrupt):
    """A signal has asked the sweep to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Workers:
    """A launcher during its sweep.  As a context it turns signals into `Interrupted` and leaves no process behind."""

    launcher: Launcher
    jobs: list[_Job] = field(default_factory=list)
    pending: int | None = None
    held: bool = False

    def launch(self, runs: Sequence[Sequence[str]], first: int) -> tuple[list[str | None], str | None]:
        """Execute runs, given by their overrides.

        Returns one line per run on an exception outside of `run_once`, and one line on a process that died; None where
        there is nothing to say.
        """
        self.jobs.clear()
        try:
            with self._jobs_noted(), warnings.catch_warnings():
                # joblib replaces a worker whose memory has grown; users need not know.
                warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
                returns = self.launcher.launch(runs, initial_job_idx=first)
        except BrokenProcessPool as error:
            return [None] * len(runs), _line(error)
        errors = [job.error for job in self.jobs] or [_raised(returned) for returned in returns]
        return errors, next((job.died for job in self.jobs if job.died is not None), None)

    def __enter__(self) -> Workers:
        self.before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)
        if raised[0] is not None:
            self._end()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        if not self.held:
            raise Interrupted(number)

    @contextlib.contextmanager
    def _jobs_noted(self) -> Iterator[None]:
        """Note the jobs that Hydra's launcher submits: they can be cancelled, and one that dies costs only its run."""
        if "submitit" not in type(self.launcher).__module__:
            yield
            return
        import submitit

        original = submitit.AutoExecutor.map_array

        def map_array(executor: Any, *arguments: Any) -> list[_Job]:
            # Ctrl-C reaches all processes of a terminal, and each of submitit's would print a traceback.  A signal now
            # would also come before the job that was just submitted is noted.
            self.held, asked = True, signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                self.jobs.extend(_Job(job) for job in original(executor, *arguments))
            finally:
                signal.signal(signal.SIGINT, asked)
                self.held = False
            if self.pending is not None:
                raise Interrupted(self.pending)
            return self.jobs

        submitit.AutoExecutor.map_array = map_array  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            submitit.AutoExecutor.map_array = original  # type: ignore[method-assign]

    def _end(self) -> None:
        """End the processes of joblib and the jobs of submitit."""
        pool = getattr(sys.modules.get("joblib.externals.loky.reusable_executor"), "_executor", None)
        if pool is not None:
            pool.shutdown(wait=False, kill_workers=True)
        for job in self.jobs:
            job.end()


class _Job:
    """A job of submitit.  Hydra's launcher would give up all jobs when one was killed and has no result."""

    def __init__(self, job: Any) -> None:
        self.job = job
        self.error: str | None = None
        self.died: str | None = None

    def results(self) -> list[JobReturn | None]:
        """The results of the job, which Hydra's launcher asks for; None instead of an exception."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            returns: list[JobReturn | None] = self.job.results()
            self.error = _raised(returns[0])
            return returns
        except FailedJobError as error:
            self.error = _line(error, last=True)
        except UncompletedJobError as error:
            self.died = _line(error)
        return [None]

    def end(self) -> None:
        """Cancel the job; on this machine, kill its process and the process of the run that it watches."""
        process = getattr(self.job, "_process", None)
        if process is None:
            with contextlib.suppress(Exception):  # it has ended, or Slurm does not answer
                self.job.cancel()
        elif process.poll() is None:
            children = _children(process.pid)
            process.kill()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def most_at_once(launcher: Launcher) -> int | None:
    """The most runs that a launcher may get together: submitit's local one would start all at once.  None: no limit."""
    kind = type(launcher)
    if kind.__module__.startswith("hydra_plugins.hydra_submitit") and kind.__name__ == "LocalLauncher":
        asked = num_processes()
        return asked if asked > 0 else os.cpu_count()
    return None


def num_processes() -> int:
    """The number in ``GRADSCOPE_PROCESSES``, which must be positive or -1 (one per core, the default)."""
    asked = os.environ.get(PROCESSES, "-1")
    if not re.fullmatch(r"-1|0*[1-9]\d*", asked):
        raise ValueError(f"{PROCESSES} must be a positive number (or -1: as many as cores), got {asked!r}.")
    return int(asked)


def _children(pid: int) -> list[int]:
    """The children of a process, where the system says; elsewhere they end by `launches.follow`."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _raised(returned: Any) -> str | None:
    """What a run has raised outside of `run_once`, in one line."""
    failed = isinstance(returned, JobReturn) and returned.status is JobStatus.FAILED
    return _line(returned._return_value) if failed else None


def _line(error: BaseException, *, last: bool = False) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[-1] if last else lines[0]


@dataclass(frozen=True)
class Setup:
    """What all runs of a launch have in common."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction

    def run(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """Execute one run as Hydra's launchers do; the result lacks the configurations, which nobody needs."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        returned = run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
        returned.cfg = returned.hydra_cfg = None
        return returned


# In a worker: the setup it got last, by its name.
_here: dict[str, Setup] = {}


def _run_in_worker(name: str, pickled: bytes, number: int, overrides: Sequence[str]) -> JobReturn:
    """Execute one run in this process, which the first run sets up."""
    if name not in _here:
        _here.clear()
        setup_globals()
        setup, state = pickle.loads(pickled)
        Singleton.set_state(state)
        _here[name] = setup
    return _here[name].run(number, overrides)


def launch(setup: Setup, options: dict[str, Any], runs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Execute runs, given by their overrides and numbered from ``first``.  ``options``: of `joblib.Parallel`."""
    from joblib import Parallel, delayed

    # Hydra's state is global, so threads cannot be used.  A worker that gets no run would outlive a killed sweep.
    options = options | {"backend": "loky", "initializer": launches.follow, "initargs": (os.getpid(),)}
    process_joblib_cfg(options)
    name, pickled = uuid4().hex, cloudpickle.dumps((setup, Singleton.get_state()))
    returns: list[JobReturn] = Parallel(**options)(
        delayed(_run_in_worker)(name, pickled, number, overrides) for number, overrides in enumerate(runs, first)
    )
    return returns
