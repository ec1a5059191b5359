"""Peak memory of backward sweeps relative to the outputs of all layers; each peak is measured in its own process.

    python -m benchmarks.memory WHAT DEPTH WIDTH BATCH PROBES        prints bytes

The peak is the largest resident set during the call minus the resident set before it.  A tiny network is measured
first, so that code loaded at first use is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import gradscope as gs
from benchmarks.race.chains import Chain, mlp
from benchmarks.race.sizes import Sizes
from benchmarks.tables.rows import Row

GRAPH = "forward pass that keeps its graph"
MATRIX = "matrix, 1 probe a target"
PROFILE = "profile"
EXACT = "profile, exact"
GROWTH = "growth of the peak"
BOUND = "graph + bound of docs/estimates.md for the matrix"
CASES = {"graph": GRAPH, "matrix": MATRIX, "profile": PROFILE, "exact": EXACT}


def run(case: str, chain: Chain, probes: int) -> object:
    """Run the call whose peak is measured; the caller must keep the result until the peak is read."""
    if case == "graph":
        return chain.model(chain.x)
    if case == "matrix":
        return gs.gsc_matrix(chain.model, chain.x, probes=1)
    return gs.gsc(chain.model, chain.x, probes="exact" if case == "exact" else probes)


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its high-water mark) of this process, in bytes.

    ``ru_maxrss`` of getrusage would be wrong here, because a process inherits it from its parent.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak(case: str, depth: int, width: int, batch: int, probes: int) -> int:
    """Largest increase of this process's resident set during one call, in bytes."""
    run(case, mlp(2, 4, 3), 2)
    chain = mlp(depth, width, batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    result = run(case, chain, probes)
    after = resident("VmHWM")
    del result
    return after - before


def sweep_bound(depth: int, width: int, batch: int) -> int:
    """The bound of docs/estimates.md in bytes, for one float32 cotangent per target, all pulled back at once."""
    cotangents = depth * width * batch * 4
    return 5 * cotangents + (128 << 20) + 16 * depth * (depth + 1) * batch


def memory(group: str, sizes: Sizes, repeats: int) -> Iterator[Row]:
    """Peaks of the matrix and of a forward pass at two depths, and of profiles with few, many and exact probes."""
    if not Path("/proc/self/clear_refs").exists():
        return
    _, width, batch = sizes.deep
    peaks = {}
    for depth in sizes.memory_depths:
        activations = depth * width * batch * 4
        for case in ("graph", "matrix"):
            peaks[case, depth] = _row(group, f"depth {depth}", case, (depth, width, batch, 1), activations)
            yield peaks[case, depth]
        bound = peaks["graph", depth].value + sweep_bound(depth, width, batch)
        reference = "outputs of all layers"
        yield Row(group, f"depth {depth}", BOUND, "bytes", bound, reference=reference, ratio=bound / activations)
    shallow, deep = sizes.memory_depths
    for case in ("graph", "matrix"):
        growth = peaks[case, deep].value / max(peaks[case, shallow].value, 1)
        yield Row(group, f"depth {deep} over {shallow}", f"{GROWTH}: {CASES[case]}", "times", growth)
    for probes in sizes.memory_probes:
        yield _row(group, f"probes {probes}", "profile", (*sizes.deep, probes), sizes.deep[0] * width * batch * 4)
    yield _row(group, "", "exact", (*sizes.deep, 1), sizes.deep[0] * width * batch * 4)


def _row(group: str, label: str, case: str, numbers: tuple[int, ...], activations: int) -> Row:
    """The peak of one new process, in bytes and relative to the outputs of all layers."""
    command = [sys.executable, "-m", "benchmarks.memory", case, *map(str, numbers)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    value = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)
    reference = "outputs of all layers"
    return Row(group, label, CASES[case], "bytes", value, reference=reference, ratio=value / activations)


if __name__ == "__main__":
    print(peak(sys.argv[1], *map(int, sys.argv[2:])))
