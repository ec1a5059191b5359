"""Launch sweeps on a real Slurm cluster, disturb them, and check how each launch ends.

    SLURM_CONF=... python -m benchmarks.slurm [--only NAME ...] [--output FOLDER]

The cluster must exist, and consist of one idle node of your own, because the campaign drains this node and sets it
down.  A scenario fails if its launch returns another exit code than expected, or does not print the expected words.  It
also fails if a run is lost or done twice, or if a job is left in the queue.  Nothing depends on the speed of the
machine, except that a launch without an end counts as failed after 15 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from benchmarks.tables.provenance import manifest
from experiments import runs
from experiments.runs import slurm
from gradscope.frames import observed

OUTPUT = Path("results/benchmarks")
PATIENCE_SECONDS = 900.0
SMALL = ("model.depth=5", "model.width=8", "data.batch_size=8", "hydra.launcher.mem_gb=1")


def waits(
    model: torch.nn.Module, x: torch.Tensor, *, generator: torch.Generator, number: int, folder: str, kills: int = -1
) -> pd.DataFrame:
    """A measurement that waits for the file ``go`` in a folder, and notes there when it begins and when it ends.

    The number ``kills`` kills its own process instead.
    """
    _note(folder, "begun", number)
    if number == kills:
        os.kill(os.getpid(), signal.SIGKILL)
    while not (Path(folder) / "go").exists():
        time.sleep(0.1)
    _note(folder, "ended", number)
    return observed("number", number)


def _note(folder: str, what: str, number: int) -> None:
    with (Path(folder) / what).open("a") as file:
        file.write(f"{number}\n")


def asked(*command: str) -> str:
    """What a command of Slurm prints; raises a RuntimeError with its message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true; raises a TimeoutError if it never is."""
    begin = time.monotonic()
    while not true():
        if time.monotonic() > begin + PATIENCE_SECONDS:
            raise TimeoutError("the scenario did not get to its disturbance")
        time.sleep(0.2)


@dataclass
class Sweep:
    """A sweep in a folder of its own, and its last launch."""

    folder: Path
    node: str
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def launch(self) -> None:
        """Start the command of the sweep, in a session of its own."""
        command = [
            sys.executable, "-m", "experiments.measure", "-m", *SMALL, "launcher=slurm", f"results={self.folder}",
            "sweep=s", *(argument.replace("FOLDER", str(self.folder)) for argument in self.arguments),
        ]  # fmt: skip
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)

    def said(self) -> str:
        """What the last launch has printed so far."""
        return (self.folder / "said").read_text()

    def go(self) -> None:
        """Let the runs end."""
        (self.folder / "go").touch()

    def numbers(self, what: str) -> list[str]:
        """The numbers of the runs that have begun, or ended, one for each time."""
        path = self.folder / what
        return path.read_text().split() if path.exists() else []

    def begun(self, *numbers: int, times: int = 1) -> None:
        """Wait until runs have begun."""
        until(lambda: all(self.numbers("begun").count(str(number)) >= times for number in numbers))

    def job(self, index: int | None = None) -> str:
        """The id of the last array of jobs, or of one of its jobs."""
        arrays = [path.name.split("_")[0] for path in self.folder.glob("s/launches/submitit/[0-9]*_*")]
        return max(arrays, key=int) + ("" if index is None else f"_{index}")

    def state(self, job: str) -> str:
        """The state of a job."""
        return asked("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T")

    def update(self, state: str) -> None:
        """Change the state of the node."""
        asked("scontrol", "update", f"nodename={self.node}", f"state={state}", "reason=benchmark")

    def resume(self) -> None:
        """Let the node take jobs again.  It may have come back by itself, and then Slurm refuses."""
        with contextlib.suppress(RuntimeError):
            self.update("resume")


def rest(sweep: Sweep) -> None:
    """No disturbance; the runs do not end by themselves."""


def go(sweep: Sweep) -> None:
    """No disturbance."""
    sweep.go()


def cancel_pending(sweep: Sweep) -> None:
    """Cancel a job before it has begun."""
    sweep.begun(0)
    asked("scancel", sweep.job(1))
    sweep.go()


def cancel_running(sweep: Sweep) -> None:
    """Cancel a job that runs."""
    sweep.begun(0, 1)
    asked("scancel", sweep.job(1))
    until(lambda: sweep.state(sweep.job(1)) == "CANCELLED")  # submitit ignores the first signal
    sweep.go()


def requeue(sweep: Sweep) -> None:
    """Let Slurm repeat a job from its beginning."""
    sweep.begun(0, 1)
    asked("scontrol", "requeue", sweep.job(1))
    sweep.begun(1, times=2)
    sweep.go()


def drain(sweep: Sweep) -> None:
    """The node takes no jobs when the launch begins, and takes them again after the launch has said so."""
    try:
        until(lambda: "holds job" in sweep.said())
    finally:
        sweep.resume()
    sweep.go()


def down(sweep: Sweep) -> None:
    """The node goes down under the jobs, and comes back."""
    sweep.begun(0, 1)
    sweep.update("down")
    try:
        until(lambda: sweep.state(sweep.job(0)) == sweep.state(sweep.job(1)) == "PENDING")
    finally:
        sweep.resume()
    sweep.begun(0, 1, times=2)
    sweep.go()


def interrupt(sweep: Sweep) -> None:
    """Ctrl-C while one job runs and one waits."""
    sweep.begun(0)
    sweep.process.send_signal(signal.SIGINT)


def kill(sweep: Sweep) -> None:
    """Kill the launcher while one job runs and one waits; its jobs go on, and a second launch shares the sweep."""
    sweep.begun(0)
    first = sweep.job()
    sweep.process.kill()
    sweep.process.wait()
    sweep.launch()
    until(lambda: sweep.job() != first)  # the second launch has submitted its jobs
    sweep.go()


@dataclass(frozen=True)
class Scenario:
    """How a launch is disturbed, and how it must end: its exit code, words that it prints, and the runs done."""

    code: int
    words: str
    done: int
    disturb: Callable[[Sweep], None]
    arguments: tuple[str, ...] = ()
    numbers: str = "0,1"
    before: str | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides of the sweep, in which FOLDER stands for its folder."""
        if not self.numbers:
            return self.arguments
        target = ("+measurement._target_=benchmarks.slurm.waits", "+measurement.folder=FOLDER")
        return (*target, f"+measurement.number={self.numbers}", *self.arguments)


