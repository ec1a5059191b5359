"""Files that were made to do harm, given to every command that reads files of others.

    python -m benchmarks.hostile_files [--runs 20000] [--output FOLDER] [--quick]

Each case puts one hostile file (or a few) into a sweep beside one sound run, and runs ``collect``, ``status`` and
``figures`` on it, or ``rerun`` on the run, or resumes from a checkpoint, or reads images.  Every command is a process
of its own.  The benchmark counts five failures, and demands 0 of each: the command ran code of the file (which creates
a marker), changed a file outside the sweep, ended with a traceback or a signal, printed control characters, or took
more than 1 GB of memory.  ``collect`` must also name the bad run.  In the end, a sweep of many copies of one run is
collected, and its time and memory are written down.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks.hostile.cases import CASES, MARKER, SOUND, Case
from benchmarks.tables.provenance import manifest

OUTPUT = Path("results/benchmarks")
MOST_BYTES = 1 << 30
TIMEOUT = 120
FAILURES = ("code_run", "written_outside", "traceback", "controls", "memory")
PRELOADED = ("collect", "status", "figures", "rerun", "measure", "train")
COMMAND = (
    "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL); "
    "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, done.returncode)"
)


def run(case: Case, command: str, place: Path) -> dict[str, Any]:
    """One command on one case: how it ended, its peak memory, and what it did that it must not do."""
    module, *arguments = [word.format(place=place, sweep=place / "results" / "s") for word in command.split()]
    before, begin = outside(place), time.perf_counter()
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if not pid:
            _execute(module, arguments, out.fileno())
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        said = out.read().decode(errors="replace")
    code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
    controls = any(not c.isprintable() and c not in "\n\t" for c in said)
    named = case.run is None or module != "experiments.collect" or case.run in said
    return {
        "case": case.name, "command": module.rpartition(".")[2], "code": code, "peak_mb": round(peak / 1e6),
        "seconds": round(time.perf_counter() - begin, 2),
        "code_run": (place / MARKER).exists(), "written_outside": outside(place) != before,
        "traceback": "Traceback (most recent" in said or code < 0, "controls": controls,
        "memory": peak > MOST_BYTES, "named": named,
        "said": said.strip().splitlines()[-1].replace(str(place), "")[:120] if said.strip() else "",
    }  # fmt: skip


def _execute(module: str, arguments: list[str], out: int) -> None:
    """In a fork of this process, which has imported everything: run a command, and exit."""
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(TIMEOUT)  # which ends the process
    os.environ.update(COLUMNS="200", NO_COLOR="1")
    sys.argv[1:], code = arguments, 0
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def outside(place: Path) -> dict[str, tuple[int, int]]:
    """Sizes and time stamps of the files in the folder ``outside``, which no command may change."""
    paths = sorted((place / "outside").rglob("*"))
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def campaign(cases: list[Case], sound: Path) -> list[dict[str, Any]]:
    """The rows of all cases."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            shutil.copytree(sound, place / "results")
            (place / "outside").mkdir()
            (place / "outside" / "kept.txt").write_text("kept")
            if not (pid := os.fork()):  # what a maker takes in memory, a fork of this process would count, too
                case.make(place)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0, f"{case.name} could not be made"
            for command in case.commands:
                rows.append(run(case, command, place))
                Console().print(f"{case.name}: {rows[-1]['said']}", markup=False, highlight=False, soft_wrap=True)
    return rows


def many(sound: Path, num: int) -> dict[str, float]:
    """Seconds and peak memory of ``collect`` on a sweep of copies of one run."""
    with tempfile.TemporaryDirectory() as name:
        sweep = Path(name) / "s"
        for number in range(num):
            shutil.copytree(sound / "s" / SOUND, sweep / f"copy-{number:012x}")
        command = [sys.executable, "-m", "experiments.collect", f"results={name}", "sweep=s"]
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND, *command], capture_output=True, text=True, check=True)
        took, cpu = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        peak, code = (int(word) for word in done.stdout.rpartition("PEAK ")[2].split()[:2])
        assert code == 0 and f"{num} runs" in done.stdout, done.stdout + done.stderr
    return {"runs": num, "seconds": round(took, 1), "peak_bytes": peak, "cpu_seconds": round(cpu.ru_utime, 1)}


def make_sound(results: Path) -> None:
    """A sweep ``s`` of one run that a measurement left."""
    options = ["model.depth=4", "model.width=10", "data.batch_size=8", "probes=2", "seed=0,1"]
    command = [sys.executable, "-m", "experiments.measure", "-m", *options, f"results={results}", "sweep=s"]
    subprocess.run(command, check=True, capture_output=True)
    folders = sorted(path.parent for path in (results / "s").glob("*/status.json"))
    folders[0].rename(results / "s" / SOUND)
    shutil.rmtree(folders[1])
    shutil.rmtree(results / "s" / "launches")


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per case and command, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, help="of the large sweep; 0: none")
    parser.add_argument("--quick", action="store_true", help="every tenth case, and a large sweep of 100 runs")
    parser.add_argument("--only", default="", help="run the cases whose name this pattern finds; other rows are kept")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    for command in PRELOADED:
        importlib.import_module(f"experiments.{command}")
    with tempfile.TemporaryDirectory() as name:
        make_sound(Path(name))
        cases = CASES[::10] if options.quick else [case for case in CASES if re.search(options.only, case.name)]
        rows = campaign(cases, Path(name))
        large = many(Path(name), 100 if options.quick else options.runs) if options.runs else {}
    path, own = options.output / "hostile_files.csv", {case.name for case in cases}
    known = {case.name for case in CASES}
    frame = pd.DataFrame(rows)
    if options.only and path.exists():
        kept = pd.read_csv(path)
        frame = pd.concat([kept[kept["case"].isin(known - own)], frame], ignore_index=True)
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    counts = {name: int(frame[name].sum()) for name in FAILURES} | {"not_named": int((~frame["named"]).sum())}
    about = manifest(
        cases=frame["case"].nunique(), commands=len(frame), failures=counts, collect=large,
        seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip
    (options.output / "hostile_files.json").write_text(json.dumps(about, indent=2) + "\n")
    Console().print({"cases": about["cases"], "commands": len(frame)} | counts | {"collect": large})


if __name__ == "__main__":
    main()
