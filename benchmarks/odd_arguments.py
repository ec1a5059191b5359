"""Odd values for the arguments of every public function.

    python -m benchmarks.odd_arguments [--seed 0] [--calls 1000] [--output FOLDER]

Each call is a sensible call of one public function in which one argument is replaced by an odd value.  The benchmark
counts four failures, and demands 0 of each:

- ``raw``: an exception that no ``raise`` of gradscope made, such as a TypeError inside torch.  An exception that the
  user's own function or model raised, or that names its call, is not raw.
- ``unnamed``: an exception of gradscope that does not name the argument.
- ``nan``: a result with more NaN than the sensible call has.
- ``hang``: a call that takes more than 60 seconds of CPU time.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import faulthandler
import inspect
import json
import math
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from rich.console import Console

import gradscope as gs
from benchmarks.odd import alike, calls, values, words
from benchmarks.tables.provenance import manifest

OUTPUT = Path("results/benchmarks")
LIBRARY = str(Path(gs.__file__).parent)
USERS = {str(module.__file__) for module in (alike, calls, values)}
SECONDS = 60  # of CPU time, so that other work on the machine does not count
MOST_BYTES = 8 << 30  # of memory
FAILURES = ("raw", "unnamed", "nan", "hang")
# Seeds whose failures were mended; the counts of any other seed are unbiased.
MENDED = (0, 7, 11, *range(101, 109), 202, 301, 998, 999)


Case = tuple[str, str, str]  # function, argument and name of an odd value


class HangError(BaseException):
    """A call took too long."""


def drawn(seed: int, num: int) -> Iterator[Case]:
    """Each function in turn; one of its arguments; an odd value of any type, or of about the type of the argument."""
    draw, names = random.Random(seed), sorted(calls.CALLS)
    for number in range(num):
        function, arguments = calls.CALLS[name := names[number % len(names)]]()
        argument = draw.choice(sorted(arguments))
        known = inspect.signature(function).parameters
        annotation = f"{argument}: {known[argument].annotation}" if argument in known else argument
        odd = values.VALUES if draw.random() < 0.4 else alike.like(annotation)
        yield name, argument, draw.choice(sorted(odd))


def judged(name: str, argument: str, odd: str) -> dict[str, Any]:
    """One call: its outcome, one of "returned" and `FAILURES` and "refused", and what it said."""
    begin, row = time.perf_counter(), {"function": name, "argument": argument, "value": odd}
    try:
        with deadline(SECONDS):
            function, arguments = calls.CALLS[name]()
            given = alike.ALL[odd]()
            found = function(**{**arguments, argument: given})
            silent = found is not given and num_nan(found) > usual_nan(name)
            outcome, said = "nan" if silent else "returned", type(found).__name__
    except HangError:
        outcome, said = "hang", ""
    except BaseException as error:
        answer = isinstance(error, AssertionError) and name.startswith("assert_")  # what these functions are for
        outcome = "returned" if answer else verdict(error, argument, given)
        said = f"{type(error).__name__}: {error}"
    plt.close("all")
    return row | {"outcome": outcome, "seconds": round(time.perf_counter() - begin, 2), "said": clean(said)}


def verdict(error: BaseException, argument: str, given: Any) -> str:
    """Whether a refusal is raw, or does not name the argument."""
    frame, _ = [*traceback.walk_tb(error.__traceback__)][-1]
    last = traceback.extract_tb(error.__traceback__)[-1]
    calls_it = f"{argument}(" in (last.line or "") or any(value is given for value in frame.f_locals.values())
    # A function of the user that is written in C has no frame of its own.
    if last.filename in USERS or (calls_it and isinstance(given, (type, BuiltinFunctionType))):
        return "refused"
    if not (last.filename.startswith(LIBRARY) and (last.lineno or 0) in raises(last.filename)):
        return "raw"
    names = (*words.ALIASES.get(argument, ()), argument)
    return "refused" if any(name in str(error) for name in names) else "unnamed"


@cache
def raises(filename: str) -> frozenset[int]:
    """The lines of all ``raise`` statements of a file."""
    nodes = [node for node in ast.walk(ast.parse(Path(filename).read_text())) if isinstance(node, ast.Raise)]
    return frozenset(line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


@cache
def usual_nan(name: str) -> int:
    """The number of NaN in the result of the sensible call."""
    function, arguments = calls.CALLS[name]()
    return num_nan(function(**arguments))


def num_nan(found: Any) -> int:
    """The number of NaN in a result: in numbers, arrays, columns of values, and fields."""
    if isinstance(found, float):
        return int(math.isnan(found))
    if isinstance(found, torch.Tensor):
        return int(torch.isnan(found).sum()) if found.is_floating_point() and not found.is_meta else 0
    if isinstance(found, np.ndarray):
        return int(np.isnan(found).sum()) if found.dtype.kind == "f" else 0
    if isinstance(found, pd.DataFrame):
        return int(found["value"].isna().sum()) if "value" in found else 0
    if isinstance(found, dict):
        return sum(map(num_nan, found.values()))
    if isinstance(found, (list, tuple)):
        return sum(map(num_nan, found))
    if isinstance(found, gs.Matrix):  # has no coefficients from a layer to one before it
        return num_nan(np.triu(found.log10_values))
    if isinstance(found, gs.meanfield.PhaseDiagram):  # has NaN where lengths grow without bound, as documented
        return 0
    if dataclasses.is_dataclass(found) and type(found).__module__.startswith("gradscope"):
        names = [field.name for field in dataclasses.fields(found)]
        own = [getattr(found, one) for one in names if "stderr" not in one and not one.startswith("_")]
        return sum(num_nan(value) for value in own if not dataclasses.is_dataclass(value))
    return 0


def clean(text: str) -> str:
    """The beginning of a message on one line."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:200]


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise `HangError` in the block after these seconds of CPU time; end the process if that does not help."""

    def late(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, late)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def campaign(cases: list[Case]) -> list[dict[str, Any]]:
    """The rows of all calls, made in a temporary folder by a fork; another fork continues if a call ends the first."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(cases):
        with tempfile.TemporaryDirectory() as folder:
            reading, writing = os.pipe()
            if not (pid := os.fork()):
                os.chdir(folder)
                work(cases[len(rows) :], writing)
            os.close(writing)
            with os.fdopen(reading) as lines:
                for line in lines:
                    rows.append(json.loads(line))
                    tell(rows[-1])
            os.waitpid(pid, 0)
        if len(rows) < len(cases):
            rows.append(dict(zip(("function", "argument", "value"), cases[len(rows)], strict=True)) | {
                "outcome": "hang", "seconds": 0.0, "said": "the process ended",
            })  # fmt: skip
            tell(rows[-1])
    return rows


