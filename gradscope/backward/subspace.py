"""Find the subspace of a target into which deep Jacobians mostly map: for deflated probes, see `cotangents`.

Reference: Halko, Martinsson and Tropp (2011), "Finding structure with randomness", arXiv:0909.4061.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gradscope import probes as probe_vectors
from gradscope.distributed import share
from gradscope.forward.replay import Replay
from gradscope.memory import Later, read_once
from gradscope.norms import from_real, real

# Relative change of the targets in finite differences: small enough for linearity, but far above rounding errors.
WANTED_CHANGE = 0.01


def find_subspaces(
    replay: Replay, shapes: Mapping[str, tuple[int, ...]], rank: int, *, coupled: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """For each target name, orthonormal directions (rank', *shape) in which changes of the sources move this target.

    Finite differences along ``rank`` random directions of the sources give one basis per sample, or one for the whole
    batch if samples are ``coupled``; rank' < rank if a target has too few dimensions.  A target that a replay does not
    reproduce is left out.  Cost: rank + 1 forward passes and one device synchronization.  If the first step size is too
    large, up to rank + 1 more passes and two more synchronizations; more if the next fits only the first direction.
    """
    everything = replay.outputs({*shapes, *replay.source_names}, {})
    base = {n: real(f).double() for n, f in everything.items() if n in shapes and tuple(f.shape) == shapes[n]}
    if not base or any(name not in everything for name in replay.source_names):
        return {}
    sources = {name: everything[name] for name in replay.source_names}
    finest = max(torch.finfo(source.dtype).eps for source in sources.values())
    step, columns = math.sqrt(finest), dict[str, list[Tensor]]({name: [] for name in base})
    lengths, infinite, num = Later(f.norm() for f in base.values()), set[str](), rank
    while (missing := rank - min(map(len, columns.values()))) > 0:
        every = []  # changes of all targets
        for _ in range(min(num, missing)):
            shifts = {name: step * _direction(source, generator) for name, source in sources.items()}
            moved = replay.outputs(base, shifts)
            every.append([real(moved[name]).double() - f for name, f in base.items()])
        norms = np.reshape(read_once(change.norm() for changes in every for change in changes), (len(every), -1))
        num = rank
        for changes, moves in zip(every, norms.tolist(), strict=True):
            both = zip(moves, map(float, lengths.arrays), strict=True)
            largest = max(move / length for move, length in both if length)
            if not largest <= 10 * WANTED_CHANGE and step > 4 * finest:
                # A step that was wrong once is tried along one direction first.
                step, num = max(step * (WANTED_CHANGE / largest if math.isfinite(largest) else 1e-3), 4 * finest), 1
                break
            infinite |= {name for name, move in zip(base, moves, strict=True) if not math.isfinite(move)}
            for column, change in zip(columns.values(), changes, strict=True):
                column.append(change)
    subspaces = {}
    for name, column in columns.items():
        if name not in infinite:
            directions = _orthonormal(torch.stack(column), coupled).to(real(everything[name]).dtype)
            subspaces[name] = from_real(directions.flatten(1), shapes[name], everything[name].dtype)
    return subspaces


def _direction(source: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction with the same length as ``source``."""
    key, samples = probe_vectors.new_key(generator, generator.device), share(len(source) if source.ndim else 1)
    noise = probe_vectors.uniform(key, samples, real(source).numel() // max(1, len(samples)), source.device)
    length = real(source).double().norm()
    direction = (noise * torch.where(length > 0, length / noise.norm(), 1.0)).to(real(source))
    return from_real(direction.flatten(), source.shape, source.dtype)


def _orthonormal(differences: Tensor, coupled: bool) -> Tensor:
    """Orthonormal basis of the span of ``differences`` (rank, B, ...): one per sample, or one for the whole batch."""
    rank, shape = len(differences), differences.shape[1:]
    vectors = differences.reshape(rank, 1, -1) if coupled else differences.reshape(rank, shape[0], -1)
    vectors = vectors / vectors.norm(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    q, _ = torch.linalg.qr(vectors.permute(1, 2, 0))  # (samples, d, rank')
    return q.permute(2, 0, 1).reshape(-1, *shape)
