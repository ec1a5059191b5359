"""The networks of the campaign, and their profiles: measured once, kept in files, used by every cell.

A cell is an architecture, a depth and a width.  Each of its networks has its own seed for weights, batch and probes.
One file per network holds log10 GSC of every row, from the exact Jacobian and from probes.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.models import MLP

ARCHITECTURES: dict[str, dict[str, Any] | None] = {
    "relu": {"activation": "relu"},
    "relu+batch": {"activation": "relu", "norm": "batch"},
    "tanh+layer": {"activation": "tanh", "norm": "layer"},
    "selu": {"activation": "selu"},
    "residual tanh+layer": {"activation": "tanh", "norm": "layer", "residual": "identity"},
    "GPT-like": None,
}
DEPTHS, WIDTHS = (20, 50, 100), (50, 100, 400)
SAMPLES, TOKENS, CLASSES = 20, 8, 10
RTOL = 0.2
# Ways to measure one network.  "auto" and "rtol" differ from "exact" only where an exact Jacobian is expensive.
PROBES = ("exact", "8", "2", "auto", "rtol")


class Cell(NamedTuple):
    """An ensemble of networks."""

    architecture: str
    depth: int
    width: int


CELLS = [Cell(*cell) for cell in product(ARCHITECTURES, DEPTHS, WIDTHS)]


class Attention(nn.Module):
    """``x + attention(norm(x))``, causal, over (B, T, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        heads = self.mix(self.norm(x)).unflatten(-1, (3, -1, 25)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        result: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """``x + V gelu(W norm(x))`` over (B, T, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inside, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        y: Tensor = x + self.out(nn.functional.gelu(self.inside(self.norm(x))))
        return y


class LastToken(nn.Module):
    """The classes of the last token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, classes)."""
        y: Tensor = self.head(x[:, -1])
        return y


def build(cell: Cell, seed: int) -> tuple[nn.Module, Tensor]:
    """A network of the cell and its batch.  ``depth`` counts layers, residual blocks, or sublayers of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    options = ARCHITECTURES[cell.architecture]
    if options is not None:
        model: nn.Module = MLP(depth=cell.depth, width=cell.width, out_features=CLASSES, generator=generator, **options)
        return model, torch.randn(SAMPLES, cell.width, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [(Attention, FeedForward)[place % 2](cell.width) for place in range(cell.depth)]
        model = nn.Sequential(*parts, nn.LayerNorm(cell.width), LastToken(cell.width))
    return model, torch.randn(SAMPLES // 4, TOKENS, cell.width, generator=generator)


def path_of(folder: Path, cell: Cell, seed: int) -> Path:
    """The file of one network."""
    return folder / f"{cell.architecture.replace(' ', '_')}-{cell.depth}-{cell.width}" / f"{seed}.npz"


def measure(cell: Cell, seed: int) -> dict[str, Any]:
    """Log10 GSC of every row in each way of ``PROBES``, and depths from the output."""
    model, batch = build(cell, seed)

    def profile(**how: Any) -> gs.Profile:
        return gs.gsc(model, batch, generator=torch.Generator().manual_seed(seed + 1_000_000), **how)

    auto = profile()
    exact = profile(probes="exact") if auto.num_probes.any() else auto
    # Where "auto" is exact, so is rtol: its pilot alone costs more than the exact Jacobian.
    found = {"exact": exact, "8": profile(probes=8), "2": profile(probes=2), "auto": auto}
    found["rtol"] = profile(rtol=RTOL) if auto.num_probes.any() else exact
    values = {name: found[name].log10_values[:, 0] for name in PROBES}
    return {"depth": auto.indices[-1] - np.array(auto.indices), **values}


def missing(folder: Path, cells: list[Cell], seeds: range) -> Iterator[tuple[Cell, int]]:
    """Networks without a file.  All cells get their first network before any gets its second."""
    return ((cell, seed) for seed in seeds for cell in cells if not path_of(folder, cell, seed).exists())


def complete(folder: Path, cells: list[Cell], seeds: range, deadline: float | None = None) -> None:
    """Measure the networks that have no file yet, until ``deadline`` (seconds since the epoch).

    May be interrupted at any time, and run in several processes with different seeds.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # rtol that is not reached
    for cell, seed in missing(folder, cells, seeds):
        if deadline is not None and time.time() > deadline:
            return
        path = path_of(folder, cell, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            np.savez(file, **measure(cell, seed))
        partial.rename(path)
