"""The effective rank of a batch of pre-activations; see `gradscope.measures.activation`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special
from torch import Tensor

from gradscope.estimates import Estimate, FloatArray
from gradscope.measures import blocks
from gradscope.measures.blocks import PREACTIVATIONS, flattened, largest
from gradscope.measures.samples import Statistic

EXACT = 1e8  # squared condition up to which eigenvalues of inner products give 10 digits
NARROW = 4  # ratio of the sides of a matrix up to which its QR decomposition costs no more than these eigenvalues


class EffectiveRank(Statistic, quantity="effective_rank", of=PREACTIVATIONS):
    """Effective rank of the matrix of pre-activations (B, neurons): exp(entropy of its normalized singular values).

    It is exp(-sum_i p_i ln p_i) with p_i = s_i / sum_j s_j, for the singular values s_i.  The matrix is not centered.
    A matrix of zeros has rank 0.  Otherwise, the rank is between 1 (all samples are parallel) and min(B, neurons).  The
    value grows with the size of the batch.  It has no standard error (None).

    Cost: a QR decomposition, if the longer side of the matrix is at most 4 times the shorter one.  Otherwise, the
    eigenvalues of the matrix of inner products of all rows (or of all columns, if there are fewer).  If the smallest
    eigenvalue is below 1e-8 of the largest, rounding makes it too inexact.  `gradscope.measure` then runs the forward
    pass once more, for a QR decomposition.

    Reference: Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality".

    >>> round(EffectiveRank()(torch.eye(3)).value, 6)
    3.0
    """

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        flat = flattened(preactivations)
        if max(flat.shape) <= NARROW * min(flat.shape):
            return [_triangular(preactivations)[None]]
        scale = largest(flat.abs().amax()) if flat.dtype == torch.float64 else None
        rows = flat if flat.shape[0] <= flat.shape[1] else flat.T
        return [_products(rows, 1.0 if scale is None else scale)]

    def estimate(self, matrix: FloatArray) -> Estimate | Statistic:
        if not np.isfinite(matrix).all():
            return Estimate(math.nan, None)
        if matrix.ndim == 3:
            return _rank_of(np.linalg.svd(matrix[0], compute_uv=False))
        squares = np.linalg.eigvalsh(matrix)
        precise = squares[0] > squares[-1] / EXACT or not matrix.any()
        return _rank_of(np.sqrt(squares)) if precise else _RankOfTriangular()


def _products(rows: Tensor, scale: Tensor | float) -> Tensor:
    """Inner products of all pairs of rows, divided by the scale, in float64; those below the diagonal are copied."""
    num, half = len(rows), len(rows) // 2
    room = rows.new_empty((num, max(1, blocks.BLOCK // num)), dtype=torch.float64)
    upper, lower = room.new_zeros(half, num), room.new_zeros(num - half, num - half)
    for part in rows.split(room.shape[1], dim=1):
        scaled = torch.div(part, scale, out=room[:, : part.shape[1]])
        upper.addmm_(scaled[:half], scaled.T)
        lower.addmm_(scaled[half:], scaled[half:].T)
    return torch.cat([upper, torch.cat([upper[:, half:].T, lower], dim=1)])


class _RankOfTriangular(EffectiveRank):
    """The effective rank by a QR decomposition of the B x neurons matrix, whatever its shape."""

    def parts(self, preactivations: Tensor) -> Sequence[Tensor]:
        return [_triangular(preactivations)[None]]


def _triangular(values: Tensor) -> Tensor:
    """R of a QR decomposition of the B x neurons matrix or its transpose: with its singular values up to a factor."""
    flat = flattened(values)
    matrix = flat.double() / largest(flat.abs().amax().double())
    return torch.linalg.qr(matrix.T if flat.shape[0] <= flat.shape[1] else matrix, mode="r").R


def _rank_of(values: FloatArray) -> Estimate:
    """The effective rank, from singular values up to a factor."""
    return Estimate(math.exp(special.entr(values / values.sum()).sum()) if values.any() else 0.0, None)
