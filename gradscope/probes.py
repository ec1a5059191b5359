"""Random vectors v with E[v v^T] = I, so that E|A v|^2 = |A|_F^2, drawn from an explicit generator.

Every function returns a tensor of shape (num, size); rows are the probes.  The relative variance of one probe's
|A v|^2 is at most 2, reached when A has rank one (Hutchinson 1989; Avron and Toledo 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rademacher(
    num: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent signs +-1 (Hutchinson 1989).  Exact for a diagonal A^T A."""
    _check(num, size)
    # Bits are drawn where the generator lives, so that a seed means the same probes on every device.
    source = generator.device if generator is not None else torch.device(device)
    bits = torch.randint(0, 2, (num, size), generator=generator, dtype=torch.int8, device=source)
    return bits.mul_(2).sub_(1).to(device=device, dtype=dtype)


def sphere(
    num: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform on the sphere of radius sqrt(size).  Variance is invariant under rotations of A."""
    _check(num, size)
    source = generator.device if generator is not None else torch.device(device)
    v = torch.randn(num, size, generator=generator, dtype=torch.float64, device=source)
    return (v * (math.sqrt(size) / v.norm(dim=1, keepdim=True))).to(device=device, dtype=dtype)


def orthonormal(
    num: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``num <= size`` mutually orthogonal directions of length sqrt(size), Haar distributed.

    Exact when ``num == size``.  The probes depend on each other, so their sample variance is an upper bound.
    """
    _check(num, size)
    if num > size:
        raise ValueError(f"Only {size} orthogonal directions exist in {size} dimensions, got num={num}.")
    source = generator.device if generator is not None else torch.device(device)
    gaussian = torch.randn(size, num, generator=generator, dtype=torch.float64, device=source)
    q, r = torch.linalg.qr(gaussian)
    # Without the signs of R's diagonal QR is not Haar distributed (Mezzadri 2007).
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (math.sqrt(size) * q.T).to(device=device, dtype=dtype)


def basis(size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """All ``size`` unit vectors: their *sum* of |A v|^2 is |A|_F^2 exactly."""
    _check(size, size)
    return torch.eye(size, dtype=dtype, device=device)


def _check(num: int, size: int) -> None:
    if num < 1 or size < 1:
        raise ValueError(f"Probes need num >= 1 and size >= 1, got num={num}, size={size}.")
