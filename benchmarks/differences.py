"""How often `gradscope.diff` names the layer that differs, and how precise paired probes are.

    python -m benchmarks.differences [--equal 1000] [--planted 100] [--first-seed 50000] [--processes 2]
                                     [--output FOLDER] [--quick]

- **planted**: one module of b is changed (`benchmarks.pairs`); ``first`` must be its name.  In most pairs b also
  computes in another way: in float64, with sums in another order, or inside a wrapper.
- **equal**: b computes the same function in another dtype, with sums in another order, on a permuted batch, by other
  formulas, or under autocast.  An alarm is a named layer, or any row that differs.
- **precision**: the change of log10 GSC of all layers with a planted change, from 8 probes, against its exact value.
  Paired: both models have the same probes.  Independent: each has its own.  Both cost the same.
- **coverage**: the exact change over 8,192 samples must lie in the intervals of all layers, from 32 other samples and 8
  probes.

All thresholds were set before the seeds from 50,000 on were looked at; seeds from 10,000 on were for development.
Under five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

import gradscope as gs
from benchmarks.pairs import CHANGES, EQUAL, changed, equal
from benchmarks.tables.provenance import manifest
from gradscope.comparing.differences.conditions import first
from gradscope.comparing.differences.difference import GSC, LENGTH
from gradscope.comparing.differences.paired import Options, gains
from gradscope.forward.inputs import as_batch

OUTPUT = Path("results/calibration")
PROBES = 4
MEASURED = 10  # every tenth pair also has statistics, which take most of the time
FEW, REPETITIONS = 8, 10  # probes, and their repetitions, of the precision
MANY, BATCH = 8192, 32  # samples of the truth, and of a measurement, of the coverage
CELLS = [
    (name, kind)
    for name in ("mlp tanh", "flat gelu", "mlp relu+layer", "residual tanh", "flat relu")
    for kind in ("weights x 1.05", "activation swapped")
]
STATISTICS = [gs.measures.PreactivationStd(), gs.measures.SignDiversity(), gs.measures.Kurtosis()]


def quietly() -> None:
    """Prepare a process: one thread, and no warnings of networks with few layers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)


def compared(kind: str, seed: int) -> dict[str, Any]:
    """Compare a pair; returns a row of the table."""
    begin, pair = time.process_time(), equal(seed) if kind == EQUAL else changed(kind, seed)
    functional = pair.network.startswith("functional")  # has no modules of which to take statistics
    measures = STATISTICS if seed % MEASURED == 0 and not functional else []
    found = gs.diff(pair.a, pair.b, pair.x, probes=PROBES, measures=measures)
    alarms = found.frame.loc[found.frame["differs"], "quantity"].unique()
    right = found.first in pair.changed if pair.changed else found.first is None and not len(alarms)
    return {
        "kind": pair.kind, "seed": seed, "network": pair.network, "condition": pair.condition,
        "changed": " ".join(pair.changed), "first": found.first or "", "quantities": " ".join(alarms), "right": right,
        "statistics": bool(measures), "seconds": round(time.process_time() - begin, 3),
    }  # fmt: skip


def measured(model: Any, x: torch.Tensor, probes: int | str, seed: int) -> dict[str, float]:
    """log10 GSC of every row of one model."""
    subject = first(model, as_batch(x, forward=None, loss_fn=None))
    found = gains(subject, Options(None, None, None, None, probes, seed))
    return {name: gain.log10_value for name, gain in found.rows.items()}


def precision(kind: str, seed: int) -> dict[str, Any]:
    """Errors of the change of log10 GSC of all rows, root mean square over rows and repetitions."""
    pair = changed(kind, seed, background="same")
    a, b = (measured(model, pair.x, "exact", 0) for model in (pair.a, pair.b))
    rows = [name for name in a if name in b]
    truth = np.array([b[name] - a[name] for name in rows])
    errors: dict[str, list[float]] = {"paired": [], "independent": []}
    for number in range(REPETITIONS):
        one, same, other = (
            measured(model, pair.x, FEW, key)
            for model, key in ((pair.a, number), (pair.b, number), (pair.b, number + REPETITIONS))
        )
        for name, second in (("paired", same), ("independent", other)):
            found = np.array([second[row] - one[row] for row in rows])
            errors[name].append(float(np.square(found - truth).mean()))
    rms = {name: float(np.sqrt(np.mean(squares))) for name, squares in errors.items()}
    return {"kind": kind, "seed": seed, "network": pair.network, "change": float(np.abs(truth).max()), **rms}


