"""Random vectors v with E[v v^T] = I, so that E|A v|^2 = |A|_F^2.

Every function returns a tensor (num, size) with one probe per row.  A generator gives the same probes on every device,
because probes are drawn on the generator's device.  The variance of |A v|^2 is at most 2 |A|_F^4 and is largest if A
has rank one (Hutchinson 1989; Avron and Toledo 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rademacher(
    num: int, size: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Probes (num, size) of independent random signs (Hutchinson 1989).  |A v|^2 is exact if A^T A is diagonal.

    >>> rademacher(2, 3, generator=torch.Generator().manual_seed(0)).abs().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    source = _source(num, size, generator, device)
    bits = torch.randint(0, 2, (num, size), generator=generator, dtype=torch.int8, device=source)
    return bits.mul_(2).sub_(1).to(device=device, dtype=dtype)


def sphere(
    num: int, size: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Probes (num, size), uniform on the sphere of radius sqrt(size).  The variance is the same for A and a rotated A.

    >>> sphere(2, 9, generator=torch.Generator().manual_seed(0)).norm(dim=1).round(decimals=6).tolist()
    [3.0, 3.0]
    """
    source = _source(num, size, generator, device)
    v = torch.randn(num, size, generator=generator, dtype=torch.float64, device=source)
    return (v * (math.sqrt(size) / v.norm(dim=1, keepdim=True))).to(device=device, dtype=dtype)


def orthonormal(
    num: int, size: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Mutually orthogonal, Haar distributed probes (num, size) of length sqrt(size), with num <= size.

    If num == size, the mean of |A v|^2 is exact.  The usual standard error, for independent probes, is an upper bound.

    Raises:
        ValueError: ``num`` is larger than ``size``.

    >>> v = orthonormal(2, 4, generator=torch.Generator().manual_seed(0))
    >>> (v @ v.T).round(decimals=6).abs().tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    source = _source(num, size, generator, device)
    if num > size:
        raise ValueError(f"num must be at most size, got num={num}, size={size}.")
    gaussian = torch.randn(size, num, generator=generator, dtype=torch.float64, device=source)
    q, r = torch.linalg.qr(gaussian)
    # Q is Haar distributed only after the signs of the diagonal of R are removed (Mezzadri 2007).
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (math.sqrt(size) * q.T).to(device=device, dtype=dtype)


def _source(num: int, size: int, generator: torch.Generator | None, device: torch.device | str) -> torch.device:
    """The device to draw on; ValueError if there is nothing to draw."""
    if num < 1 or size < 1:
        raise ValueError(f"Probes need num >= 1 and size >= 1, got num={num}, size={size}.")
    return generator.device if generator is not None else torch.device(device)
