"""Kill launches at random moments, and count the runs that are lost, done twice, damaged or changed.

    SLURM_CONF=... python -m benchmarks.kills [--kills N] [--minutes M] [--only CASE ...] [--output FOLDER]

A case is a sweep of ``experiments.measure`` under one launcher, or one training with one or two processes.  Its command
is repeated and killed until a launch ends by itself with exit code 0, and then the case begins anew, until it has been
killed often enough.  A moment is uniform in the first half of an undisturbed launch.  Therefore many kills come while a
launch or its workers start.  The launcher gets SIGINT, SIGTERM, SIGHUP or SIGKILL; or one of its workers, ranks or jobs
is killed and the launch goes on; or all processes get SIGKILL at once, as if the machine stopped.

After the end of a launch, its processes have five seconds to end; jobs of Slurm may stay.  In the end, every run must
be done once, and all numbers must equal those of an undisturbed launch bit for bit.

Most launches are forked from a process that has imported everything, one in ten is started as a user starts it.
Workers, ranks and jobs always start afresh.  About half an hour on two idle cores.  An interrupted campaign resumes:
rows of the output are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import torch

from benchmarks import slurm
from benchmarks.tables.provenance import manifest
from experiments import runs
from experiments.archive import collecting
from experiments.training.records import read
from tests.commands import Command

OUTPUT = Path("results/benchmarks")
MARK = "GRADSCOPE_KILLS"  # an environment variable by which the processes of a launch are known
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
FRESH = 0.1  # fraction of the launches that are started as a user starts them
ENDING_SECONDS, MOST_SECONDS, MOST_LAUNCHES = 5.0, 600.0, 20
MEASURE = ("model.depth=3", "model.width=16", "data.batch_size=16", "probes=2", "sweep=s")
TRAIN = (
    "model=mlp", "model.depth=3", "model.width=16", "model.out_features=10", "data=digits", "train.max_steps=120",
    "train.batch_size=64", "train.checkpoint_every=3", "train.keep=2", "train.log_every=5", "train.precision=float32",
    "train.augmentation.crop=2", "monitor.every=20", "monitor.max_overhead=null", "num_threads=1", "sweep=s",
)  # fmt: skip
FAULTS = ("lost", "done_twice", "damaged", "changed", "processes_left")


@dataclass(frozen=True)
class Case:
    """A launch that is killed: ``share`` of the kills; ``runs`` of its sweep, or 0 for a training in ``ranks``."""

    share: int
    runs: int = 0
    arguments: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def on_slurm(self) -> bool:
        """Whether its jobs are those of a cluster."""
        return "launcher=slurm" in self.arguments

    def command(self, results: Path) -> list[str]:
        """The arguments of Python after ``-m``."""
        if self.runs:
            seeds = (f"seed=range({self.runs})", f"results={results}")
            return ["experiments.measure", "-m", *MEASURE, *seeds, *self.arguments]
        train = ["experiments.train", *TRAIN, f"results={results}"]
        if self.ranks == 1:
            return train
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = f"--master-port={probe.getsockname()[1]}"
        return ["torch.distributed.run", f"--nproc-per-node={self.ranks}", port, "-m", *train]


CASES = {
    "serial": Case(80, 40),
    "processes": Case(25, 40, ("launcher=processes",)),
    "slurm_local": Case(10, 2, ("launcher=slurm_local",)),
    "slurm": Case(10, 3, ("launcher=slurm", "hydra.launcher.mem_gb=1")),
    "training": Case(60),
    "ranks": Case(15, ranks=2),
}


def start(case: Case, results: Path, mark: str, fresh: bool) -> Any:
    """Start a launch in a session of its own."""
    module, *arguments = case.command(results)
    environment = {MARK: mark, "OMP_NUM_THREADS": "1", "GRADSCOPE_PROCESSES": "2"}
    if not fresh:
        return Command(module, *arguments, merged=True, **environment)
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], env=os.environ | environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def alive(session: int, mark: str = "") -> list[int]:
    """The processes of a session, or with ``mark`` in their environment, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            marked = mark and f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if (int(fields[3]) == session or marked) and fields[0] not in "ZX":
            found.append(int(folder.name))
    return found


def kill(process: Any, mark: str, moment: random.Random) -> str:
    """Kill the launcher, one of its other processes, or all; returns which, and the signal."""
    everything = alive(process.pid, mark)
    others = [pid for pid in everything if pid != process.pid]
    target = moment.choice(("launcher", "launcher", "worker", "all"))
    number = moment.choice(SIGNALS)
    if target == "all":
        number, victims = signal.SIGKILL, everything
    elif target == "worker" and others:
        number, victims = moment.choice((signal.SIGTERM, signal.SIGKILL)), [moment.choice(others)]
    else:
        target, victims = "launcher", [process.pid]
    for pid in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return f"{target} {number.name}"


def ending(process: Any, mark: str) -> tuple[int, float]:
    """How many processes of a launch live five seconds after its end, and the seconds until the last one has ended."""
    begin, late = time.monotonic(), 0
    while found := alive(process.pid, mark):
        seconds = time.monotonic() - begin
        late = len(found) if seconds < ENDING_SECONDS else late
        if seconds > MOST_SECONDS:
            for pid in found:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    seconds = time.monotonic() - begin
    return late if seconds > ENDING_SECONDS else 0, seconds


