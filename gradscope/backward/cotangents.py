"""Which cotangents start at a target: a basis, random signs, or a subspace with random signs in its complement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.backward.sweep import Draw
from gradscope.forward.layers import Layer
from gradscope.probes import rademacher


@dataclass(frozen=True)
class Cotangents:
    """``num`` cotangents of one target; the squares of the first ``num_fixed`` add up, the others are random probes.

    ``draw(first, last)``: those numbered first to last - 1, shape (last - first, *shape).
    """

    num: int
    num_fixed: int
    draw: Draw

    def window(self, first: int, last: int) -> Cotangents:
        """Those numbered first to last - 1, or as many of them as there are."""
        last = min(last, self.num)
        fixed = min(max(self.num_fixed - first, 0), last - first)
        return Cotangents(last - first, fixed, lambda a, b: self.draw(first + a, first + b))

    @property
    def num_probes(self) -> int:
        """How many random probes; 0 where the result is exact."""
        return self.num - self.num_fixed


def basis(target: Layer, num: int) -> Cotangents:
    """``num`` unit vectors: one basis for all samples (num = d), or one of the whole batch (num = B d)."""

    def draw(first: int, last: int) -> Tensor:
        cotangents = torch.zeros(last - first, target.size // num, num, dtype=target.dtype, device=target.device)
        chosen = torch.arange(first, last, device=target.device)
        cotangents[chosen - first, :, chosen] = 1
        return cotangents.reshape(-1, *target.shape)

    return Cotangents(num, num, draw)


def signs(target: Layer, num: int, generator: torch.Generator) -> Cotangents:
    """``num`` vectors of random signs."""
    return Cotangents(num, 0, lambda first, last: _signs(target, last - first, generator))


def deflated(target: Layer, subspace: Tensor, num: int, generator: torch.Generator, *, coupled: bool) -> Cotangents:
    """The ``subspace`` (rank, *shape) itself, then ``num`` vectors of random signs projected on its complement."""
    rank = len(subspace)
    # (samples, rank, d): a projection for each sample, or one of the whole batch.
    q = subspace.reshape(rank, 1 if coupled else target.shape[0], -1).transpose(0, 1)

    def draw(first: int, last: int) -> Tensor:
        parts = [subspace[first : min(last, rank)]]
        if last > rank:
            v = _signs(target, last - max(first, rank), generator)
            flat = v.reshape(len(v), len(q), -1).transpose(0, 1)
            flat = flat - (flat @ q.transpose(1, 2)) @ q
            parts.append(flat.transpose(0, 1).reshape(v.shape))
        return torch.cat(parts)

    return Cotangents(rank + num, rank, draw)


def needed_for_exact(target: Layer, batch_size: int, *, coupled: bool) -> int:
    """Size of the basis: one serves all samples only where they are independent and come first."""
    shared = not coupled and target.shape[:1] == (batch_size,)
    return target.size // batch_size if shared else target.size


def _signs(target: Layer, num: int, generator: torch.Generator) -> Tensor:
    v = rademacher(num, target.size, generator=generator, dtype=target.dtype, device=target.device)
    return v.reshape(-1, *target.shape)
