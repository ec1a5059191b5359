"""Probes: random vectors v with E[v v^T] = I, so that E|A v|^2 = |A|_F^2.

The variance of |A v|^2 is at most 2 |A|_F^4, and largest for A of rank one (Hutchinson 1989; Avron and Toledo 2011).
`rademacher`, `sphere` and `orthonormal` return a tensor (num, size) with one probe per row; ``generator`` gives the
same probes for every ``device``.  `signs` and `uniform` compute each entry from a key and the place of the entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradscope.choices import Size, checked, shown

__all__ = ["orthonormal", "rademacher", "signs", "sphere", "uniform"]

MOST_PROBES = 100_000
MOST_NUMBERS = 2**30  # of all probes together: 8 GB


# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; Stafford's variant 13).
_STEP = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))

# Numbers of the words of one probe; the next probe starts here.
_WORDS = 2**40

# The signs of the eight bits of every byte.
_SIGNS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) % 2 * 2 - 1).to(torch.int8)


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The next key for `signs` and `uniform`, a whole number, from a generator on this device."""
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def signs(key: Tensor, probes: range, samples: range, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return probes of independent random signs (Hutchinson 1989), a tensor (probes, samples, size).

    ``key`` is a tensor with one whole number, which takes the place of a seed.  ``probes`` and ``samples`` are the
    indices of the probes and samples to compute.  An entry depends only on the key, the index of its probe, the index
    of its sample, and its place in the sample.  So it is the same on every device and in every dtype.

    Cost: 1 bit of a hash per entry.

    >>> v = signs(torch.tensor(7), range(2), range(3), 4, torch.float64, torch.device("cpu"))
    >>> v.shape, bool((v[1:, 2:] == signs(torch.tensor(7), range(1, 2), range(2, 3), 4, v.dtype, v.device)).all())
    (torch.Size([2, 3, 4]), True)
    """
    return signs_of(words(key, probes, samples, size, device), size, dtype)


def words(key: Tensor, probes: range, samples: range, size: int, device: torch.device) -> Tensor:
    """The random words of `signs`, (probes, samples, words); with keys (n, 1, 1, 1) those of all keys, (n, ...)."""
    return _words(key, probes, samples, -(-size // 64), device)


def signs_of(words: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The signs (probes, samples, size) of random words (probes, samples, words)."""
    rows = _SIGNS.to(words.device, dtype, non_blocking=True)
    found = rows.index_select(0, words.view(torch.uint8).flatten().int())
    return found.view(*words.shape[:2], -1)[:, :, :size]


def uniform(key: Tensor, samples: range, size: int, device: torch.device) -> Tensor:
    """Return independent random numbers (samples, size), uniform between -1 and 1, in float64; arguments as in `signs`.

    An entry depends only on the key, the number of its sample, and its place in the sample.

    >>> v = uniform(torch.tensor(7), range(3), 4, torch.device("cpu"))
    >>> v.shape, bool((v[1:] == uniform(torch.tensor(7), range(1, 3), 4, v.device)).all())
    (torch.Size([3, 4]), True)
    """
    return _words(key, range(1), samples, size, device)[0].double().mul_(2.0**-63)


def _words(key: Tensor, probes: range, samples: range, num: int, device: torch.device) -> Tensor:
    """Random words (probes, samples, num) of 64 bits, after the dimensions of keys (..., 1, 1, 1)."""
    places = torch.arange(1, num + 1, device=device)
    rows = torch.arange(samples.start, samples.stop, samples.step, device=device)[:, None]
    layers = torch.arange(probes.start, probes.stop, device=device)[:, None, None]
    numbers = places.add(rows, alpha=num).add(layers, alpha=_WORDS)
    z = torch.add(key.to(device, non_blocking=True), numbers, alpha=_STEP)
    for shift, factor in _ROUNDS:
        z = _folded(z, shift).mul_(factor)
    return _folded(z, 31)


def _folded(z: Tensor, shift: int) -> Tensor:
    """``z ^ (z >> shift)`` of unsigned numbers; torch's shift copies the sign bit, which the mask removes."""
    return (z >> shift).bitwise_and_(2 ** (64 - shift) - 1).bitwise_xor_(z)


@checked
def rademacher(
    num: Size, size: Size, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Return probes (num, size) of independent random signs (Hutchinson 1989).

    For a probe v, |A v|^2 is an unbiased estimate of |A|_F^2.  It has no error if A^T A is diagonal.

    >>> rademacher(2, 3, generator=torch.Generator().manual_seed(0)).abs().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    key = new_key(generator, _source(num, size, generator, device))
    return signs(key, range(num), range(1), size, dtype, torch.device(device))[:, 0]


@checked
def sphere(
    num: Size, size: Size, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Return probes (num, size) that are uniform on the sphere of radius sqrt(size).

    For a probe v, |A v|^2 is an unbiased estimate of |A|_F^2.  The estimate has the same variance for A and for A Q, if
    Q is orthogonal.

    >>> sphere(2, 9, generator=torch.Generator().manual_seed(0)).norm(dim=1).round(decimals=6).tolist()
    [3.0, 3.0]
    """
    source = _source(num, size, generator, device)
    v = torch.randn(num, size, generator=generator, dtype=torch.float64, device=source)
    return (v * (math.sqrt(size) / v.norm(dim=1, keepdim=True))).to(device=device, dtype=dtype)


@checked
def orthonormal(
    num: Size, size: Size, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Return random, mutually orthogonal probes (num, size) of length sqrt(size), for num <= size.

    The directions of the probes are uniformly distributed (Haar measure).  The mean of |A v|^2 over the probes v is an
    unbiased estimate of |A|_F^2, and exact if num == size.  The standard error of this mean is at most that for ``num``
    independent probes of `sphere`.

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
    """The device to draw on; ValueError if the probes need more than 8 GB, or the device is unknown."""
    if num * size > MOST_NUMBERS:
        raise ValueError(f"num * size must be at most {MOST_NUMBERS:,}, got num={num}, size={size}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be a device of this machine, such as 'cpu', got {shown(device)}.") from error
    return generator.device if generator is not None else torch.device(device)