def killed(case: Case, results: Path, seconds: float, moment: random.Random, most: int) -> dict[str, Any]:
    """Launch and kill until a launch ends by itself with exit code 0; returns what happened."""
    kills: list[str] = []
    starting, remaining, returned, launches, longest = 0, 0, 1, 0, 0.0
    while returned and launches <= MOST_LAUNCHES:
        mark, launches, begin = uuid4().hex, launches + 1, time.time()
        process = start(case, results, mark, moment.random() < FRESH)
        while len(kills) < most and launches <= MOST_LAUNCHES:
            until = time.monotonic() + moment.uniform(0, seconds / 2)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            starting += all(path.stat().st_mtime < begin for path in results.glob("s/*-*/*.*"))
            kills.append(kill(process, mark, moment))
            if not kills[-1].startswith("worker"):
                break
        with contextlib.suppress(subprocess.TimeoutExpired):  # then its processes count as left
            returned = process.wait(MOST_SECONDS)
        late, seconds_left = ending(process, "" if case.on_slurm else mark)
        remaining, longest = remaining + late, max(longest, seconds_left)
    begin = time.monotonic()
    while case.on_slurm and slurm.asked("squeue", "--me", "--noheader") and time.monotonic() < begin + MOST_SECONDS:
        time.sleep(0.5)  # jobs of killed launches
    return {
        "kills": len(kills), "launches": launches, "while_starting": starting, "returned": returned,
        "processes_left": remaining, "ending_seconds": round(longest, 1), "how": "; ".join(kills),
    }  # fmt: skip


def outcome(case: Case, results: Path) -> dict[str, Any]:
    """The numbers of a launch by run.  A killed launch must have the same."""
    if case.runs:
        frame = collecting.collect(results / "s").frame.sort_values(["quantity", "index"])
        return {str(seed): rows["log10_value"].to_numpy() for seed, rows in frame.groupby("seed")}
    found: dict[str, Any] = {}
    for run in runs.folders(results / "s"):
        state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
        digest = hashlib.sha256()
        for name, weight in state["model"].items():
            digest.update(name.encode() + weight.numpy().tobytes())
        records = [{k: v for k, v in one.items() if k != "images_per_second"} for one in read(run / "metrics.jsonl")]
        monitored = [record["step"] for record in read(run / "monitor.jsonl")]
        found[run.name] = (digest.hexdigest(), records, monitored, state["step"])
    return found


def checked(case: Case, results: Path, expected: dict[str, Any]) -> dict[str, int]:
    """Counts of what a killed launch has lost, done twice, damaged and changed."""
    folders = runs.folders(results / "s")
    notes = [entry for path in (results / "s" / "launches").glob("*.jsonl") for entry in runs.ended(path)]
    times = Counter(entry["run"] for entry in notes if entry["state"] == runs.DONE)
    done = [folder for folder in folders if runs.finished(folder) is not None]
    found = outcome(case, results)
    return {
        "lost": len(expected) - len(done), "done_twice": sum(number > 1 for number in times.values()),
        "damaged": len(folders) - len(done) + sum(not readable(path) for path in results.glob("s/*/checkpoints/*.pt")),
        "changed": sum(key not in found or not _same(found[key], value) for key, value in expected.items()),
    }  # fmt: skip


def readable(path: Path) -> bool:
    """Whether a checkpoint can be loaded."""
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def _same(found: Any, expected: Any) -> bool:
    return bool(np.array_equal(found, expected)) if isinstance(expected, np.ndarray) else found == expected


def undisturbed(case: Case, results: Path) -> tuple[dict[str, Any], float]:
    """The numbers and the seconds of a launch that is left alone.  Raises RuntimeError if it fails."""
    begin = time.monotonic()
    process = start(case, results, uuid4().hex, fresh=False)
    said, _ = process.communicate(MOST_SECONDS)
    if process.returncode:
        raise RuntimeError(said)
    return outcome(case, results), time.monotonic() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the campaign; exit 1 if anything was lost, done twice, damaged or changed, or a process was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=sum(case.share for case in CASES.values()))
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further launches after this time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    names = chosen.only or [name for name in CASES if name != "slurm" or shutil.which("sbatch")]
    for number in SIGNALS[:-1]:  # background jobs of a shell ignore some, and the launches would inherit this
        signal.signal(number, signal.SIG_DFL)
    moment, root = random.Random(), Path(tempfile.mkdtemp(prefix="kills"))
    path = chosen.output / "kills.csv"
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    whole = sum(CASES[name].share for name in names)
    wanted = {name: max(1, round(chosen.kills * CASES[name].share / whole)) for name in names}
    Command("experiments.status", "--help").wait(MOST_SECONDS)  # imports everything
    for row in rows:
        wanted[row["case"]] = max(0, wanted.get(row["case"], 0) - row["kills"])
    names = [name for name in names if wanted[name]]
    expected = {name: undisturbed(CASES[name], root / name) for name in names}
    chosen.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    while any(wanted[name] for name in names) and time.monotonic() - begin < 60 * chosen.minutes:
        for name in [name for name in names if wanted[name]]:
            results = root / uuid4().hex
            row = {"case": name, "runs": len(expected[name][0])}
            row |= killed(CASES[name], results, expected[name][1], moment, wanted[name])
            rows.append(row | checked(CASES[name], results, expected[name][0]))
            wanted[name] -= row["kills"]
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
            if any(rows[-1][fault] for fault in FAULTS):
                print(f"kept: {results}", flush=True)
            else:
                shutil.rmtree(results)
            pd.DataFrame(rows).to_csv(path, index=False)
    frame = pd.read_csv(path)
    about = manifest(measure=MEASURE, train=TRAIN, kills=int(frame["kills"].sum()))
    (chosen.output / "kills.json").write_text(json.dumps(about, indent=2) + "\n")
    faults = {fault: int(frame[fault].sum()) for fault in FAULTS}
    print(f"{frame['kills'].sum()} kills of {frame['launches'].sum()} launches: {faults}")
    sys.exit(any(faults.values()) or bool(frame["returned"].any()))


if __name__ == "__main__":
    main()
