"""Kill training runs at random moments, and compare their results with those of an undisturbed run.

    python -m benchmarks.kills [--kills N] [--minutes M] [--output FOLDER]

One run of ``experiments.train`` is left alone.  The same run is then started N times, each time in another folder.
SIGKILL ends each of these N runs twice, at random moments of its training.  Such a moment can fall into the writing of
a checkpoint, which happens every third step.  After each kill the run is started again, and after the second it is left
to finish.  After each kill, all files under ``checkpoints`` must be complete.  In the end, weights and records must
equal those of the undisturbed run bit for bit.  The model is a small ResNet; it learns the digits of scikit-learn on
one thread.

With --minutes, the campaign starts no further runs after this time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from benchmarks.tables.provenance import manifest
from experiments import runs
from experiments.training.records import read

OUTPUT = Path("results/benchmarks")
OPTIONS = [
    "model=resnet", "model.depth=8", "model.width=8", "data=digits", "train.epochs=3", "train.batch_size=32",
    "train.checkpoint_every=3", "train.keep=2", "train.log_every=5", "train.precision=float32",
    "train.augmentation.crop=2", "monitor.every=20", "monitor.max_overhead=null", "num_threads=1",
]  # fmt: skip


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the run in its own process."""
    command = [sys.executable, "-m", "experiments.train", *OPTIONS, f"results={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def training(folder: Path, process: subprocess.Popen[str]) -> bool:
    """Wait until the process trains; returns False if it ended before."""
    begin = time.time_ns()
    while process.poll() is None:
        if any(path.stat().st_mtime_ns > begin for path in folder.glob("train/*/monitor.jsonl")):
            return True
        time.sleep(0.01)
    return False


def finish(folder: Path) -> float:
    """Run to the end; returns the seconds of training.  Raises RuntimeError with the output if it fails."""
    process = start(folder)
    training(folder, process)
    begin = time.perf_counter()
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(output)
    return time.perf_counter() - begin


def outcome(folder: Path) -> dict[str, Any]:
    """A digest of the weights, and the records without their speed; a killed run must have the same outcome."""
    (run,) = runs.folders(folder / "train")
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    digest = hashlib.sha256()
    for name, weight in state["model"].items():
        digest.update(name.encode() + weight.numpy().tobytes())
    records = [{k: v for k, v in record.items() if k != "images_per_second"} for record in read(run / "metrics.jsonl")]
    steps = [record["step"] for record in read(run / "monitor.jsonl")]
    return {"weights": digest.hexdigest(), "records": records, "monitored": steps, "step": state["step"]}


def unreadable(folder: Path) -> int:
    """The number of checkpoints that cannot be loaded; unfinished files are named .part and do not count."""
    bad = 0
    for path in folder.glob("train/*/checkpoints/*.pt"):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            bad += 1
    return bad


def killed(folder: Path, moment: random.Random, seconds: float, kills: int) -> dict[str, Any]:
    """Start and kill a run ``kills`` times, each within ``seconds`` of training, then let it finish; return counts."""
    steps, bad, parts, found = [], 0, 0, 0
    for _ in range(kills):
        process = start(folder)
        if training(folder, process):
            time.sleep(moment.uniform(0, seconds))
        found += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        bad += unreadable(folder)
        parts += len(list(folder.glob("train/*/checkpoints/*.part")))
        records = [record["step"] for path in folder.glob("train/*/metrics.jsonl") for record in read(path)]
        steps.append(max(records, default=0))
    finish(folder)
    return {"kills": found, "last_record_before_kill": steps, "unreadable": bad, "half_written": parts}


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign; exit 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of runs, each of which is killed twice")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further runs after this time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    console, moment, root, begin = Console(), random.Random(0), Path(tempfile.mkdtemp()), time.monotonic()
    whole = finish(root / "whole")
    expected = outcome(root / "whole")
    console.print(f"left alone: {expected['step']} steps in {whole:.1f} s of training", highlight=False)
    rows = []
    for number in range(options.kills):
        if number and time.monotonic() - begin > 60 * options.minutes:
            break
        folder = root / f"killed{number}"
        # Kill each run twice, so that the second kill hits a process that resumed from a checkpoint.
        row = killed(folder, moment, 0.45 * whole, kills=2)
        found = outcome(folder)
        row |= {f"same_{key}": found[key] == expected[key] for key in ("weights", "records", "monitored")}
        rows.append({"run": number} | row)
        console.print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), highlight=False)
        shutil.rmtree(folder)
    shutil.rmtree(root)
    frame = pd.DataFrame(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output / "kills.csv", index=False)
    (options.output / "kills.json").write_text(json.dumps(manifest(options=OPTIONS), indent=2) + "\n")
    same = frame[["same_weights", "same_records", "same_monitored"]].all(axis=None)
    verdict = "all like the undisturbed run" if same and not frame["unreadable"].sum() else "DIFFERENCES"
    console.print(f"{len(frame)} runs, {frame['kills'].sum()} kills: {verdict}")
    sys.exit(verdict == "DIFFERENCES")


if __name__ == "__main__":
    main()
