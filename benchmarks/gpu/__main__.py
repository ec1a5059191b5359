"""Measure all that the project claims of a GPU, on one card.

    python -m benchmarks.gpu [--minutes 8] [--device cuda] [--output FOLDER]
    python -m benchmarks.gpu --device cpu --quick

Parts, in this order: tests marked ``gpu``; coefficients compared with one forward and backward pass, and with
``vmap(jacrev)``; training of both AlexNets compared with a hand-tuned loop and with the matrix rate of the card; the
cost of the monitor; the accuracy of the long recipes, for as many seeds as the minutes allow.  Real images come from
GRADSCOPE_DATA.  Each part is written as soon as it is measured:

    gpu_engine.csv, gpu_training.csv, gpu_monitor.csv    times, ratios, blocking reads
    gpu_accuracy.csv                                     test accuracy of every seed
    gpu.json                                             card, versions, commit, finished parts

With --quick, tiny networks are measured, to test that everything runs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from benchmarks.gpu import engine, workload
from benchmarks.tables.provenance import manifest
from benchmarks.tables.report import table
from benchmarks.tables.rows import Row, to_frame

OUTPUT = Path("results/benchmarks")
WIDTH = 150


def tests() -> bool:
    """Run the tests that need a GPU.  Returns whether they passed."""
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/gradscope/test_gpu.py"]).returncode == 0


def main(arguments: list[str] | None = None) -> None:
    """Measure part after part, and write each one at once."""
    options = _options(arguments)
    device = torch.device(options.device)
    console, begin = Console(width=WIDTH, soft_wrap=True), time.monotonic()
    deadline = math.inf if options.quick else begin + 60 * options.minutes
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    options.output.mkdir(parents=True, exist_ok=True)
    ended = list[str]()

    def done(part: str) -> None:
        ended.append(part)
        seconds = round(time.monotonic() - begin, 1)
        written = manifest(card=card, quick=options.quick, parts=ended, seconds=seconds)
        (options.output / "gpu.json").write_text(json.dumps(written, indent=1) + "\n")
        console.print(f"{part}: done after {seconds:g} s", highlight=False)

    if device.type == "cuda":
        done("tests passed" if tests() else "tests FAILED")
    parts: dict[str, Callable[[], Iterator[list[Row]]]] = {
        "engine": lambda: engine.rows(device, options.quick, options.repeats),
        "training": lambda: workload.speed(device, options.quick, options.repeats),
        "monitor": lambda: workload.watching(device, options.quick, options.repeats),
    }
    for part, measure in parts.items():
        found: list[Row] = []
        for group in measure():
            console.print(table(group[0].group, group))
            found += group
            to_frame(found).assign(card=card).to_csv(options.output / f"gpu_{part}.csv", index=False)
        done(part)
    accuracies(workload.accuracy(device, options.quick, deadline), options.output / "gpu_accuracy.csv", console, card)
    done("accuracy")


def accuracies(runs: Iterable[workload.Run], path: Path, console: Console, card: str | None) -> None:
    """Write every run as soon as it ends, and print the mean of each recipe."""
    found: list[workload.Run] = []
    for run in runs:
        found.append(run)
        pd.DataFrame([one._asdict() for one in found]).assign(card=card).to_csv(path, index=False)
        own = [one.test_accuracy for one in found if one.recipe == run.recipe]
        console.print(f"{run.recipe}: {run.test_accuracy:.2%}, mean of {len(own)} {sum(own) / len(own):.2%}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to test that everything runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="no training starts that would end later")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --quick tests that everything runs")
    return options


if __name__ == "__main__":
    main()