ONE_BY_ONE = ("hydra.launcher.array_parallelism=1",)
SCENARIOS = {
    "drained node": Scenario(0, r"(?s)holds job \d+ back: .*all 2 runs are done", 2, drain, before="drain"),
    "node down": Scenario(0, "all 2 runs are done", 2, down),
    "Ctrl-C": Scenario(130, "stopped by SIGINT; 0 of 2 runs are done", 0, interrupt, ONE_BY_ONE),
    "killed launcher": Scenario(0, "all 2 runs are done", 2, kill, ONE_BY_ONE),
    "lists of seeds": Scenario(0, "all 3 runs are done", 3, go, ("seeds=[0,1]", "model.depth=4,5,6"), ""),
    # Slurm may forget the job at once.
    "cancelled while pending": Scenario(
        1, r"(job \d+ was cancelled|no longer knows job \d+).*\n.*number=1", 1, cancel_pending, ONE_BY_ONE
    ),
    "cancelled while running": Scenario(1, r"job \d+ was cancelled.*\n.*number=1", 1, cancel_running),
    "time limit": Scenario(
        1, "TimeoutError: the job reached its time limit", 0, rest, ("hydra.launcher.timeout_min=2",)
    ),
    "time limit without a warning": Scenario(
        1, r"time limit \(hydra.launcher.timeout_min=1\)\n.*number=0", 0, rest,
        ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=0"),
    ),
    "time limit below its warning": Scenario(
        1, "Error: hydra.launcher.timeout_min=1 is too short: ", 0, go, ("hydra.launcher.timeout_min=1",)
    ),
    "more memory than there is": Scenario(
        1, "Error: The cluster refused the jobs, which ask for .*mem_gb=9999", 0, go, ("hydra.launcher.mem_gb=9999",)
    ),
    "more cores than there are": Scenario(
        1, r"(cannot start job \d+ .*|refused the jobs), which asks? for .*cpus_per_task=9999", 0, go,
        ("hydra.launcher.cpus_per_task=9999",),
    ),
    "killed process": Scenario(
        1, r"1 of 3 runs failed\.\n.*job \d+ ended without a result.*\n.*number=1", 2, go, ("+measurement.kills=1",),
        "0,1,2",
    ),
    "requeued": Scenario(0, "all 2 runs are done", 2, requeue),
}  # fmt: skip


