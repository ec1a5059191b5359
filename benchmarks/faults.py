"""Plant faults in one layer of a network, and count how often gradscope names this layer first.

    python -m benchmarks.faults [--seeds 20] [--healthy 200] [--first-seed 40000] [--output FOLDER] [--quick]

Every kind of fault is planted in networks of several architectures and widths (`benchmarks.planted`).
`gradscope.compare` names the layer, except for two kinds: `gradscope.Monitor` watches short trainings with a doubled
step size of one layer, and `gradscope.first_nonfinite` seeks the NaN.  A layer counts as named if the first name is
that of the layer, of a module in it, or of the unit that contains it.

All three tools judge every healthy network, the monitor in a training of it.  The network counts as a false alarm if
any of them names anything.  An alarm that gradients vanish or explode (GSC beyond 10^6) is not counted, because it is
true: it says what GSC is, and not that one layer differs.  The column ``extreme`` lists it.

All thresholds were set on seeds from 10,000 to 39,999.  The published rows are of seeds from 50,000 on.

About ten minutes on two cores.  An interrupted run resumes: finished rows of the output are kept.  Delete the output
to measure anew.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch.nn import functional

import gradscope as gs
from benchmarks.planted import ALL, HOSTS, Network, network, plant
from benchmarks.tables.provenance import manifest

OUTPUT = Path("results/calibration")
HEALTHY, STEP, NAN = "healthy", "doubled step", "backward NaN"
COMPARE, MONITOR, NONFINITE = "compare", "Monitor", "first_nonfinite"
EXTREME = ("vanishing", "exploding")
STEPS = 12  # of a training
OPTIMIZERS = ("SGD", "SGD with momentum", "Adam", "AdamW")


def trained(host: Network, doubled: Sequence[str], seed: int) -> tuple[str | None, str, str]:
    """Train with twice the learning rate in these modules.

    Returns what the first alarm names, the optimizer, and "vanishing" or "exploding" if there was such an alarm.
    """
    generator, name = torch.Generator().manual_seed(seed), OPTIMIZERS[(seed + seed // len(ALL)) % 4]
    twice = {id(p) for module in doubled for p in host.model.get_submodule(module).parameters()}
    rate = 1e-3 if name.startswith("Adam") else 1e-2
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate * (1 + chosen)}
        for chosen in (False, True)
        if (parameters := [p for p in host.model.parameters() if (id(p) in twice) == chosen])
    ]
    optimizer: torch.optim.Optimizer
    if name.startswith("Adam"):
        optimizer = getattr(torch.optim, name)(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9 if "momentum" in name else 0.0)
    monitor = gs.Monitor(host.model, host.x, every=10**9, statistics_every=1, max_overhead=None, on_nonfinite="warn")
    for _ in range(STEPS):
        x = torch.randn(host.x.shape, generator=generator)
        if not host.x.is_floating_point():
            x = torch.randint(50, host.x.shape, generator=generator)
        output = host.model(x).flatten(1)
        labels = torch.randint(min(10, output.shape[1]), (len(x),), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(output, labels)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    fired = [(kind, layer) for kind, layer, _ in monitor.alarms.fired]
    named = next((layer for kind, layer in fired if kind not in EXTREME), None)
    return named, name, " ".join(kind for kind, _ in fired if kind in EXTREME)


def one(kind: str, seed: int) -> dict[str, Any]:
    """Plant and seek one fault; returns a row of the table."""
    begin = time.perf_counter()
    hosts = HOSTS.get(kind, ALL)
    host, optimizer, extreme = network(hosts[seed % len(hosts)], seed), "", ""
    planted: tuple[str, ...] = ()
    if kind == STEP:
        planted = host.layers[int(np.random.default_rng([seed, 11]).integers(len(host.layers)))]
    elif kind != HEALTHY:
        planted = plant(host, kind, seed)
    found: dict[str, str | None] = {}
    if kind not in (STEP, NAN):
        found[COMPARE] = gs.compare(host.model, host.x, probes=gs.Deflated(2, 2)).first_deviation
    if kind in (NAN, HEALTHY):
        fault = gs.first_nonfinite(host.model, host.x)
        found[NONFINITE] = fault.layer if fault is not None else None
    if kind in (STEP, HEALTHY):
        found[MONITOR], optimizer, extreme = trained(host, planted, seed)
    tool, named = next(((tool, name) for tool, name in found.items() if name is not None), ("", None))
    return {
        "fault": kind, "seed": seed, "network": host.name, "width": host.width, "depth": len(host.layers),
        "optimizer": optimizer, "planted": " ".join(planted), "tool": tool, "named": named or "",
        "extreme": extreme, "right": right(planted, named), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def right(planted: Sequence[str], named: str | None) -> bool:
    """Whether the name is that of the planted layer, of a part of it, or of what contains it; None if nothing is."""
    if named is None:
        return not planted
    return any(f"{a}.".startswith(f"{b}.") for p in planted for a, b in ((p, named), (named, p)))


def cases(seeds: int, healthy: int, first: int) -> Iterator[tuple[str, int]]:
    """All kinds and seeds of a campaign."""
    for kind in (*HOSTS, HEALTHY):
        for seed in range(first, first + (healthy if kind == HEALTHY else seeds)):
            yield kind, seed


def quietly() -> None:
    """Prepare a process: one thread, and no warnings of batch normalization with large batches or of the monitor."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts by kind of fault: networks, right ones, and the fraction of right ones."""
    counts = frame.groupby("fault", sort=False)["right"].agg(networks="count", right="sum")
    return counts.assign(fraction=counts["right"] / counts["networks"]).reset_index()


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per network, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 20), ("healthy", 200), ("first-seed", 50_000), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="one network per kind of fault, two healthy ones")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    seeds, healthy = (1, 2) if options.quick else (options.seeds, options.healthy)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "faults.csv"
    wanted = list(cases(seeds, healthy, options.first_seed))
    before = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.exists() else []
    rows: list[Any] = [row for row in before if (row["fault"], row["seed"]) in wanted]
    done = {(row["fault"], row["seed"]) for row in rows}
    missing = [case for case in wanted if case not in done]
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=quietly) as pool:
        for row in pool.map(one, *zip(*missing, strict=True)) if missing else ():
            rows.append(row)
            pd.DataFrame(rows).to_csv(path, index=False)
    frame = pd.DataFrame(rows)
    counts = summary(frame)
    alarms = frame[(frame["fault"] == HEALTHY) & ~frame["right"]]
    about = manifest(
        thresholds_set_on="seeds from 10,000 to 39,999", first_seed=options.first_seed, seeds=seeds, healthy=healthy,
        counts=counts.to_dict("records"), false_alarms=alarms["tool"].value_counts().to_dict(),
        extreme=int((frame.loc[frame["fault"] == HEALTHY, "extreme"] != "").sum()),
        seconds=round(float(frame["seconds"].sum()), 1),
    )  # fmt: skip
    (options.output / "faults.json").write_text(json.dumps(about, indent=2) + "\n")
    Console().print(counts.to_string(index=False), highlight=False)


if __name__ == "__main__":
    main()
