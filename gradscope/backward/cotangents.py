"""Which cotangents start at a target: a basis, random signs, or a subspace with random signs in its complement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.backward.subspace import Deflated
from gradscope.distributed import rank
from gradscope.forward.layers import Layer
from gradscope.probes import rademacher

Draw = Callable[[int, int], Tensor]
Probes = int | str | Deflated

# "auto" means the same for every quantity: exact up to this many cotangents in all, otherwise random probes at the cost
# of at most this many backward passes per target.
AUTO_EXACT, AUTO_COST = 128, 40


@dataclass(frozen=True)
class Cotangents:
    """``num`` cotangents of one target: the squares of the first ``num_fixed`` add up, the others are random probes.

    ``draw(first, last)`` returns those numbered first to last - 1, shape (last - first, *shape), in fresh memory.  It
    is called in order, and again when a sweep is repeated.
    """

    target: Layer
    num: int
    num_fixed: int
    draw: Draw

    def window(self, first: int, last: int) -> Cotangents:
        """Those numbered first to last - 1, as far as they exist."""
        last = min(last, self.num)
        fixed = min(max(self.num_fixed - first, 0), last - first)
        return Cotangents(self.target, last - first, fixed, lambda a, b: self.draw(first + a, first + b))

    @property
    def num_probes(self) -> int:
        """Number of random probes; 0 if the result is exact."""
        return self.num - self.num_fixed


def resolved(probes: Probes, *, deflated: bool = False) -> Deflated | str:
    """What ``probes=`` asks for: "exact", "auto", or a `Deflated`, which is ``Deflated(0, n)`` for a number n.

    Raises:
        ValueError: It is none of these, or it is a `Deflated` although the quantity does not support ``deflated``.
    """
    if isinstance(probes, int) and not isinstance(probes, bool) and probes >= 1:
        return Deflated(0, probes)
    if (isinstance(probes, str) and probes in ("exact", "auto")) or (deflated and isinstance(probes, Deflated)):
        return probes
    offer = '"exact", "auto" or gs.Deflated(rank, num)' if deflated else '"exact" or "auto"'
    raise ValueError(f"probes must be a whole number >= 1, {offer}; got {probes!r}.")


def chosen(target: Layer, needed: int, probes: Probes, generator: torch.Generator) -> Cotangents:
    """Cotangents of a single target, of which ``needed`` make a basis; "auto" falls back to `AUTO_COST` random signs.

    Raises:
        ValueError: ``probes`` is not a whole number >= 1, "exact" or "auto".
    """
    plan = resolved(probes)
    if plan == "exact" or (plan == "auto" and needed <= AUTO_EXACT):
        return basis(target, needed)
    return signs(target, plan.num if isinstance(plan, Deflated) else AUTO_COST, generator)


def generator_or_default(generator: torch.Generator | None) -> torch.Generator:
    """The generator itself, or one with a fixed seed: the rank, so that parallel processes draw different probes."""
    return torch.Generator().manual_seed(rank()) if generator is None else generator


def basis(target: Layer, num: int) -> Cotangents:
    """``num`` unit vectors: one basis shared by all samples (num = d), or a basis of the whole batch (num = B d)."""

    def draw(first: int, last: int) -> Tensor:
        cotangents = torch.zeros(last - first, target.size // num, num, dtype=target.dtype, device=target.device)
        numbers = torch.arange(first, last, device=target.device)
        cotangents[numbers - first, :, numbers] = 1
        return cotangents.reshape(-1, *target.shape)

    return Cotangents(target, num, num, draw)


def signs(target: Layer, num: int, generator: torch.Generator) -> Cotangents:
    """``num`` vectors of random signs."""
    return Cotangents(target, num, 0, lambda first, last: _signs(target, last - first, generator))


def deflated(target: Layer, subspace: Tensor, num: int, generator: torch.Generator, *, coupled: bool) -> Cotangents:
    """The ``subspace`` (rank, *shape) itself, then ``num`` vectors of random signs projected on its complement."""
    rank = len(subspace)
    # (samples, rank, d): one projection per sample, or one for the whole batch.
    q = subspace.reshape(rank, 1 if coupled else target.shape[0], -1).transpose(0, 1)

    def draw(first: int, last: int) -> Tensor:
        parts = [subspace[first : min(last, rank)]]
        if last > rank:
            v = _signs(target, last - max(first, rank), generator)
            flat = v.reshape(len(v), len(q), -1).transpose(0, 1)
            flat = flat - (flat @ q.transpose(1, 2)) @ q
            parts.append(flat.transpose(0, 1).reshape(v.shape))
        return torch.cat(parts)

    return Cotangents(target, rank + num, rank, draw)


def needed_for_exact(target: Layer, batch_size: int, *, coupled: bool) -> int:
    """Size of the basis: d if samples are independent and the leading dimension is the batch, otherwise B d."""
    shared = not coupled and target.shape[:1] == (batch_size,)
    return target.size // batch_size if shared else target.size


def _signs(target: Layer, num: int, generator: torch.Generator) -> Tensor:
    v = rademacher(num, target.size, generator=generator, dtype=target.dtype, device=target.device)
    return v.reshape(-1, *target.shape)
