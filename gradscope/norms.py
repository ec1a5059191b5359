"""The quadratic mean norm of matrices and operators, and sums of squares without overflow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope import probes as probe_vectors
from gradscope.choices import checked
from gradscope.estimates import Estimate, Moments
from gradscope.memory import BLOCK, BLOCKED, Workspace
from gradscope.operators import LinearOperator
from gradscope.probes import MOST_PROBES


@overload
def qm_norm(a: Tensor | npt.NDArray[np.generic]) -> Tensor: ...
@overload
def qm_norm(
    a: LinearOperator, *, probes: int | str | None = None, generator: torch.Generator | None = None
) -> Estimate: ...
@checked
def qm_norm(
    a: Tensor | npt.NDArray[np.generic] | LinearOperator,
    *,
    probes: int | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | Estimate:
    """Quadratic mean norm |A|_F / sqrt(n) of an m x n matrix A.

    It equals sqrt((s_1^2 + ... + s_min(m,n)^2) / n) with the singular values s_i of A.  It is the quadratic mean of
    |A u| over unit vectors u in R^n: the factor by which A stretches a random direction.

    Arguments:
        a: A tensor or array of shape (..., m, n) gives exact norms as a float64 tensor of shape (...).  A
            `LinearOperator` gives an `Estimate`, whose square is an unbiased estimate of the squared norm.
        probes: For an operator, the number of random directions (default 32), or "exact", which takes min(m, n)
            products with the operator.
        generator: Source of the random directions of an operator.

    Raises:
        ValueError: ``a`` has fewer than two dimensions, is empty or holds NaN; or a product with the operator is not
            finite; or ``probes`` is invalid; or ``probes`` or ``generator`` is given for a tensor.

    Reference: Philipp, Song and Carbonell (2018), "The exploding gradient problem demystified", arXiv:1712.05577.

    >>> float(qm_norm(torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
    2.23606797749979
    """
    if isinstance(a, LinearOperator):
        return _qm_norm_operator(a, 32 if probes is None else probes, generator)
    if probes is not None or generator is not None:
        raise ValueError("probes and generator apply to a LinearOperator; the qm norm of a tensor is always exact.")
    a = torch.as_tensor(a)
    if a.ndim < 2 or 0 in a.shape[-2:]:
        raise ValueError(f"qm_norm needs nonempty matrices (..., m, n), got shape {tuple(a.shape)}.")
    if a.layout is not torch.strided:
        raise ValueError(f"qm_norm needs a dense tensor, got layout {a.layout}: give a.to_dense().")
    if a.isnan().any():
        raise ValueError("qm_norm is not defined: a holds NaN.")
    a = a.to(torch.complex128 if a.is_complex() else torch.float64).abs()
    # Dividing by a power of two near the largest entry is exact, and keeps every square in the range of float64.
    scale = power_of_two(torch.frexp(a.amax(dim=(-2, -1), keepdim=True)).exponent, torch.float64)
    return torch.linalg.matrix_norm(a / scale) / a.shape[-1] ** 0.5 * scale[..., 0, 0]


def _qm_norm_operator(op: LinearOperator, probes: int | str, generator: torch.Generator | None) -> Estimate:
    m, n = op.shape
    if m < 1 or n < 1:
        raise ValueError(f"qm_norm needs a nonempty operator, got shape {op.shape}.")
    if probes == "exact":
        square, exponent = sum_of_squares(op.dense())
        return Estimate.exact(float(square) / n, 2 * int(exponent)).sqrt()
    if isinstance(probes, bool) or not isinstance(probes, int) or not 1 <= probes <= MOST_PROBES:
        raise ValueError(f'probes must be an integer >= 1, at most {MOST_PROBES:,}, or "exact", got {probes!r}.')
    directions = probe_vectors.sphere(probes, n, generator=generator, dtype=op.dtype, device=op.device)
    squares, exponents = zip(*(sum_of_squares(op.matvec(v)) for v in directions), strict=True)
    if not torch.isfinite(torch.stack(squares)).all():
        raise ValueError("The product of the operator and a random direction is NaN or Inf; scale the operator down.")
    moments = Moments.of(torch.stack(squares).cpu().numpy() / n, 2 * torch.stack(exponents).cpu().numpy())
    return moments.estimate().sqrt()


def real(a: Tensor) -> Tensor:
    """The real numbers of a tensor: for a complex one, real and imaginary parts along a new last dimension.

    torch's gradient of a real loss by z = x + iy is dL/dx + i dL/dy.  So the real numbers of a vector-Jacobian product
    are the vector-Jacobian product of the same network written with real numbers.
    """
    return torch.view_as_real(a.resolve_conj().resolve_neg()) if a.is_complex() else a


def from_real(a: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Tensors (..., *shape) of a real or complex ``dtype`` from their real numbers (..., n): the inverse of `real`."""
    if dtype.is_complex:
        return torch.view_as_complex(a.reshape(*a.shape[:-1], *shape, 2).contiguous())
    return a.reshape(*a.shape[:-1], *shape)


def sum_of_squares(a: Tensor, start_dim: int = 0) -> tuple[Tensor, Tensor]:
    """Sum of |a|^2 over the dimensions from ``start_dim`` on, as float64 ``squares * 4**exponent``."""
    norms, exponent = vector_norms(a, start_dim)
    return norms.square(), exponent


def vector_norms(a: Tensor, start_dim: int = 0, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Euclidean norm over the dimensions from ``start_dim`` on, as float64 ``norms * 2**exponent``.

    ``exponent`` is one int64 for the whole tensor.  Squares of float32 and narrower types cannot overflow a float64
    sum; for these types ``exponent`` is 0 and lies on the CPU.  This function does not synchronize the device.
    """
    a = a.detach()
    if a.dtype in (torch.float64, torch.complex128) and a.numel():
        exponent = torch.frexp(a.abs().amax()).exponent.to(torch.int64).clamp(-1022, 1022)
        return plain_norms(a * power_of_two(-exponent, torch.float64), start_dim), exponent
    return plain_norms(a, start_dim, scratch), _ZERO


def plain_norms(a: Tensor, start_dim: int = 0, scratch: Tensor | None = None) -> Tensor:
    """Euclidean norm over the dimensions from ``start_dim`` on, summed in float64; squares must not overflow float64.

    ``scratch``: flat float64 memory.  If given, ``a`` is copied there in parts: several times faster for float32.
    """
    if a.device.type == "mps":  # has no float64
        a = a.cpu()
    if start_dim == a.ndim:
        return a.abs().double()
    if scratch is not None and a.is_floating_point() and a.dtype != torch.float64:
        if a.numel() > scratch.numel():
            return _norms_of_parts(a, start_dim, scratch)
        a = scratch[: a.numel()].view(a.shape).copy_(a)
    dtype = torch.complex128 if a.is_complex() else torch.float64
    return torch.linalg.vector_norm(a, dim=tuple(range(start_dim, a.ndim)), dtype=dtype)


def _norms_of_parts(a: Tensor, start_dim: int, scratch: Tensor) -> Tensor:
    """`plain_norms` of a tensor that is larger than the scratch memory."""
    if start_dim == 0:
        parts = a.reshape(-1).split(scratch.numel())
        return torch.linalg.vector_norm(torch.stack([plain_norms(part, 0, scratch) for part in parts]))
    rows = scratch.numel() // max(1, a[0].numel())
    if rows == 0:
        return torch.stack([plain_norms(part, start_dim - 1, scratch) for part in a])
    return torch.cat([plain_norms(part, start_dim, scratch) for part in a.split(rows)])


def stacked_norms(tensors: Sequence[Tensor], start_dims: Sequence[int], workspace: Workspace) -> list[Tensor]:
    """`plain_norms` of every tensor, flat; small tensors of one kind are stacked and summed together."""
    found: list[Any] = [None] * len(tensors)
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, (a, start_dim) in enumerate(zip(tensors, start_dims, strict=True)):
        groups[a.shape, a.dtype, a.device, start_dim] += [number]
    for (shape, dtype, device, start_dim), members in groups.items():
        room = BLOCK // max(1, shape.numel())
        exact = dtype.is_floating_point and dtype != torch.float64 and device.type != "mps"
        if room < BLOCKED or not exact or start_dim == len(shape):
            for number in members:
                a = tensors[number]
                found[number] = plain_norms(a, start_dim, workspace.scratch(a)).reshape(-1)
            continue
        dims = tuple(range(start_dim + 1, len(shape) + 1))
        for first in range(0, len(members), room):
            part = members[first : first + room]
            together = torch.stack([tensors[number] for number in part])
            norms = torch.linalg.vector_norm(together, dim=dims, dtype=torch.float64)
            for number, one in zip(part, norms.view(len(part), -1).unbind(0), strict=True):
                found[number] = one
    return found


_ZERO = torch.zeros((), dtype=torch.int64)


def power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """``2**exponents`` exactly, clamped to the normal numbers of ``dtype``."""
    # Built from bits, because torch.pow and torch.ldexp round on some devices.
    largest = math.frexp(torch.finfo(dtype).max)[1] - 1
    exponents = exponents.to(torch.int64).clamp(-largest + 1, largest)
    if dtype == torch.float64:
        return ((exponents + 1023) << 52).view(torch.float64)
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32).to(dtype)