def tell(row: dict[str, Any]) -> None:
    """Print a call that failed."""
    if row["outcome"] in FAILURES:
        text = "{outcome}: {function}({argument}={value}): {said}".format(**row)
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def work(cases: list[Case], out: int) -> None:
    """In a fork of this process: write a line for each call, and exit."""
    mpl.use("Agg")
    warnings.simplefilter("ignore")
    with contextlib.suppress(Exception), os.fdopen(out, "w") as lines, Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        gs.frames.save(calls.result("records"), "frame.parquet")
        for case in cases:
            lines.write(json.dumps(judged(*case)) + "\n")
            lines.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per call, and print the counts and the failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork inherits the locks of OpenMP, but not its threads
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    begin, cases = time.perf_counter(), list(drawn(options.seed, options.calls))
    frame = pd.DataFrame(campaign(cases))
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output / "odd_arguments.csv", index=False)
    counts = {name: int((frame["outcome"] == name).sum()) for name in (*FAILURES, "refused", "returned")}
    about = manifest(
        calls=len(frame), functions=frame["function"].nunique(), seed=options.seed,
        seed_used_for_mending=options.seed in MENDED, num_seeds_used_for_mending=len(MENDED), outcomes=counts,
        slowest_seconds=float(frame["seconds"].max()), seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip
    (options.output / "odd_arguments.json").write_text(json.dumps(about, indent=2) + "\n")
    Console().print(counts)


if __name__ == "__main__":
    main()