def coverage(name: str, kind: str, seed: int, batches: int) -> list[dict[str, Any]]:
    """Whether the intervals of all layers contain the change over many samples, for several batches."""
    pair = changed(kind, seed, name=name, background="same")
    generator = torch.Generator().manual_seed(seed)
    width = pair.x.shape[1]
    truth = gs.diff(pair.a, pair.b, torch.randn(MANY, width, generator=generator), probes="exact", measures=[]).frame
    known = truth.set_index(["quantity", "layer"])["value"]
    rows = []
    for number in range(batches):
        found = gs.diff(pair.a, pair.b, torch.randn(BATCH, width, generator=generator), probes=FEW, measures=[]).frame
        for quantity in (GSC, LENGTH):
            own = found[found["quantity"] == quantity].set_index(["quantity", "layer"])
            value, slack = known.reindex(own.index), own["rounding"]
            inside = (value >= own["low"] - slack) & (value <= own["high"] + slack)
            rows.append({"network": name, "kind": kind, "quantity": quantity, "batch": number,
                         "each": float(inside.mean()), "all": bool(inside.all())})  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per pair, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("equal", 1000), ("planted", 100), ("first-seed", 50_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few pairs of every part")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    nums = (9, 2, 1, 2) if options.quick else (options.equal, options.planted, 10, 20)
    num_equal, num_planted, num_precision, num_batches = nums
    seed = options.first_seed
    planted = [(kind, number) for kind in CHANGES for number in range(seed, seed + num_planted)]
    pairs = planted + [(EQUAL, number) for number in range(seed, seed + num_equal)]
    precise = [(kind, number) for kind in CHANGES for number in range(seed, seed + num_precision)]
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=quietly) as pool:
        rows = pool.map(compared, *zip(*pairs, strict=True), chunksize=4)
        parts = pool.map(precision, *zip(*precise, strict=True))
        cells = pool.map(partial(coverage, seed=seed, batches=num_batches), *zip(*CELLS, strict=True))
        frame, errors = pd.DataFrame(rows), pd.DataFrame(parts)
        covered = pd.DataFrame([row for cell in cells for row in cell])
    errors["ratio"] = errors["independent"] / errors["paired"]
    counts = frame.groupby("kind", sort=False)["right"].agg(pairs="count", right="sum").reset_index()
    ratios = errors.groupby("kind", sort=False).agg(
        paired=("paired", "median"), independent=("independent", "median"), ratio=("ratio", "median"),
        smallest=("ratio", "min"), at_least_10=("ratio", lambda ratio: float((ratio >= 10).mean())),
    ).reset_index()  # fmt: skip
    of_cells = covered.groupby(["quantity", "network", "kind"], sort=False)[["each", "all"]].mean().reset_index()
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output / "differences.csv", index=False)
    about = manifest(
        thresholds_set_on="seeds from 10,000 to 10,250", first_seed=seed, counts=counts.to_dict("records"),
        conditions=frame[frame["kind"] == EQUAL].groupby("condition", sort=False)["right"].mean().to_dict(),
        precision=ratios.to_dict("records"), coverage=of_cells.to_dict("records"),
        seconds=round(float(frame["seconds"].sum()), 1),
    )  # fmt: skip
    (options.output / "differences.json").write_text(json.dumps(about, indent=2) + "\n")
    for table in (counts, ratios, of_cells, covered.groupby("quantity")[["each", "all"]].mean().reset_index()):
        Console().print(table.to_string(index=False), highlight=False)


if __name__ == "__main__":
    main()
