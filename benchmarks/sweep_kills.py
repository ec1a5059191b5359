"""Does a sweep that is killed lose anything, or do anything twice?

    python -m benchmarks.sweep_kills [--serial 50] [--processes 20] [--slurm-local 3] [--signals ...] [--output FOLDER]

Sweeps of 40 runs (8 on slurm_local) are killed at random moments and started again, and killed again, until they are
done: so many with SIGKILL, of launcher and workers at once, and as many with SIGINT to the launcher.  One kill in five
comes while the sweep starts.  Then every run must be there, with the numbers of a sweep that was left alone, bit for
bit, none carried out again after it was done, and no process left.
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
from experiments.archive import collecting
from experiments.runs import launches, names, outcomes

OUTPUT = Path("results/benchmarks")
RUNS = {"serial": 40, "processes": 40, "slurm_local": 8}
SIGNALS = ("SIGKILL", "SIGINT")
MOST_KILLS = 3  # a sweep
EARLY = 0.2  # of the kills, which do not wait for a run to be done
STARTING_SECONDS = 5.0  # about as long as it takes until the first run begins


def start(results: Path, launcher: str) -> subprocess.Popen[bytes]:
    """A sweep in a session of its own, so that all of its processes can be killed at once."""
    command = [
        sys.executable, "-m", "experiments.measure", "-m", "model.depth=10", "model.width=50", "data.batch_size=16",
        "probes=2", f"seed=range({RUNS[launcher]})", f"launcher={launcher}", f"results={results}", "sweep=s",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADSCOPE_PROCESSES": "2"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def alive(session: int) -> list[int]:
    """Processes of a session, zombies aside."""
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
    """Processes of a session that have not ended after so long."""
    begin = time.monotonic()
    while (found := alive(session)) and time.monotonic() < begin + seconds:
        time.sleep(0.05)
    return found


def killed(results: Path, launcher: str, moment: random.Random, how: signal.Signals) -> dict[str, Any]:
    """Kill a sweep up to three times at random moments, and let the last start finish."""
    kills, starting, left = 0, 0, 0
    for _ in range(MOST_KILLS):
        before = len(list(results.glob("s/*/status.json")))
        process = start(results, launcher)
        if moment.random() < EARLY:
            time.sleep(moment.uniform(0.5, STARTING_SECONDS))  # after Python itself has come up, to hear of SIGINT
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
            for pid in alive(process.pid):  # its workers may be sessions of their own group
                os.kill(pid, signal.SIGKILL)
        else:
            process.send_signal(how)
        process.wait(timeout=120)
        left += len(alive_after(process.pid, 0.3 if how == signal.SIGKILL else 5.0))
    process = start(results, launcher)
    return {"kills": kills, "while_starting": starting, "processes_left": left, "returned": process.wait()}


def looked_at(results: Path, expected: pd.DataFrame, launcher: str) -> dict[str, Any]:
    """What must hold in the end."""
    folders = names.folders(results / "s")
    notes = [entry for path in (results / "s" / "launches").glob("*.jsonl") for entry in launches.ended(path)]
    twice = sum(num > 1 for num in Counter(entry["run"] for entry in notes if entry["state"] == outcomes.DONE).values())
    frame = _sorted(collecting.collect(results / "s").frame)
    wanted = expected[expected["seed"] < RUNS[launcher]].reset_index(drop=True)
    same = len(frame) == len(wanted) and np.array_equal(frame["log10_value"], wanted["log10_value"])
    return {
        "runs": len(folders), "done": sum(outcomes.is_done(folder) for folder in folders), "done_twice": twice,
        "same_numbers": bool(same),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the campaign; exit 1 where anything was lost, torn or done twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for launcher, num in (("serial", 50), ("processes", 20), ("slurm-local", 3)):
        parser.add_argument(f"--{launcher}", type=int, default=num)
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its own
    console, moment, root, rows = Console(), random.Random(0), Path(tempfile.mkdtemp()), []
    start(root / "alone", "serial").wait()
    expected = _sorted(collecting.collect(root / "alone" / "s").frame)
    for launcher, how in itertools.product(RUNS, map(signal.Signals.__getitem__, chosen.signals)):
        for number in range(getattr(chosen, launcher)):
            results = root / f"{launcher}{how.name}{number}"
            row = {"launcher": launcher, "number": number, "signal": how.name}
            rows.append(row | killed(results, launcher, moment, how) | looked_at(results, expected, launcher))
            console.print(
                " ".join(f"{key}={value}" for key, value in rows[-1].items()), highlight=False, soft_wrap=True
            )
            shutil.rmtree(results)
    shutil.rmtree(root)
    frame = pd.DataFrame(rows)
    chosen.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(chosen.output / "sweep_kills.csv", index=False)
    (chosen.output / "sweep_kills.json").write_text(json.dumps(manifest(runs=RUNS), indent=2) + "\n")
    right = frame["same_numbers"] & (frame["done"] == frame["runs"]) & (frame["runs"] == frame["launcher"].map(RUNS))
    right &= (frame["done_twice"] == 0) & (frame["returned"] == 0) & (frame["processes_left"] == 0)
    console.print(f"{len(frame)} sweeps, {frame['kills'].sum()} kills, {int((~right).sum())} not as if left alone")
    sys.exit(not right.all())


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["seed", "quantity", "index"]).reset_index(drop=True)


if __name__ == "__main__":
    main()
