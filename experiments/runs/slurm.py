"""The jobs of a launch on a Slurm cluster, and how they ended.

Slurm is asked by ``squeue``, because ``sacct``, which submitit asks, knows nothing on a cluster without accounting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.plugins.launcher import Launcher

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
REQUESTED = ("partition", "cpus_per_task", "mem_gb", "gpus_per_node", "timeout_min")
QUESTION = ("squeue", "--me", "--all", "--array", "--noheader", "--states=all", "--format=%i|%T|%r")
# Between two questions.  The interval grows as long as nothing changes.
SHORTEST_SECONDS, LONGEST_SECONDS, FACTOR = 2.0, 30.0, 1.5
# After the end of a job, its result may need this long to arrive through a network file system.
SETTLING_SECONDS = 15.0
ANSWER_SECONDS = 60.0
# Slurm sends the warning signal up to this many seconds too early.
EARLY_SECONDS = 60
GONE = "GONE"
DIED = {"BOOT_FAIL", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED = DIED | {"CANCELLED", "DEADLINE", "REVOKED", "TIMEOUT", GONE}
# Why a pending job will never start.
NEVER = {"BadConstraints", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit"}
# Why a pending job waits, as far as nobody needs to be told.
USUAL = {"BeginTime", "Cleaning", "JobArrayTaskLimit", "None", "Priority", "Prolog", "Resources"}
TIMED_OUT = "the job reached its time limit (hydra.launcher.timeout_min)"


def on_slurm(launcher: Launcher) -> bool:
    """Whether a launcher is the one of submitit that submits to Slurm."""
    return type(launcher).__name__ == "SlurmLauncher"


def check(launcher: Launcher) -> None:
    """Raise a ValueError if the commands of Slurm are missing, or the time limit is shorter than the warning before it.

    A warning that arrives while Python still starts would kill the process.
    """
    if not on_slurm(launcher):
        return
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"launcher=slurm needs a machine of a Slurm cluster, but these commands are not found: "
            f"{', '.join(missing)}. Without a cluster, use launcher=processes."
        )
    minutes, delay = launcher.params["timeout_min"], launcher.params["signal_delay_s"]  # type: ignore[attr-defined]
    if delay and 60 * minutes <= delay + EARLY_SECONDS:
        raise ValueError(
            f"hydra.launcher.timeout_min={minutes} is too short: Slurm warns a job hydra.launcher.signal_delay_s="
            f"{delay} seconds before its end, and up to {EARLY_SECONDS} s earlier. Set timeout_min to at least "
            f"{(delay + EARLY_SECONDS) // 60 + 1}, or signal_delay_s=0 for no warning."
        )


def requested(params: Mapping[str, Any]) -> str:
    """What a launch asks of the cluster for each job."""
    return ", ".join(f"{name}={params[name]}" for name in REQUESTED if params.get(name) is not None)


def cancel(ids: Sequence[str]) -> None:
    """End jobs or arrays at once, given by their ids."""
    if ids:
        _answer("scancel", "--signal=KILL", *ids)


@dataclass
class Queue:
    """What Slurm says about jobs, given by their ids; ``params`` are those of Hydra's launcher."""

    ids: Sequence[str]
    params: Mapping[str, Any]
    ended: dict[str, tuple[float, str]] = field(default_factory=dict)
    jobs: dict[str, tuple[str, str]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    interval: float = SHORTEST_SECONDS
    asked: float = float("-inf")
    answered: float = float("-inf")

    def wait(self, job: Any) -> tuple[str, bool] | None:
        """Wait until a job of submitit has ended.

        Returns None if there is a result.  Otherwise returns why not, and whether the same job may succeed if it is
        submitted again.
        """
        while not all(_arrived(job.task(number).paths) for number in range(job.num_tasks)):
            self._ask()
            since, state = self.ended.get(job.job_id, (float("inf"), ""))
            if self.answered - since > SETTLING_SECONDS:
                if state in NEVER:
                    cancel([job.job_id])
                return self._why(_array(job.job_id), state), state in DIED
            time.sleep(1)
        return None

    def cancel(self) -> None:
        """End all jobs at once."""
        cancel(sorted({_array(job) for job in self.ids}))

    def _ask(self) -> None:
        if time.monotonic() - self.asked < self.interval:
            return
        self.asked = time.monotonic()
        answer = _answer(*QUESTION)
        if answer is None:
            self._tell("Slurm does not answer (squeue); the launch waits for the results of its jobs.")
            return
        self.answered = time.monotonic()
        lines = [line.split("|", 2) for line in answer.splitlines()]
        before, self.jobs = self.jobs, {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
        self.jobs = {job: self.jobs.get(job, (GONE, "")) for job in self.ids}
        self.interval = SHORTEST_SECONDS if self.jobs != before else min(FACTOR * self.interval, LONGEST_SECONDS)
        for job, (state, reason) in self.jobs.items():
            how = reason if state == "PENDING" and reason in NEVER else state
            if how in ENDED | NEVER:
                since, known = self.ended.get(job, (self.answered, how))
                self.ended[job] = since, known if how == GONE else how  # Slurm forgets a job some time after its end
            else:
                self.ended.pop(job, None)  # the job has been requeued
            if state == "PENDING" and reason not in USUAL | NEVER:
                self._tell(f"Slurm holds job {_array(job)} back: {reason.rstrip('.')}. Ctrl-C cancels it.")

    def _tell(self, sentence: str) -> None:
        if sentence not in self.told:
            self.told.add(sentence)
            print(sentence, file=sys.stderr)

    def _why(self, job: str, state: str) -> str:
        if state == "TIMEOUT":
            return f"TimeoutError: {TIMED_OUT[:-1]}={self.params['timeout_min']})"
        if state in NEVER:
            return f"Slurm cannot start job {job} ({state}), which asks for {requested(self.params)}"
        if state == GONE:
            return f"Slurm no longer knows job {job}, which left no result: it was cancelled before it began, or purged"
        if state in DIED:
            return f"Slurm job {job} ended without a result ({state}); it asked for {requested(self.params)}"
        return f"Slurm job {job} was cancelled{'' if state == 'CANCELLED' else f' ({state})'}"


def _array(job: str) -> str:
    return job.split("_")[0]


def _arrived(paths: Any) -> bool:
    try:
        os.scandir(paths.folder).close()  # a network file system then looks for new files
    except OSError:
        return False
    return bool(paths.result_pickle.exists())


def _answer(*command: str) -> str | None:
    """What a command of Slurm prints; None if it fails."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout
