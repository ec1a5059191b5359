"""Does deflation pay off for the matrix of all pairs of layers?  Measures times, and errors of near and far pairs."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import gradscope as gs
from benchmarks.race.chains import Chain, mlp
from benchmarks.race.errors import relative_rms
from benchmarks.race.sizes import Sizes
from benchmarks.tables.rows import Row, timed
from benchmarks.tables.timing import Contestant, race

WAYS: dict[str, int | gs.Deflated] = {
    "8 plain": 8,
    "32 plain": 32,
    "rank 4, num 4": gs.Deflated(4, 4),
    "rank 8, num 8": gs.Deflated(8, 8),
}
SEEDS = 8


def matrix_errors(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times and rms errors of near pairs (at most a tenth of the depth apart) and far pairs (at least half)."""
    rows = []
    for norm in ("none", "batch"):
        depth, width, batch = sizes.matrix[norm]
        chain = mlp(depth, width, batch, norm=norm)
        exact = gs.gsc_matrix(chain.model, chain.x, probes="exact").log10_values
        sources, targets = np.triu_indices(len(exact), 1)
        distance = targets - sources
        contestants = [
            Contestant(name, partial(gs.gsc_matrix, chain.model, chain.x, probes=way)) for name, way in WAYS.items()
        ]
        case = f"norm {norm}"
        rows += timed(group, case, race(contestants, repeats), "8 plain")
        for name, way in WAYS.items():
            errors = relative_rms(_log10_values(chain, way), exact)[sources, targets]
            for which, chosen in (("near", distance <= depth // 10), ("far", distance >= depth // 2)):
                value = float(np.sqrt(np.mean(np.square(errors[chosen]))))
                rows.append(Row(group, case, f"{name}, {which} pairs", "relative_rms", value, num=SEEDS))
    return rows


def _log10_values(chain: Chain, way: int | gs.Deflated) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    return np.stack([gs.gsc_matrix(chain.model, chain.x, probes=way, generator=g).log10_values for g in generators])
