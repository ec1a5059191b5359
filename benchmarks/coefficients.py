"""How fast and how exact are coefficients, compared with other tools?

    python -m benchmarks.coefficients [--quick] [--only GROUP] [--repeats N] [--output FOLDER]

The contestants of a group take turns, on two threads.  A ratio is the median of a contestant divided by the median of
the group's reference.  Run nothing else meanwhile: two threads that share a core wait for each other in every product.
``--quick`` uses tiny sizes and one thread, to test that everything runs.  curvlinops takes part if it is installed
(``pip install '.[bench]'``).  Prints one table per group and writes one tidy frame with its manifest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import matrices, memory
from benchmarks.race import errors, speed
from benchmarks.race.demands import demands
from benchmarks.race.peers import HAS_CURVLINOPS
from benchmarks.race.sizes import FULL, QUICK, Sizes
from benchmarks.tables.provenance import manifest
from benchmarks.tables.report import demand_table, table
from benchmarks.tables.rows import Row, to_frame

OUTPUT = Path("results/benchmarks")
REPEATS = 21
QUICK_REPEATS = 3
THREADS = 2
QUICK_THREADS = 1
WIDTH = 150

GROUPS: dict[str, Callable[[str, Sizes, int], Iterable[Row]]] = {
    "selu_50x100": speed.deep,
    "selu_50x1000": speed.wide,
    "relu_dead_outputs": speed.deep_dead,
    "alexnet_a": speed.images,
    "alexnet_a_statistics": speed.images_statistics,
    "resnet_8": speed.images_residual,
    "deflated_vs_plain": errors.deflated_vs_plain,
    "matrix_errors": matrices.matrix_errors,
    "growth": speed.growth,
    "memory": memory.memory,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print each group, then print the demands."""
    options = _options(arguments)
    torch.set_num_threads(QUICK_THREADS if options.quick else THREADS)
    sizes = QUICK if options.quick else FULL
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    console = Console(width=WIDTH)
    if not HAS_CURVLINOPS:
        console.print("curvlinops is not installed and is left out (pip install '.[bench]').", markup=False)
    begin, rows = time.perf_counter(), []
    for group in [options.only] if options.only else GROUPS:
        measured = list(GROUPS[group](group, sizes, repeats))
        console.print(table(group, measured))
        rows += measured
    if shown := list(demands(rows)):
        console.print(demand_table(shown, judged=not options.quick))
    seconds = round(time.perf_counter() - begin, 1)
    output = options.output or (None if options.quick or options.only else OUTPUT)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        to_frame(rows).to_csv(output / "coefficients.csv", index=False, float_format="%.6g")
        about = manifest(quick=options.quick, only=options.only, repeats=repeats, sizes=asdict(sizes), seconds=seconds)
        (output / "coefficients.json").write_text(json.dumps(about, indent=2) + "\n")
        console.print(f"{output / 'coefficients.csv'} ({seconds} s)")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coefficients", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one thread")
    parser.add_argument("--only", choices=GROUPS, metavar="GROUP", help=f"one of {', '.join(GROUPS)}")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"interleaved rounds (default {REPEATS})")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"folder for the results (default {OUTPUT}; with --quick or --only, nothing is written by default)",
    )
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


if __name__ == "__main__":
    main()
