"""Errors of plain and deflated probes against the exact profile, over many probe seeds."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

import gradscope as gs
from benchmarks.race.chains import Chain, mlp
from benchmarks.race.sizes import Sizes
from benchmarks.tables.rows import Row, timed
from benchmarks.tables.timing import Contestant, Times, race

FloatArray = npt.NDArray[np.float64]

PLAIN = "plain probes"
GAIN = "error of plain over error of deflated"
ATTEMPTS = 20
RESAMPLES = 1000


def log10_values(chain: Chain, probes: int | gs.Deflated, seeds: int) -> FloatArray:
    """log10 GSC of every layer for each of ``seeds`` probe seeds, shape (seeds, layers)."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    profiles = [gs.gsc(chain.model, chain.x, probes=probes, generator=generator) for generator in generators]
    return np.stack([profile.log10_values[:, 0] for profile in profiles])


def relative_rms(estimates: FloatArray, exact: FloatArray | float) -> FloatArray:
    """Root mean square over seeds (first dimension) of the relative error of GSC; both arguments are log10 GSC."""
    return np.sqrt(np.mean(np.square(10 ** (estimates - exact) - 1), axis=0))


def deflated_vs_plain(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Errors at the farthest layer, of deflated probes and of plain probes that take at least as long."""
    chain = mlp(*sizes.deep)
    exact = gs.gsc(chain.model, chain.x, probes="exact").log10_values[:, 0]
    rows = []
    for rank, num in sizes.deflated_deep:
        case, name = f"rank {rank}, num {num}", "deflated probes"
        deflated = gs.Deflated(rank=rank, num=num)
        times, plain = _at_equal_cost(chain, name, deflated, rank + num, repeats)
        rows += timed(group, f"{case}; {plain} plain", times, name)
        resampled = {}
        both: dict[str, int | gs.Deflated] = {name: deflated, PLAIN: plain}
        for seed, (what, probes) in enumerate(both.items()):
            estimates = log10_values(chain, probes, sizes.seeds)[:, 0]
            resampled[what] = _resampled(estimates, exact[0], seed)
            error = float(relative_rms(estimates, exact[0]))
            rows.append(Row(group, case, what, "relative_rms", error, *_quartiles(resampled[what]), sizes.seeds))
        gain = rows[-1].value / rows[-2].value
        rows.append(Row(group, case, GAIN, "times", gain, *_quartiles(resampled[PLAIN] / resampled[name]), sizes.seeds))
    return rows


def _at_equal_cost(
    chain: Chain, name: str, deflated: gs.Deflated, fewest: int, repeats: int
) -> tuple[dict[str, Times], int]:
    """Times of deflated and plain probes, and how many plain probes take at least as long as the deflated probes."""
    plain = fewest
    for _ in range(ATTEMPTS):
        contestants = [
            Contestant(name, partial(gs.gsc, chain.model, chain.x, probes=deflated)),
            Contestant(PLAIN, partial(gs.gsc, chain.model, chain.x, probes=plain)),
        ]
        times = race(contestants, repeats)
        if times[PLAIN].median >= times[name].median:
            break
        plain = math.ceil(plain * max(1.1, times[name].median / times[PLAIN].median))
    return times, plain


def _resampled(estimates: FloatArray, exact: float, seed: int) -> FloatArray:
    """Errors of bootstrap samples: one estimate per seed in, one error per bootstrap sample out."""
    picks = np.random.default_rng(seed).integers(len(estimates), size=(len(estimates), RESAMPLES))
    return relative_rms(estimates[picks], exact)


def _quartiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)
