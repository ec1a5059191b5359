"""The cotangents that start at a target: a basis, random signs, or a subspace with random signs in its complement.

A deep Jacobian J has only a few large singular values, so random probes of J are noisy.  The left singular vectors of
these values are nearly the same for all distant sources.  A few orthonormal directions Q of the target, found with
forward passes, therefore serve all sources: |J|_F^2 = |Q^T J|_F^2 + E |v^T (I - Q Q^T) J|^2.  Random probes v estimate
the second term, and the sum is unbiased for any Q (see Hutch++; for finding Q, Halko, Martinsson and Tropp 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope import probes as probe_vectors
from gradscope.choices import shown
from gradscope.distributed import share
from gradscope.forward.layers import Layer
from gradscope.forward.replay import Replay
from gradscope.memory import Later, read_once
from gradscope.norms import from_real, real
from gradscope.probes import MOST_PROBES

Draw = Callable[[int, int], Tensor]

# "auto" has the same meaning for every quantity: exact if at most AUTO_EXACT cotangents are needed in all.  Otherwise
# random probes that cost at most AUTO_COST backward passes per target.
AUTO_EXACT, AUTO_COST = 128, 40

# Relative change of the targets in finite differences: small enough for linearity, but far above rounding errors.
WANTED_CHANGE = 0.01


@dataclass(frozen=True)
class Deflated:
    """Deflated probes, for ``probes=`` of `gsc` and `gsc_matrix`: ``rank`` fixed directions and ``num`` random probes.

    The directions span the subspace of the target into which deep Jacobians mostly map; the part of the result in this
    subspace is exact.  The probes estimate the rest.
    ``Deflated(0, n)`` means n ordinary random probes.  Cost: rank + 1 forward passes without gradients, and rank + num
    cotangents.  Raises ValueError if ``rank`` is negative or ``num`` less than one.
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


def shared_signs(target: Layer, num: int, generator: torch.Generator) -> Cotangents:
    """``num`` vectors of random signs, each the same for all samples (leading dimension) of the target."""
    key, size = probe_vectors.new_key(generator, generator.device), target.size // target.shape[0]

    def draw(first: int, last: int) -> Tensor:
        v = probe_vectors.signs(key, range(first, last), range(1), size, target.real_dtype, target.device)
        return from_real(v.expand(-1, target.shape[0], -1).flatten(1), target.shape, target.dtype)

    return Cotangents(target, num, 0, draw)


def by_position(whole: Cotangents, axis: int) -> Cotangents:
    """For every cotangent, one for each place of a dimension of the target, which is zero at all other places."""
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
    key, samples = probe_vectors.new_key(generator, generator.device), share(target.shape[0] if target.shape else 1)
    size = target.size // max(1, len(samples))

    def draw(first: int, last: int) -> Tensor:
        v = probe_vectors.signs(key, range(first, last), samples, size, target.real_dtype, target.device)
        return from_real(v.flatten(1), target.shape, target.dtype)

    return draw


def find_subspaces(
    replay: Replay, shapes: Mapping[str, tuple[int, ...]], rank: int, *, coupled: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """For each target name, orthonormal directions (rank', *shape) in which changes of the sources move this target.

    Finite differences along ``rank`` random directions of the sources give one basis per sample, or one for the whole
    batch if samples are ``coupled``; rank' < rank if a target has too few dimensions.  A target that a replay does not
    reproduce is left out.  Cost: rank + 1 forward passes, and one or two more to find the step size.
    """
    everything = replay.outputs({*shapes, *replay.source_names}, {})
    base = {n: real(f).double() for n, f in everything.items() if n in shapes and tuple(f.shape) == shapes[n]}
    if not base or any(name not in everything for name in replay.source_names):
        return {}
    sources = {name: everything[name] for name in replay.source_names}
    finest = max(torch.finfo(source.dtype).eps for source in sources.values())
    step, columns = math.sqrt(finest), dict[str, list[Tensor]]({name: [] for name in base})
    lengths, infinite = Later(f.norm() for f in base.values()), set[str]()
    while min(map(len, columns.values())) < rank:
        shifts = {name: step * _direction(source, generator) for name, source in sources.items()}
        moved = replay.outputs(base, shifts)
        changes = {name: real(moved[name]).double() - f for name, f in base.items()}
        moves = dict(zip(changes, read_once(change.norm() for change in changes.values()), strict=True))
        both = zip(moves.values(), map(float, lengths.arrays), strict=True)
        largest = max(move / length for move, length in both if length)
        if not largest <= 10 * WANTED_CHANGE and step > 4 * finest:
            step = max(step * (WANTED_CHANGE / largest if math.isfinite(largest) else 1e-3), 4 * finest)
            continue
        infinite |= {name for name, move in moves.items() if not math.isfinite(move)}
        for name, column in columns.items():
            column.append(changes[name])
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
