"""Measure how often intervals hold, and how often verdicts are right.

    python -m benchmarks.coverage [--networks 200] [--processes 2] [--minutes M] [--part NAME] [--output FOLDER]
    python -m benchmarks.coverage --quick

The campaign measures 54 cells: six architectures, three depths and three widths.  It takes hours on two cores.  It can
be stopped at any time and resumes where it stopped; --minutes ends it early.  Measured profiles are kept under
results/calibration/runs.  The tables hold one row per cell and setting:

    growth.csv           coverage and width of the interval of the rate, decided and wrong verdicts
    characteristics.csv  how often each verdict is given at true rates of 0.97, 1, 1.01, 1.03 and 1.07
    estimates.csv        coverage of all other intervals
    transformers.csv     coverage of the intervals of GSC by position, and of coherence
    README.md            what these tables say

With --quick, three small cells are measured into a temporary folder, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from scipy import stats

from benchmarks.coverage import estimates, growth, page, transformers
from benchmarks.coverage.networks import CELLS, Cell, complete
from benchmarks.tables.provenance import manifest

OUTPUT = Path("results/calibration")
QUICK = [Cell("relu", 20, 50), Cell("tanh+layer", 20, 50), Cell("GPT-like", 20, 50)]
GROUPS = 1000


def frames(tables: Iterable[growth.Tables]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of all cells."""
    rates, characteristics = zip(*tables, strict=True)
    return pd.DataFrame(list(chain(*rates))), pd.DataFrame(list(chain(*characteristics)))


def summary(rates: pd.DataFrame, characteristics: pd.DataFrame, lost: int, common: int) -> dict[str, float]:
    """The numbers that the campaign is about."""
    untouched = rates[~rates["tuned"]]
    num = page.num_trials(rates)
    hits = (rates["coverage"] * num).round()
    return {
        "networks per cell": int(rates["measured"].min()),
        "coverage, mean over cells": float(rates["coverage"].mean()),
        "coverage, mean over cells on which nothing was tuned": float(untouched["coverage"].mean()),
        "coverage, mean over cells, networks measured after all choices": float(rates["coverage_fresh"].mean()),
        "coverage, worst cell": float(rates["coverage"].min()),
        "cells below 93 %": int((rates["coverage"] < 0.93).sum()),
        "cells below 93 %, beyond chance (1 %)": int(np.sum(stats.binom.cdf(hits, num, 0.93) < 0.01)),
        "cells": len(rates),
        "width over ideal, median over cells": float(rates["relative_width"].median()),
        "width over ideal, worst cell": float(rates["relative_width"].max()),
        "wrong verdicts, worst cell": float(max(rates["wrong"].max(), characteristics["wrong"].max())),
        "wrong verdicts, mean": float(pd.concat([rates["wrong"], characteristics["wrong"]]).mean()),
        "groups with a common verdict": common,
        "of these, weaker when pooled": lost,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--part", choices=("all", "growth", "estimates", "transformers"), default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    console = Console()
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            complete(Path(name), QUICK, range(growth.FEWEST))
            rates, characteristics = frames([growth.tables_of(Path(name), cell, growth.FEWEST) for cell in QUICK])
            lost, common = growth.weaker(growth.read(Path(name), QUICK), 20)
            console.print(
                summary(rates, characteristics, lost, common),
                estimates.run(Path(name), quick=True, processes=options.processes),
                transformers.run(Path(name), quick=True),
            )
        return
    if options.part in ("all", "estimates"):
        console.print(estimates.run(options.output, quick=False, processes=options.processes))
    if options.part in ("all", "transformers"):
        console.print(transformers.run(options.output, quick=False))
    if options.part in ("all", "growth"):
        console.print(growth_campaign(options))


def growth_campaign(options: argparse.Namespace) -> dict[str, float]:
    """Measure the networks that are missing, and write the tables of the growth rate."""
    runs = options.output / "runs"
    deadline = None if options.minutes is None else time.time() + 60 * options.minutes
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        shares = [range(start, options.networks, options.processes) for start in range(options.processes)]
        list(pool.map(complete, [runs] * len(shares), [CELLS] * len(shares), shares, [deadline] * len(shares)))
        rates, characteristics = frames(
            pool.map(growth.tables_of, [runs] * len(CELLS), CELLS, [options.networks] * len(CELLS))
        )
    lost, common = growth.weaker(growth.read(runs, most=options.networks), GROUPS)
    rates.to_csv(options.output / "growth.csv", index=False, float_format="%.5g")
    characteristics.to_csv(options.output / "characteristics.csv", index=False, float_format="%.5g")
    found = summary(rates, characteristics, lost, common)
    (options.output / "growth.json").write_text(json.dumps(manifest(**found), indent=1) + "\n")
    page.write(options.output)
    return found


if __name__ == "__main__":
    main()
