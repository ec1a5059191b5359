"""The worker processes of a launch.  The sweep goes on if a worker dies, and no worker outlives the sweep."""

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
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
from omegaconf import DictConfig, open_dict

from experiments.program import PARENT
from experiments.runs import launches, slurm
from experiments.runs.signals import Interrupted

PROCESSES = "GRADSCOPE_PROCESSES"
KILLED = "killed by a signal, or out of memory"


@dataclass
class Workers:
    """Context manager: during a sweep, signals raise `Interrupted`, and no worker process outlives the sweep."""

    launcher: Launcher
    jobs: list[_Job] = field(default_factory=list)
    queue: slurm.Queue | None = None
    pending: int | None = None
    held: bool = False

    def launch(self, runs: Sequence[Sequence[str]], first: int) -> tuple[list[str | None], str | None]:
        """Execute runs, given by their overrides.

        Returns two values: a list with one entry per run (an exception outside of `run_once` as one line, or None), and
        the error of a process that died (or None).
        """
        self.jobs.clear()
        try:
            with self._jobs_noted(), warnings.catch_warnings():
                # joblib replaces a worker whose memory has grown.  This is harmless.
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
        """Record the jobs that Hydra's launcher submits, to cancel them at the end, and to go on if one dies."""
        if "submitit" not in type(self.launcher).__module__:
            yield
            return
        import submitit

        original = submitit.AutoExecutor.map_array
        params = self.launcher.params if slurm.on_slurm(self.launcher) else {}  # type: ignore[attr-defined]

        def map_array(executor: Any, *arguments: Any) -> list[_Job]:
            # The processes started here inherit that Ctrl-C is ignored; otherwise each would print a traceback.  Other
            # signals are held back until the new jobs are recorded.
            self.held, asked = True, signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                with contextlib.nullcontext() if params else _ending_with_this_process():
                    jobs = original(executor, *arguments)
                self.queue = slurm.Queue([job.job_id for job in jobs], params) if params else None
                self.jobs.extend(_Job(job, self.queue) for job in jobs)
            except submitit.core.utils.FailedJobError as error:
                reason = str(error).strip() or "sbatch failed without a message"
                requested = f", which ask for {slurm.requested(params)}" if params else ""
                raise HydraException(f"The cluster refused the jobs{requested}: {reason}") from error
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
        if self.queue is not None:
            self.queue.cancel()


class _Job:
    """A wrapper of a submitit job.  Without it, Hydra's launcher would give up all jobs if one of them was killed."""

    def __init__(self, job: Any, queue: slurm.Queue | None) -> None:
        self.job, self.queue = job, queue
        self.error: str | None = None
        self.died: str | None = None

    def results(self) -> list[JobReturn | None]:
        """The results of the job, for Hydra's launcher; ``[None]`` if the job failed or was killed."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        ended = None if self.queue is None else self.queue.wait(self.job)
        if ended is not None:
            reason, again = ended
            self.error, self.died = (None, reason) if again else (reason, None)
            return [None]
        try:
            returns: list[JobReturn | None] = self.job.results()
            self.error = _raised(returns[0])
            return returns
        except FailedJobError as error:
            self.error = _last_line(error)
        except UncompletedJobError:
            self.died = KILLED
        return [None]

    def end(self) -> None:
        """If the job runs on this machine, kill its process and the child process that executes the run."""
        process = getattr(self.job, "_process", None)
        if process is not None and process.poll() is None:
            children = _children(process.pid)
            process.kill()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def most_at_once(launcher: Launcher) -> int | None:
    """How many runs a launcher may get at a time (None: any number).  Submitit's local launcher starts all of them."""
    kind = type(launcher)
    if kind.__module__.startswith("hydra_plugins.hydra_submitit") and kind.__name__ == "LocalLauncher":
        asked = num_processes()
        return asked if asked > 0 else os.cpu_count()
    return None


def num_processes() -> int:
    """The number in ``GRADSCOPE_PROCESSES``, which must be positive or -1 (one per core, the default)."""
    asked = os.environ.get(PROCESSES, "-1")
    if not re.fullmatch(r"-1|0*[1-9]\d*", asked):
        raise ValueError(f"{PROCESSES} must be a positive number (or -1: one per core), got {asked!r}.")
    return int(asked)


@contextlib.contextmanager
def _ending_with_this_process() -> Iterator[None]:
    """Processes that begin in this context, here or in a child, end soon after this process; see `experiments`."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]


def _children(pid: int) -> list[int]:
    """The ids of a process's children; empty if the system does not list them (`launches.follow` then ends them)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _raised(returned: Any) -> str | None:
    """The exception that a run raised outside of `run_once`, in one line; None if there is none."""
    failed = isinstance(returned, JobReturn) and returned.status is JobStatus.FAILED
    return _line(returned._return_value) if failed else None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _last_line(error: BaseException) -> str:
    """The last line of the traceback that submitit quotes between two rules."""
    quoted = re.search(r"^-{10,}\n(.*?)\n+-{10,}$", str(error), re.DOTALL | re.MULTILINE)
    last = (quoted[1] if quoted else _line(error)).splitlines()[-1]
    return slurm.TIMED_OUT if "UncompletedJobError" in last else last


@dataclass(frozen=True)
class Setup:
    """What all runs of a launch have in common."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction

    def run(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """Execute one run as Hydra's launchers do.  The result has no configurations, because nobody reads them."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        returned = run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
        returned.cfg = returned.hydra_cfg = None
        return returned


# In a worker process: the last setup that the process received, by the name of the setup.
_here: dict[str, Setup] = {}


def _run_in_worker(name: str, pickled: bytes, number: int, overrides: Sequence[str]) -> JobReturn:
    """Execute one run in this worker process.  The first run of a launch sets up the process."""
    if name not in _here:
        _here.clear()
        setup_globals()
        setup, state = pickle.loads(pickled)
        Singleton.set_state(state)
        _here[name] = setup
    return _here[name].run(number, overrides)


def launch(setup: Setup, options: dict[str, Any], runs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Execute runs, given by their overrides and numbered from ``first``; ``options`` are for `joblib.Parallel`."""
    from joblib import Parallel, delayed

    # Hydra's state is global, so threads cannot be used.  If the sweep is killed, `follow` also ends idle workers, and
    # `PARENT` those that still import torch.
    options = options | {"backend": "loky", "initializer": launches.follow, "initargs": (os.getpid(),)}
    process_joblib_cfg(options)
    name, pickled = uuid4().hex, cloudpickle.dumps((setup, Singleton.get_state()))
    with _ending_with_this_process():
        returns: list[JobReturn] = Parallel(**options)(
            delayed(_run_in_worker)(name, pickled, number, overrides) for number, overrides in enumerate(runs, first)
        )
    return returns