def ended(name: str, scenario: Scenario, node: str) -> dict[str, Any]:
    """Run a scenario; returns the row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="sweep"))
    sweep = Sweep(folder, node, scenario.overrides)
    if scenario.before is not None:
        sweep.update(scenario.before)
    sweep.launch()
    returned, error = None, ""
    try:
        scenario.disturb(sweep)
        returned = sweep.process.wait(PATIENCE_SECONDS)
        until(lambda: not asked("squeue", "--me", "--noheader"))
    except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as raised:
        error = str(raised)
    finally:
        sweep.process.kill()
    left = asked("squeue", "--me", "--noheader", "--format=%A").split()
    slurm.cancel(left)
    twice = sum(count > 1 for count in Counter(sweep.numbers("ended")).values())
    row = {
        "scenario": name, "returned": returned, "said": re.search(scenario.words, sweep.said()) is not None,
        "done": sum(runs.finished(one) is not None for one in runs.folders(folder / "s")), "ended_twice": twice,
        "jobs_left": len(left), "error": error,
    }  # fmt: skip
    expected = {"returned": scenario.code, "said": True, "done": scenario.done, "ended_twice": 0, "jobs_left": 0}
    row["right"] = not error and all(row[key] == value for key, value in expected.items())
    if row["right"]:
        shutil.rmtree(folder)
    else:
        print(f"{folder}:\n{sweep.said()}", file=sys.stderr)
    return row


def only_node() -> str:
    """The name of the cluster's only node.  Raises a RuntimeError that says what is missing."""
    missing = [name for name in (*slurm.COMMANDS, "scontrol", "sinfo") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"these commands of Slurm are not found: {', '.join(missing)}")
    nodes = [line.split("|") for line in asked("sinfo", "--noheader", "--Node", "--format=%N|%T|%c|%m").splitlines()]
    if len({name for name, *_ in nodes}) != 1:
        raise RuntimeError(f"the cluster must have one node, which is yours, got {len(nodes)}")
    name, state, cores, memory = nodes[0]
    if state != "idle" or int(cores) < 2 or int(memory) < 2048:
        raise RuntimeError(f"node {name} must be idle with 2 cores and 2 GB, got {state}, {cores} cores, {memory} MB")
    asked("scontrol", "update", f"nodename={name}", "comment=benchmark")  # fails without the rights of an operator
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the campaign; exit 1 if a scenario ended otherwise than expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    try:
        node = only_node()
    except RuntimeError as error:
        sys.exit(f"The campaign needs a running Slurm cluster, named by SLURM_CONF: {error}.")
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job of a shell would pass on that it is ignored
    console, rows = Console(), []
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name in chosen.only:
        rows.append(ended(name, SCENARIOS[name], node))
        console.print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), highlight=False, soft_wrap=True)
        pd.DataFrame(rows).to_csv(chosen.output / "slurm.csv", index=False)
    found = manifest(slurm=asked("sbatch", "--version"), accounting=_accounting())
    (chosen.output / "slurm.json").write_text(json.dumps(found, indent=2) + "\n")
    wrong = [row["scenario"] for row in rows if not row["right"]]
    console.print(f"{len(rows)} scenarios; {len(wrong)} ended otherwise than expected: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


def _accounting() -> str:
    """The kind of accounting of the cluster."""
    found = re.search(r"AccountingStorageType\s*=\s*(\S+)", asked("scontrol", "show", "config"))
    return found[1] if found else "unknown"


if __name__ == "__main__":
    main()
