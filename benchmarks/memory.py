"""Peak memory of gradscope's sweeps over that of the activations, each measured in a process of its own.

    python -m benchmarks.memory WHAT DEPTH WIDTH BATCH PROBES        prints bytes

What counts is the highest resident set during the call less the resident set before it, when the library is imported,
the model built, and a tiny network measured once, so that code that loads on first use is not counted.
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
    """The call whose peak is measured; what it returns lives until the peak is read."""
    if case == "graph":
        return chain.model(chain.x)
    if case == "matrix":
        return gs.gsc_matrix(chain.model, chain.x, probes=1)
    return gs.gsc(chain.model, chain.x, probes="exact" if case == "exact" else probes)


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its high-water mark) of this process, in bytes.

    Not ``ru_maxrss`` of getrusage: a process inherits that from the one that started it.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak(case: str, depth: int, width: int, batch: int, probes: int) -> int:
    """Bytes by which the resident set rose at most during one call, in this process."""
    run(case, mlp(2, 4, 3), 2)
    chain = mlp(depth, width, batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident set
    result = run(case, chain, probes)
    after = resident("VmHWM")
    del result
    return after - before


def sweep_bound(depth: int, width: int, batch: int) -> int:
    """The bound of docs/estimates.md, in bytes: one float32 cotangent a target, pulled back in one bundle."""
    bundle = depth * width * batch * 4
    return 5 * bundle + (128 << 20) + 16 * depth * (depth + 1) * batch


def memory(group: str, sizes: Sizes, repeats: int) -> Iterator[Row]:
    """The matrix against a forward pass at two depths; profiles with few, many and exact probes."""
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
    """The peak of one fresh process, as bytes and over the outputs of all layers."""
    command = [sys.executable, "-m", "benchmarks.memory", case, *map(str, numbers)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    value = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)
    reference = "outputs of all layers"
    return Row(group, label, CASES[case], "bytes", value, reference=reference, ratio=value / activations)


if __name__ == "__main__":
    print(peak(sys.argv[1], *map(int, sys.argv[2:])))
