"""Ctrl-C at any instruction of a measurement: what is left in the model, in torch and in the process.

    python -m benchmarks.interrupts [--count 2000] [--seed 0] [--processes 2] [--only PATTERN] [--output FOLDER]

Each measurement of `benchmarks.interrupting.subjects` is interrupted in these ways, in turn:

- raised: a trace function raises KeyboardInterrupt at an instruction of gradscope or of contextlib.
- interrupt_main: a trace function calls `_thread.interrupt_main` (PyErr_SetInterrupt) at an instruction of any Python
  function, of torch and pandas, too.
- raised while cleaning, interrupt_main while cleaning: the same, only in functions that enter, leave or restore
  something, and in the generators of context managers.
- signal: another process sends SIGINT at a random moment.
- signals: another process sends four, within 4 ms, as somebody does who presses Ctrl-C again and again.

For an instruction, the function is drawn first, and then one of the times that it runs an instruction.  So rare
functions are met as often as those of loops.  Afterwards no hook may be left or lost, and nothing may be changed
(`benchmarks.interrupting.states`).  The same measurement, run again, must have the numbers of an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from benchmarks.interrupting.states import differences, hooks, state
from benchmarks.interrupting.subjects import SUBJECTS, data, numbers
from benchmarks.interrupting.ways import ACTIONS, ALL, OWN, Instructions, handling, sender
from benchmarks.tables.provenance import manifest

OUTPUT = Path("results/benchmarks")
CALLERS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
}
TRACED = {
    "raised": (OWN, False), "interrupt_main": (ALL, False),
    "raised while cleaning": (OWN, True), "interrupt_main while cleaning": (ALL, True),
}  # fmt: skip
WAYS = (*TRACED, "signal", "signals")
SLOW = ("report",)  # gets real signals, and fewer: a trace would stop at each of the million letters of a page
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
FAILURES = ("hooks_left", "state_changed", "wrong_result", "wrong_afterwards")


class Subject:
    """A measurement on one network, which is interrupted again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        make, self.measurement = SUBJECTS[name]
        self.model, self.x = make(), data()
        self.expected: dict[str, tuple[Any, float]] = {}
        self.traces: dict[str, Instructions] = {}

    def run(self) -> Any:
        """One measurement: its numbers, or its error."""
        try:
            return numbers(self.measurement(self.model, self.x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]

    def undisturbed(self, caller: str) -> tuple[Any, float]:
        """The numbers and the seconds of a measurement that nothing interrupts."""
        if caller not in self.expected:
            self.run()  # the first use imports parts of torch
            begin = time.perf_counter()
            found = self.run()
            self.expected[caller] = found, time.perf_counter() - begin
        return self.expected[caller]

    def trace(self, way: str, chance: random.Random) -> Instructions:
        """A trace that interrupts at a random instruction."""
        if way not in self.traces:
            scope, cleaning = TRACED[way]
            self.traces[way] = Instructions(scope, cleaning=cleaning)
            self.traces[way].count(self.run)
        trace = self.traces[way]
        trace.choose(chance, ACTIONS[way.partition(" ")[0]])
        return trace


def one(subject: Subject, way: str, caller: str, chance: random.Random, send: Callable[..., Any]) -> dict[str, Any]:
    """Interrupt one measurement; returns a row of the table."""
    with CALLERS[caller](), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a small network causes some
        expected, seconds = subject.undisturbed(caller)
        model, x = subject.model, subject.x
        trace = subject.trace(way, chance) if way in TRACED else None
        held, before = sorted(hooks(model, x)), state(model, x)
        ended, found = "finished", None
        try:
            if trace is not None:
                found = trace.run(subject.run)
            else:
                delays = [chance.random() * seconds] + [chance.random() * 2e-3 for _ in range(3 * (way == "signals"))]
                found = send(subject.run, delays)
        except KeyboardInterrupt:
            ended = "interrupted"
        left = Counter(hooks(model, x))
        left.subtract(held)
        changed = differences(before, state(model, x))
        wrong = "" if ended == "interrupted" or _same(found, expected) else f"result: {_difference(found, expected)}"
        again = subject.run()
        wrong_next = "" if _same(again, expected) else f"next result: {_difference(again, expected)}"
    return {
        "measurement": subject.name, "way": way, "caller": caller, "where": trace.happened if trace else "",
        "ended": ended, "hooks_left": sum(map(abs, left.values())), "state_changed": len(changed),
        "wrong_result": bool(wrong), "wrong_afterwards": bool(wrong_next),
        "detail": "; ".join(filter(None, [*changed, wrong, wrong_next])),
    }  # fmt: skip


def _same(found: Any, expected: Any) -> bool:
    """Whether numbers are equal up to rounding, which depends on where tensors lie in memory, and words are equal.

    A stream that was interrupted has a result of its own, which says so.
    """
    if found == expected or "interrupted" in str(found):
        return True
    words, numbers_ = zip(
        *((NUMBER.sub("", str(each)), NUMBER.findall(str(each))) for each in (found, expected)), strict=True
    )
    first, second = (np.array(each, float) for each in numbers_)
    return bool(words[0] == words[1] and np.allclose(first, second, rtol=1e-6, atol=1e-9))


def _difference(found: Any, expected: Any) -> str:
    """The first row of a result that differs, and the row that was expected."""
    if isinstance(found, list) and isinstance(expected, list):
        found, expected = next(
            (pair for pair in zip(found, expected, strict=False) if not _same(*pair)), (found, expected)
        )
    return f"{found} instead of {expected}"[:600]


def campaign(count: int, seed: int, only: str = "", ways: tuple[str, ...] = WAYS) -> Iterator[dict[str, Any]]:
    """The rows of ``count`` interrupted measurements.  A network that is not as before is built anew."""
    names = [name for name in SUBJECTS if re.search(only, name)]
    subjects: dict[str, Subject] = {}
    chance = random.Random(seed)
    sys.unraisablehook, before = lambda *_: None, sys.unraisablehook  # interrupts while Python closes a generator
    try:
        with handling(), sender() as send:
            for number in range(count):
                name, way = names[number % len(names)], ways[number // len(names) % len(ways)]
                if name in SLOW and (way in TRACED or number % 8):
                    name = names[0]
                caller = chance.choice(list(CALLERS))
                subject = subjects.get(name) or subjects.setdefault(name, Subject(name))
                row = one(subject, way, caller, chance, send)
                if any(row[failure] for failure in FAILURES):
                    del subjects[name]
                yield row
    finally:
        sys.unraisablehook = before


def part(count: int, seed: int, only: str) -> list[dict[str, Any]]:
    """The rows of one process, which prints failures at once."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for row in campaign(count, seed, only):
        rows.append(row)
        if any(row[failure] for failure in FAILURES) or len(rows) % 100 == 0:
            print(f"{len(rows)} measurements", *(row.values()), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per measurement, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="interrupt the measurements whose name this pattern finds")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    begin, num = time.perf_counter(), options.processes
    shares = [options.count // num + (number < options.count % num) for number in range(num)]
    seeds = [num * options.seed + number for number in range(num)]
    with ProcessPoolExecutor(num, get_context("spawn")) as pool:
        frame = pd.DataFrame(list(chain.from_iterable(pool.map(part, shares, seeds, [options.only] * num))))
    counts = {name: int(frame[name].sum()) for name in FAILURES}
    about = manifest(
        measurements=len(frame), interrupted=int((frame["ended"] == "interrupted").sum()), failures=counts,
        seed=options.seed, seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output / "interrupts.csv", index=False)
    (options.output / "interrupts.json").write_text(json.dumps(about, indent=2) + "\n")
    Console().print({"measurements": len(frame), "interrupted": about["interrupted"]} | counts)


if __name__ == "__main__":
    main()
