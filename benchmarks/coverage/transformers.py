"""How often do intervals of GSC by position, and of coherence, contain the true value?  By repeated measurements.

Blocks: the batch and the network are fixed, only probes are random, and the truth is the exact measurement.
Coherence: samples are drawn with replacement from a finite population, whose Jacobians are all known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from benchmarks.coverage.estimates import SEED, Replay, complete, inputs, jacobians, network, row, seeded
from benchmarks.coverage.networks import Attention, FeedForward
from gradscope.backward.readings import Reading
from gradscope.transformers.shared_probes import Part, terms

REPLAYED, MEASURED = 400, 200
TOKENS, WIDTH = 8, 25


def run(folder: Path, *, quick: bool) -> pd.DataFrame:
    """Measure all coverages, write ``transformers.csv`` and return its rows."""
    parts = [complete(folder / "runs", part, quick=quick) for part in (blocks, coherences)]
    frame = pd.concat(parts, ignore_index=True)
    frame.to_csv(folder / "transformers.csv", index=False, float_format="%.4g")
    return frame


def transformer(depth: int) -> nn.Module:
    """Attention and feed-forward sublayers in turn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(*[(Attention, FeedForward)[place % 2](WIDTH) for place in range(depth)]).double()


def blocks(quick: bool) -> Iterator[dict[str, object]]:
    """Blocks between near and far positions; with B=96, "auto" rotates target positions over the samples."""
    model = transformer(4)
    places = {"source": [(0, 0), (0, 6)], "target": [(0, 0), (6, 0)], "both": [(1, 0), (6, 2), (6, 6)]}
    plans: dict[int, list[int | str]] = {2: [1, 2, 4, 8], 8: [1, 2, 4, 8], 96: ["auto"]}
    cases = [(size, probes, by) for size in plans for probes in plans[size] for by in places]
    for size, probes, by in cases:
        if probes == "auto" and by == "source":  # the plan of plain GSC
            continue
        x = inputs(size * TOKENS, WIDTH).reshape(size, TOKENS, WIDTH)
        exact = gs.gsc(model, x, positions=by, probes="exact")
        assert isinstance(exact, gs.Positions)
        truths = exact.blocks.log10_values[0]
        found: dict[tuple[int, int], list[Replay]] = {place: [] for place in places[by]}
        for seed in range(2 if quick else MEASURED):
            measured = gs.gsc(model, x, positions=by, probes=probes, generator=seeded(SEED + seed))
            assert isinstance(measured, gs.Positions)
            drawn = measured.blocks
            low, high = drawn.interval()
            for t, s in places[by]:
                found[t, s].append((drawn.log10_values[0, t, s], low[0, t, s], high[0, t, s]))
        for t, s in places[by]:
            setting = f"by {by}, B={size}, probes={probes}, t={t} s={s}"
            yield row("gsc_by_position", "causal transformer 4", setting, float(truths[t, s]), found[t, s])


def drawn_coherence(J: npt.NDArray[np.float64], g: npt.NDArray[np.float64], num_probes: int) -> gs.Coherence:
    """The coherence of samples with Jacobians J (N, outputs, inputs), from cotangents g (num, outputs)."""
    v = np.einsum("po,noi->pni", g, J)
    total = v.sum(axis=1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    along = np.einsum("pni,pi->pn", v, total) / np.where(length > 0, length, 1.0)
    reading = Reading(np.stack([np.linalg.norm(v, axis=2), along], axis=1), np.zeros(len(g), dtype=np.int64))
    p, q, by_probe, interaction, exponents = (np.array([part]) for part in terms(reading, num_probes))
    part = Part(("input", "output"), (0, 1), p, q, by_probe, interaction, exponents, num_probes, ())
    return gs.Coherence.of([part])


def coherences(quick: bool) -> Iterator[dict[str, object]]:
    """From the input to the output."""
    cases = [("tanh", "none", 2), ("tanh", "none", 6), ("relu", "none", 2), ("relu", "none", 10), ("selu", "none", 6),
             ("tanh", "layer", 10)]  # fmt: skip
    for activation, norm, depth in cases:
        x: Tensor = inputs(200 if quick else 4000, 12)
        J = jacobians(network(depth, 12, activation, norm), x[:, None]).numpy()
        truth = float(np.square(J.mean(axis=0)).sum() / np.square(J).sum(axis=(1, 2)).mean())
        rng = np.random.default_rng(SEED)
        for size in (20, 60, 200):
            for num in (0, 4, 16):
                found = []
                for _ in range(4 if quick else REPLAYED):
                    g = rng.choice([-1.0, 1.0], size=(num, J.shape[1])) if num else np.eye(J.shape[1])
                    one = drawn_coherence(J[rng.integers(len(J), size=size)], g, num)
                    low, high = one.interval()
                    found.append((float(one.values[0]), float(low[0]), float(high[0])))
                setting = f"N={size}, {num or 'no'} probes, truth {truth:.2g}"
                yield row("jacobian_coherence", f"{activation} {norm} {depth}", setting, truth, found)
