"""Left subspaces of deep Jacobians, found with forward passes, which probes then need not sample.

A deep Jacobian has few large singular values, so a random probe of it is noisy.  Its left singular directions hardly
depend on the source once the source is far away, so a few directions Q of the target, found once, serve all sources:

    |J|_F^2 = |Q^T J|_F^2 + E |v^T (I - Q Q^T) J|^2,

the first term exactly, the second from probes v.  This holds for any orthonormal Q, so the quality of Q affects
the noise but never the mean (the idea of Hutch++: Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649; the range
finder: Halko, Martinsson and Tropp 2011).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.forward.replay import Replay

# Finite differences aim at this relative change of the targets: small against curvature, large against rounding.
WANTED_CHANGE = 0.01


@dataclass(frozen=True)
class Deflated:
    """Deflated probes, for ``probes=`` of `gsc` and `gsc_matrix`: ``rank`` exact directions and ``num`` random probes.

    As in Hutch++: the directions span the subspace of the target that deep Jacobians map into, and the probes sample
    its complement.  ``Deflated(0, n)`` are n plain random probes.  Cost: rank + 1 forward passes without gradients, and
    rank + num cotangents.

    Raises:
        ValueError: ``rank`` is negative, or ``num`` less than one.

    Reference: Meyer, Musco, Musco and Woodruff (2021), "Hutch++", arXiv:2010.09649.

    >>> Deflated(4, 6).cost
    14
    """

    rank: int = 8
    num: int = 8

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 0), ("num", self.num, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Deflated({name}=) must be a whole number >= {least}, got {value!r}.")

    @property
    def cost(self) -> int:
        """In backward passes per target; a direction also takes a forward pass to find."""
        return 2 * self.rank + self.num


def find_subspaces(
    replay: Replay,
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    *,
    coupled: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Orthonormal directions (rank', *shape) of every target, by name, that the sources move it along.

    Finite differences of the forward pass in ``rank`` random directions of the sources.  With independent samples the
    directions are orthonormal sample by sample, otherwise as vectors of the whole batch; rank' <= rank if a target has
    fewer dimensions.  A target that a replay does not reproduce (another shape, not finite) is left out.  Cost: rank +
    1 forward passes, one or two more to find the step, and a QR decomposition per target.
    """
    everything = replay.outputs({*shapes, *replay.source_names}, {})
    base = {n: f.double() for n, f in everything.items() if n in shapes and tuple(f.shape) == shapes[n]}
    if not base or any(name not in everything for name in replay.source_names):
        return {}
    sources = {name: everything[name] for name in replay.source_names}
    finest = max(torch.finfo(source.dtype).eps for source in sources.values())
    step, columns = math.sqrt(finest), dict[str, list[Tensor]]({name: [] for name in base})
    while min(map(len, columns.values())) < rank:
        shifts = {name: step * _direction(source, generator) for name, source in sources.items()}
        moved = replay.outputs(base, shifts)
        changes = {name: moved[name].double() - f for name, f in base.items()}
        largest = max(float(changes[name].norm() / f.norm()) for name, f in base.items() if f.any())
        if not largest <= 10 * WANTED_CHANGE and step > 4 * finest:
            step = max(step * (WANTED_CHANGE / largest if math.isfinite(largest) else 1e-3), 4 * finest)
            continue
        for name, column in columns.items():
            column.append(changes[name])
    subspaces = {}
    for name, column in columns.items():
        differences = torch.stack(column)
        if torch.isfinite(differences).all():
            subspaces[name] = _orthonormal(differences, coupled).to(everything[name].dtype)
    return subspaces


def _direction(source: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction as long as the source itself."""
    noise = torch.randn(source.shape, generator=generator, dtype=torch.float64, device=generator.device)
    length = source.double().norm()
    return (noise * (length / noise.norm() if length > 0 else 1.0)).to(source)


def _orthonormal(differences: Tensor, coupled: bool) -> Tensor:
    """Orthonormal columns from (rank, B, ...): one basis per sample, or of the whole batch."""
    rank, shape = len(differences), differences.shape[1:]
    vectors = differences.reshape(rank, 1, -1) if coupled else differences.reshape(rank, shape[0], -1)
    vectors = vectors / vectors.norm(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    q, _ = torch.linalg.qr(vectors.permute(1, 2, 0))  # (samples, d, rank')
    return q.permute(2, 0, 1).reshape(-1, *shape)
