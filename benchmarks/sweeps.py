"""The cost of a run in a sweep, compared with the same library calls in a plain loop.

    python -m benchmarks.sweeps [--runs N] [--output FOLDER]

The runs measure 10-layer MLPs (width 100, batch 32, 2 random vectors) on one thread.  Four kinds of sweep are timed:
gradscope's sweeper, which composes configurations once; Hydra's own sweeper; gradscope's in two processes; and a list
of seeds in one run.  Longer runs of over a second (exact, width 300) are timed too.  Each sweep is its own process.
The cost per run is the slope between a short and a long sweep, so it excludes starting Python and importing torch; "all
in all" includes both.  In each round, a plain loop runs before and after the sweeps.  Medians and quartiles are over
the ratios of the rounds.
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
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

import gradscope as gs
from benchmarks.tables.provenance import manifest
from benchmarks.tables.report import table
from benchmarks.tables.rows import Row, to_frame
from experiments.archive import collecting as archive_collecting
from experiments.runs import folders
from gradscope.measures import PreactivationStd, SignDiversity

OUTPUT = Path("results/benchmarks")
WIDTH = 150
SHORT = {"depth": 10, "width": 100, "batch": 32, "probes": 2}
LONG = {"depth": 30, "width": 300, "batch": 128, "probes": 300}
PLAIN, SERIAL, DOUBLE = "plain loop", "sweep, a run more", "sweep with two processes, a run more"
QUARTILES = (0.25, 0.5, 0.75)


def options(sizes: dict[str, int]) -> list[str]:
    """The sizes as overrides for the command line."""
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
    """Seconds of one sweep in its own process."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "experiments.measure", "-m", *options(sizes), f"results={results}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADSCOPE_PROCESSES": str(processes)}
        begin = time.perf_counter()
        subprocess.run([*command, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def slope(few: int, many: int, sizes: dict[str, int], key: str, *arguments: str, processes: int = 1) -> float:
    """Seconds per run, from a short and a long sweep; %d in ``key`` is the number of runs."""
    times = [swept(sizes, key % num, *arguments, processes=processes) for num in (few, many)]
    return (times[1] - times[0]) / (many - few)


def beside(sizes: dict[str, int], num: int, call: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """For each round: the seconds that ``call`` returns, and the seconds per run of plain loops before and after it.

    The speed of a shared machine changes within a minute, so ratios are taken within a round.
    """
    found, plain = [], []
    for _ in range(rounds):
        before = bare(sizes, num)
        found.append(call())
        plain.append((before + bare(sizes, num)) / (2 * num))
    return found, plain


def at_once(pool: Executor, num: int) -> float:
    """Seconds per run of two simultaneous plain loops of long runs: the best that two processes can reach."""
    return sum(pool.map(bare, [LONG] * 2, [num] * 2)) / (2 * 2 * num)


def in_two(sizes: dict[str, int], few: int, many: int, rounds: int) -> tuple[list[float], ...]:
    """For each round: seconds per run of a plain loop, of a serial sweep and of one with two processes."""
    serial, double = [], []

    def both() -> float:
        serial.append(slope(few, many, sizes, "seed=range(%d)"))
        double.append(slope(few, 2 * many, sizes, "seed=range(%d)", "launcher=processes", processes=2))
        return serial[-1]

    _, plain = beside(sizes, few, both, rounds)
    return plain, serial, double


def measured(runs: int) -> list[Row]:
    """All rows; ratios are to the plain loop of the same networks, or, for two processes, to the serial sweep."""
    torch.set_num_threads(1)
    part, full = max(4, runs // 10), runs >= 1000
    bare(SHORT, 3)
    seeds, plain = beside(SHORT, 2 * part, lambda: slope(part, 11 * part, SHORT, "seeds=%d"), 7 if full else 2)
    group = "short runs"
    rows = [_row(group, PLAIN, plain), _row(group, "list of seeds, a seed more", seeds, plain)]
    everything, plain = beside(SHORT, part, lambda: swept(SHORT, f"seed=range({runs})") / runs, 1)
    rows.append(_row(group, f"sweep of {runs} runs, all in all", everything, plain))
    own = beside(SHORT, part, lambda: slope(2, 2 + part // 2, SHORT, "seed=range(%d)", "hydra/sweeper=basic"), 1)
    rows.append(_row(group, "sweep with Hydra's own sweeper, a run more", *own))
    plain, serial, double = in_two(SHORT, part, 4 * part, 3 if full else 1)
    rows += [_row(group, SERIAL, serial, plain), _row(group, DOUBLE, double, serial, SERIAL)]
    bare(LONG, 1)
    rounds, group = 5 if full else 1, "runs of a second"
    plain, serial, double = in_two(LONG, 2, 10 if full else 4, rounds)
    rows += [_row(group, PLAIN, plain), _row(group, SERIAL, serial, plain), _row(group, DOUBLE, double, serial, SERIAL)]
    with ProcessPoolExecutor(2, get_context("spawn"), _one_thread) as pool:
        at_once(pool, 1)  # imports torch
        rows.append(_row(group, "two plain loops at once", *beside(LONG, 2, lambda: at_once(pool, 4), rounds)))
    return rows


def collecting(num: int) -> list[Row]:
    """Seconds of ``collect`` on copies of one run folder: the first time, with nothing new, and with one new run."""
    with tempfile.TemporaryDirectory() as name:
        sweep = Path(name) / "s"
        command = [sys.executable, "-m", "experiments.measure", "-m", *options(SHORT), f"results={name}", "sweep=s"]
        subprocess.run([*command, "seed=0,1"], check=True, stdout=subprocess.DEVNULL)
        first, second = folders(sweep)
        for number in range(num - 2):
            shutil.copytree(first, sweep / f"copy{number:06d}")
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            collected = archive_collecting.collect(sweep)
            times.append(time.perf_counter() - begin)
        (second / "status.json").touch()
        begin = time.perf_counter()
        archive_collecting.collect(sweep)
        times.append(time.perf_counter() - begin)
        assert collected.manifest["runs"] == num
    what = ("the first time", "nothing is new", "one run is new")
    return [Row(f"collect, {num} runs", "", w, "seconds", t) for w, t in zip(what, times, strict=True)]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _row(group: str, what: str, seconds: Sequence[float], reference: Sequence[float] = (), name: str = PLAIN) -> Row:
    """Medians and quartiles over the rounds, of seconds and of their ratios to a reference in the same round."""
    low, value, high = np.quantile(seconds, QUARTILES)
    quartiles = {} if len(seconds) == 1 else {"low": low, "high": high}
    if not reference:
        return Row(group, "", what, "seconds", value, **quartiles, num=len(seconds))
    low, ratio, high = np.quantile(np.divide(seconds, reference), QUARTILES)
    ratios = {"ratio": ratio} if len(seconds) == 1 else {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    return Row(group, "", what, "seconds", value, **quartiles, num=len(seconds), reference=name, **ratios)


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
