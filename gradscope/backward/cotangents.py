"""The cotangents that start at a target: a basis, random signs, or a subspace with random signs in its complement.

A deep Jacobian J has only a few large singular values, so random probes of J are noisy.  The left singular vectors of
these values are nearly the same for all distant sources.  A few orthonormal directions Q of the target, found with
forward passes, therefore serve all sources: |J|_F^2 = |Q^T J|_F^2 + E |v^T (I - Q Q^T) J|^2.  Random probes v estimate
the second term, and the sum is unbiased for any Q (see Hutch++; for finding Q, Halko, Martinsson and Tropp 2011).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gradscope import probes as probe_vectors
from gradscope.choices import shown
from gradscope.distributed import share
from gradscope.forward.layers import Layer
from gradscope.norms import from_real, real
from gradscope.probes import MOST_PROBES

Draw = Callable[[int, int], Tensor]

# "auto" has the same meaning for every quantity: exact if at most AUTO_EXACT cotangents are needed in all.  Otherwise
# random probes that cost about AUTO_COST backward passes per target, or fewer.
AUTO_EXACT, AUTO_COST = 128, 40

# Most bytes of random words that are computed together for several targets.
_WORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Deflated:
    """Option ``probes=`` of `gsc` and `gsc_matrix`: exact in ``rank`` directions, ``num`` random probes for the rest.

    The directions approximately span the subspace into which deep Jacobians J mostly map.  The part of |J|_F^2 in these
    directions is exact, and random probes estimate the rest.  ``Deflated(0, n)`` means n random probes only.

    Cost: rank + 1 forward passes without gradients, and rank + num backward passes.

    Raises:
        ValueError: ``rank`` is negative, or ``num`` is less than one.

    Reference: Meyer, Musco, Musco and Woodruff (2021), "Hutch++", arXiv:2010.09649.

    >>> Deflated(4, 6).cost
    14
    """

    rank: int = 8
    num: int = 8

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 0), ("num", self.num, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Deflated({name}=) must be a whole number >= {least}, got {shown(value)}.")

    @property
    def cost(self) -> int:
        """Cost in backward passes per target; a direction counts as two, because it also needs a forward pass."""
        return 2 * self.rank + self.num


Probes = int | str | Deflated


@dataclass(frozen=True)
class Cotangents:
    """``num`` cotangents v of one target: ``num_fixed`` fixed ones, for a sum of |J^T v|^2, then random probes.

    ``draw(first, last)`` returns cotangents first to last - 1, shape (last - first, *shape), in new memory.  A sweep
    calls ``draw`` in order, and a repeated sweep calls it again from the start.
    """

    target: Layer
    num: int
    num_fixed: int
    draw: Draw

    def window(self, first: int, last: int) -> Cotangents:
        """Cotangents first to last - 1, or fewer if ``num`` is smaller than ``last``."""
        last = min(last, self.num)
        fixed = min(max(self.num_fixed - first, 0), last - first)
        return Cotangents(self.target, last - first, fixed, lambda a, b: self.draw(first + a, first + b))

    @property
    def num_probes(self) -> int:
        """Number of random probes; 0 if the result is exact."""
        return self.num - self.num_fixed


def resolved(probes: Probes, *, deflated: bool = False) -> Deflated | str:
    """The checked value of ``probes=``: "exact", "auto" or a `Deflated`; a number n becomes ``Deflated(0, n)``."""
    num = max(probes.rank, probes.num) if isinstance(probes, Deflated) else probes
    if isinstance(num, int) and num > MOST_PROBES:
        raise ValueError(f'probes must be at most {MOST_PROBES:,}, got {probes}: use probes="exact" or rtol=.')
    if isinstance(probes, int) and not isinstance(probes, bool) and probes >= 1:
        return Deflated(0, probes)
    if (isinstance(probes, str) and probes in ("exact", "auto")) or (deflated and isinstance(probes, Deflated)):
        return probes
    offer = '"exact", "auto" or gs.Deflated(rank, num)' if deflated else '"exact" or "auto"'
    raise ValueError(f"probes must be a whole number >= 1, {offer}; got {probes!r}.")


def chosen(target: Layer, needed: int, probes: Probes, generator: torch.Generator) -> Cotangents:
    """Cotangents of one target: a basis (``needed`` vectors) or random probes.  "auto" takes a small basis."""
    plan = resolved(probes)
    if plan == "exact" or (plan == "auto" and needed <= AUTO_EXACT):
        return basis(target, needed)
    return signs(target, plan.num if isinstance(plan, Deflated) else AUTO_COST, generator)


def generator_or_default(generator: torch.Generator | None) -> torch.Generator:
    """``generator``, or a new one with seed 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def basis(target: Layer, num: int) -> Cotangents:
    """``num`` unit vectors: one basis shared by all samples (num = d), or a basis of the whole batch (num = B d)."""

    def draw(first: int, last: int) -> Tensor:
        cotangents = torch.zeros(last - first, target.size // num, num, dtype=target.real_dtype, device=target.device)
        numbers = torch.arange(first, last, device=target.device)
        cotangents[numbers - first, :, numbers] = 1
        return from_real(cotangents.flatten(1), target.shape, target.dtype)

    return Cotangents(target, num, num, draw)


def signs(target: Layer, num: int, generator: torch.Generator) -> Cotangents:
    """``num`` vectors of random signs."""
    return Cotangents(target, num, 0, _signs(target, generator))


def signs_for_each(targets: Sequence[Layer], num: int, generator: torch.Generator) -> list[Cotangents]:
    """The same as `signs` of one target after the other; random words of small targets are computed together."""
    keys = [probe_vectors.new_key(generator, generator.device) for _ in targets]
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, target in enumerate(targets):
        alike[target.shape, target.real_dtype, target.device].append(number)
    draws: dict[int, Draw] = {}
    for (_, _, device), members in alike.items():
        samples, size = _samples_of(targets[members[0]])
        step = max(1, 8 * _WORD_BYTES // max(1, num * len(samples) * size))
        for first in range(0, len(members), step):
            part = members[first : first + step]
            key = torch.stack([keys[number] for number in part]).reshape(-1, 1, 1, 1)
            words: Callable[[int, int], Tensor] = partial(_words, key, samples, size, device)
            words = lru_cache(maxsize=1)(words) if part[1:] else words
            draws |= {number: partial(_drawn, words, place, targets[number]) for place, number in enumerate(part)}
    return [Cotangents(target, num, 0, draws[number]) for number, target in enumerate(targets)]


def shared_signs(target: Layer, num: int, generator: torch.Generator) -> Cotangents:
    """``num`` vectors of random signs, each the same for all samples (leading dimension) of the target."""
    key, size = probe_vectors.new_key(generator, generator.device), target.size // target.shape[0]

    def draw(first: int, last: int) -> Tensor:
        v = probe_vectors.signs(key, range(first, last), range(1), size, target.real_dtype, target.device)
        return from_real(v.expand(-1, target.shape[0], -1).flatten(1), target.shape, target.dtype)

    return Cotangents(target, num, 0, draw)


def by_position(whole: Cotangents, axis: int) -> Cotangents:
    """Split every cotangent into one per place of a dimension of the target, which is zero at all other places."""
    target, num_places = whole.target, whole.target.shape[axis]

    def draw(first: int, last: int) -> Tensor:
        numbers = torch.arange(first, last, device=target.device)
        low = first // num_places
        cotangents = whole.draw(low, -(-last // num_places))[numbers // num_places - low]
        here = numbers[:, None] % num_places == torch.arange(num_places, device=target.device)
        return cotangents * here.reshape(len(here), *[1] * axis, -1, *[1] * (len(target.shape) - axis - 1))

    return Cotangents(target, whole.num * num_places, whole.num_fixed * num_places, draw)


def at_places(whole: Cotangents, axis: int, places: Tensor) -> Cotangents:
    """The same cotangents, zero except at one place of a dimension of the target: ``places`` (num, samples)."""
    target, num_places = whole.target, whole.target.shape[axis]

    def draw(first: int, last: int) -> Tensor:
        here = places[first:last, :, None].to(target.device) == torch.arange(num_places, device=target.device)
        ones = [1] * (axis - 1), [1] * (len(target.shape) - axis - 1)
        return whole.draw(first, last) * here.reshape(*here.shape[:2], *ones[0], -1, *ones[1])

    return Cotangents(target, whole.num, whole.num_fixed, draw)


def combs(target: Layer, axis: int, num: int) -> Cotangents:
    """Sums over the places of a dimension of the unit vectors of a basis; with `by_position`, the basis itself.

    ``num``: the size of the basis of one place, shared by all samples (d / T), or of the whole batch (B d / T).
    """
    num_places = target.shape[axis]
    others = [size for place, size in enumerate(target.shape) if place != axis] + [2] * target.dtype.is_complex

    def draw(first: int, last: int) -> Tensor:
        shape = last - first, num_places, target.size // num_places // num, num
        v = torch.zeros(shape, dtype=target.real_dtype, device=target.device)
        numbers = torch.arange(first, last, device=target.device)
        v[numbers - first, :, :, numbers] = 1
        v = v.reshape(last - first, num_places, *others).movedim(1, axis + 1)
        return from_real(v.flatten(1), target.shape, target.dtype)

    return Cotangents(target, num, num, draw)


def deflated(target: Layer, subspace: Tensor, num: int, generator: torch.Generator, *, coupled: bool) -> Cotangents:
    """The directions in ``subspace`` (rank, *shape), then ``num`` random sign vectors projected on its complement."""
    rank = len(subspace)
    # (samples, rank, d): one projection per sample, or one for the whole batch.
    q = real(subspace).reshape(rank, 1 if coupled else target.shape[0], -1).transpose(0, 1)
    probes = _signs(target, generator)

    def draw(first: int, last: int) -> Tensor:
        parts = [subspace[first : min(last, rank)]]
        if last > rank:
            v = probes(max(first - rank, 0), last - rank)
            flat = real(v).reshape(len(v), len(q), -1).transpose(0, 1)
            flat = flat - (flat @ q.transpose(1, 2)) @ q
            parts.append(from_real(flat.transpose(0, 1).flatten(1), target.shape, target.dtype))
        return torch.cat(parts)

    return Cotangents(target, rank + num, rank, draw)


def needed_for_exact(target: Layer, batch_size: int, *, coupled: bool) -> int:
    """Size of the basis: d if samples are independent and the leading dimension is the batch, otherwise B d."""
    shared = not coupled and target.shape[:1] == (batch_size,)
    return target.size // batch_size if shared else target.size


def _signs(target: Layer, generator: torch.Generator) -> Draw:
    """Random signs, each a function of a key, the probe, the sample (numbered over all processes) and the place."""
    return signs_for_each([target], 1, generator)[0].draw


def _samples_of(target: Layer) -> tuple[range, int]:
    """The samples of this process, numbered over all processes, and the number of signs of each."""
    samples = share(target.shape[0] if target.shape else 1)
    return samples, target.size // max(1, len(samples))


def _words(key: Tensor, samples: range, size: int, device: torch.device, first: int, last: int) -> Tensor:
    return probe_vectors.words(key, range(first, last), samples, size, device)


def _drawn(words: Callable[[int, int], Tensor], place: int, target: Layer, first: int, last: int) -> Tensor:
    v = probe_vectors.signs_of(words(first, last)[place], _samples_of(target)[1], target.real_dtype)
    return from_real(v.flatten(1), target.shape, target.dtype)
