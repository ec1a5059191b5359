"""What a sweep costs a run, beside the same library calls in a plain loop.

    python -m benchmarks.sweeps [--runs N] [--output FOLDER]

Serial sweeps of 10-layer MLPs (width 100, batch 32, 2 random vectors), one thread: with configurations composed once,
with Hydra's own sweeper, and with a list of seeds in one run; runs of more than a second (exact, width 300); and two
processes.  Each sweep is a process of its own; a cost a run is the slope between a short and a long sweep, so that
starting Python and importing torch is left out, but for the first row, which has everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

import gradscope as gs
from benchmarks.provenance import manifest
from benchmarks.report import table
from benchmarks.rows import Row, to_frame
from experiments import collect, launches
from gradscope.measures import PreactivationStd, SignDiversity

OUTPUT = Path("results/benchmarks")
WIDTH = 150
SHORT = {"depth": 10, "width": 100, "batch": 32, "probes": 2}
LONG = {"depth": 30, "width": 300, "batch": 128, "probes": 300}


def options(sizes: dict[str, int]) -> list[str]:
    """Sizes as overrides."""
    return [
        f"model.depth={sizes['depth']}", f"model.width={sizes['width']}", f"data.batch_size={sizes['batch']}",
        f"probes={sizes['probes']}",
    ]  # fmt: skip


def bare(sizes: dict[str, int], num: int) -> float:
    """Seconds of the same library calls in a plain loop, in this process."""
    begin = time.perf_counter()
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        model = gs.models.MLP(depth=sizes["depth"], width=sizes["width"], generator=generator)
        x = torch.randn(sizes["batch"], sizes["width"], generator=generator)
        profile = gs.gsc(model, x, probes=sizes["probes"], generator=generator)
        statistics = gs.measure(model, x, measures=(PreactivationStd(), SignDiversity()))
        pd.concat([profile.to_frame(), statistics], ignore_index=True)
    return time.perf_counter() - begin


def swept(sizes: dict[str, int], *arguments: str, processes: int = 1) -> float:
    """Seconds of one sweep in a process of its own."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "experiments.measure", "-m", *options(sizes), f"results={results}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADSCOPE_PROCESSES": str(processes)}
        begin = time.perf_counter()
        subprocess.run([*command, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def slope(few: int, many: int, sizes: dict[str, int], key: str, *arguments: str, processes: int = 1) -> float:
    """Seconds a run, from a short and a long sweep; ``key`` has the number of runs in place of its %d."""
    times = [swept(sizes, key % num, *arguments, processes=processes) for num in (few, many)]
    return (times[1] - times[0]) / (many - few)


def measured(runs: int) -> list[Row]:
    """All rows; a ratio is to the plain loop of the same networks."""
    torch.set_num_threads(1)
    part = max(4, runs // 10)
    bare(SHORT, 3)
    alone = {"short": bare(SHORT, part) / part, "long": bare(LONG, 3) / 3}
    everything = swept(SHORT, f"seed=range({runs})") / runs
    rows = [Row("short runs", "", "plain loop", "seconds", alone["short"], num=part)]
    found = {
        f"sweep of {runs} runs, all in all": everything,
        "sweep, a run more": slope(part, 2 * part, SHORT, "seed=range(%d)"),
        "sweep with Hydra's own sweeper, a run more": slope(
            2, 2 + part // 2, SHORT, "seed=range(%d)", "hydra/sweeper=basic"
        ),
        "list of seeds, a seed more": slope(part, 4 * part, SHORT, "seeds=%d"),
    }
    rows += [_row("short runs", what, seconds, alone["short"]) for what, seconds in found.items()]
    rows.append(Row("runs of a second", "", "plain loop", "seconds", alone["long"], num=3))
    rows.append(_row("runs of a second", "sweep, a run more", slope(2, 10, LONG, "seed=range(%d)"), alone["long"]))
    serial = slope(2, 10, LONG, "seed=range(%d)")
    double = slope(2, 10, LONG, "seed=range(%d)", "launcher=processes", processes=2)
    rows.append(Row("two processes", "", "one process, a run more", "seconds", serial))
    rows.append(_row("two processes", "two processes, a run more", double, serial))
    return rows


def collecting(num: int) -> list[Row]:
    """Seconds of ``collect`` on so many run folders, copies of one, the first time and when nothing and one is new."""
    with tempfile.TemporaryDirectory() as name:
        sweep = Path(name) / "s"
        command = [sys.executable, "-m", "experiments.measure", "-m", *options(SHORT), f"results={name}", "sweep=s"]
        subprocess.run([*command, "seed=0,1"], check=True, stdout=subprocess.DEVNULL)
        first, second = launches.folders(sweep)
        for number in range(num - 2):
            shutil.copytree(first, sweep / f"copy{number:06d}")
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            collected = collect.collect(sweep)
            times.append(time.perf_counter() - begin)
        (second / "status.json").touch()
        begin = time.perf_counter()
        collect.collect(sweep)
        times.append(time.perf_counter() - begin)
        assert collected.manifest["runs"] == num
    what = ("the first time", "nothing is new", "one run is new")
    return [Row(f"collect, {num} runs", "", w, "seconds", t) for w, t in zip(what, times, strict=True)]


def _row(group: str, what: str, seconds: float, reference: float) -> Row:
    name = "one process, a run more" if group == "two processes" else "plain loop"
    return Row(group, "", what, "seconds", seconds, reference=name, ratio=seconds / reference)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write one frame and its manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    console, begin = Console(width=WIDTH), time.perf_counter()
    rows = measured(chosen.runs) + collecting(10 * chosen.runs)
    for group in dict.fromkeys(row.group for row in rows):
        console.print(table(group, [row for row in rows if row.group == group]))
    chosen.output.mkdir(parents=True, exist_ok=True)
    to_frame(rows).to_csv(chosen.output / "sweeps.csv", index=False)
    seconds = time.perf_counter() - begin
    written = manifest(runs=chosen.runs, short=SHORT, long=LONG, seconds=round(seconds, 1))
    (chosen.output / "sweeps.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"{chosen.output / 'sweeps.csv'} ({seconds:.1f} s)", highlight=False)


if __name__ == "__main__":
    main()
