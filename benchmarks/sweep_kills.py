"""Kill sweeps at random moments, and count runs that are lost or repeated.

    python -m benchmarks.sweep_kills [--serial 50] [--processes 20] [--slurm-local 3] [--signals ...] [--output FOLDER]
    python -m benchmarks.sweep_kills --minutes 10 --runs 12

Each sweep has 40 runs (8 on slurm_local).  The campaign starts a sweep and kills it, up to three times, and then lets
it finish.  In half of the sweeps, the launcher and all workers get SIGKILL at once.  In the other half, only the
launcher gets SIGINT.  One kill in five comes while the sweep is still starting.  In the end, every run must be done,
and its numbers must equal those of an undisturbed sweep bit for bit.  No run may be repeated after it was done, and no
process may be left over.

With --minutes, the campaign ends early, but not before one sweep of each launcher and signal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.tables.provenance import manifest
from experiments import runs
from experiments.archive import collecting

OUTPUT = Path("results/benchmarks")
LAUNCHERS = ("serial", "processes", "slurm_local")
SIGNALS = ("SIGKILL", "SIGINT")
MOST_KILLS = 3  # per sweep
EARLY = 0.2  # fraction of the kills that do not wait until a run is done
STARTING_SECONDS = 5.0  # about as long as it takes until the first run begins


def num_runs(launcher: str, num: int) -> int:
    """The number of runs in a sweep.  It is smaller with submitit, whose jobs take five times as long as other runs."""
    return num // 5 if launcher == "slurm_local" else num


def start(results: Path, launcher: str, num: int) -> subprocess.Popen[bytes]:
    """Start a sweep in its own session, so that all of its processes can be killed at once."""
    command = [
        sys.executable, "-m", "experiments.measure", "-m", "model.depth=10", "model.width=50", "data.batch_size=16",
        "probes=2", f"seed=range({num_runs(launcher, num)})", f"launcher={launcher}", f"results={results}", "sweep=s",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADSCOPE_PROCESSES": "2"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def alive(session: int) -> list[int]:
    """The processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def alive_after(session: int, seconds: float) -> list[int]:
    """The processes of a session that still live after this time."""
    begin = time.monotonic()
    while (found := alive(session)) and time.monotonic() < begin + seconds:
        time.sleep(0.05)
    return found


def killed(results: Path, launcher: str, num: int, moment: random.Random, how: signal.Signals) -> dict[str, Any]:
    """Kill a sweep up to three times at random moments, then let it finish; return the counts and the exit code."""
    kills, starting, left = 0, 0, 0
    for _ in range(MOST_KILLS):
        before = len(list(results.glob("s/*/status.json")))
        process = start(results, launcher, num)
        if moment.random() < EARLY:
            time.sleep(moment.uniform(0.5, STARTING_SECONDS))  # Python handles SIGINT only after it has started
        else:
            begin = time.monotonic()
            while process.poll() is None and time.monotonic() < begin + 20:
                if len(list(results.glob("s/*/status.json"))) > before:
                    break
                time.sleep(0.01)
            time.sleep(moment.uniform(0, 1.0))
        if process.poll() is not None:
            break
        kills += 1
        starting += len(list(results.glob("s/*/status.json"))) == before
        if how == signal.SIGKILL:
            for pid in alive(process.pid):  # workers may have their own process group
                os.kill(pid, signal.SIGKILL)
        else:
            process.send_signal(how)
        process.wait(timeout=120)
        left += len(alive_after(process.pid, 0.3 if how == signal.SIGKILL else 5.0))
    process = start(results, launcher, num)
    return {"kills": kills, "while_starting": starting, "processes_left": left, "returned": process.wait()}


def checked(results: Path, expected: pd.DataFrame, planned: int) -> dict[str, Any]:
    """Count the runs that are done and the runs that were done twice, and compare all numbers."""
    folders = runs.folders(results / "s")
    notes = [entry for path in (results / "s" / "launches").glob("*.jsonl") for entry in runs.ended(path)]
    twice = sum(num > 1 for num in Counter(entry["run"] for entry in notes if entry["state"] == runs.DONE).values())
    frame = _sorted(collecting.collect(results / "s").frame)
    wanted = expected[expected["seed"] < planned].reset_index(drop=True)
    same = len(frame) == len(wanted) and np.array_equal(frame["log10_value"], wanted["log10_value"])
    return {
        "planned": planned, "runs": len(folders), "done": sum(runs.finished(folder) is not None for folder in folders),
        "done_twice": twice, "same_numbers": bool(same),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the campaign; exit 1 if anything was lost, damaged or done twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for launcher, num in (("serial", 50), ("processes", 20), ("slurm-local", 3)):
        parser.add_argument(f"--{launcher}", type=int, default=num)
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--runs", type=int, default=40, help="runs of a sweep, at least 5")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further sweeps after this time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs of a shell ignore SIGINT, and the sweeps would inherit this
    console, moment, root, rows = Console(), random.Random(0), Path(tempfile.mkdtemp()), []
    begin = time.monotonic()
    start(root / "alone", "serial", chosen.runs).wait()
    expected = _sorted(collecting.collect(root / "alone" / "s").frame)
    most = max(getattr(chosen, launcher) for launcher in LAUNCHERS)
    for number, launcher, name in itertools.product(range(most), LAUNCHERS, chosen.signals):
        over = number and time.monotonic() - begin > 60 * chosen.minutes
        if over or number >= getattr(chosen, launcher):
            continue
        results = root / f"{launcher}{name}{number}"
        row = {"launcher": launcher, "number": number, "signal": name}
        row |= killed(results, launcher, chosen.runs, moment, signal.Signals[name])
        rows.append(row | checked(results, expected, num_runs(launcher, chosen.runs)))
        console.print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), highlight=False, soft_wrap=True)
        shutil.rmtree(results)
    shutil.rmtree(root)
    frame = pd.DataFrame(rows)
    chosen.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(chosen.output / "sweep_kills.csv", index=False)
    (chosen.output / "sweep_kills.json").write_text(
        json.dumps(manifest(runs={name: num_runs(name, chosen.runs) for name in LAUNCHERS}), indent=2) + "\n"
    )
    right = frame["same_numbers"] & (frame["done"] == frame["runs"]) & (frame["runs"] == frame["planned"])
    right &= (frame["done_twice"] == 0) & (frame["returned"] == 0) & (frame["processes_left"] == 0)
    console.print(
        f"{len(frame)} sweeps, {frame['kills'].sum()} kills; {int((~right).sum())} sweeps differ from undisturbed ones"
    )
    sys.exit(not right.all())


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["seed", "quantity", "index"]).reset_index(drop=True)


if __name__ == "__main__":
    main()
