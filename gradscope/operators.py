"""A linear operator, given by its shape and two callables; everything else is derived from these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy
import torch
from torch import Tensor

from gradscope.choices import checked, shown

DENSE_UP_TO = 500  # a matrix whose smaller side is at most this is decomposed as a dense matrix


@checked
@dataclass(frozen=True)
class LinearOperator:
    """An m x n matrix A known only by its products with vectors.

    ``matvec`` maps v of shape (n,) to A v of shape (m,), and ``rmatvec`` maps u of shape (m,) to A^T u of shape (n,).
    All vectors have the dtype ``dtype`` and are on the device ``device``.

    >>> double = LinearOperator((3, 3), lambda v: 2 * v, lambda u: 2 * u)
    >>> (double @ double.T).dense().diagonal().tolist(), double.log_volume() == 3 * math.log(2)
    ([4.0, 4.0, 4.0], True)
    """

    shape: tuple[int, int]
    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transpose A^T, an n x m operator."""
        return LinearOperator(self.shape[::-1], self.rmatvec, self.matvec, self.dtype, self.device)

    def __matmul__(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Return A v for a vector (n,), A V for a matrix (n, k), or the operator A B for an operator B."""
        if other.shape[0] != self.shape[1]:
            raise ValueError(
                f"Cannot multiply an operator of shape {self.shape} by shape {tuple(other.shape)}: "
                f"{self.shape[1]} columns, but {other.shape[0]} rows."
            )
        if isinstance(other, LinearOperator):
            return LinearOperator(
                (self.shape[0], other.shape[1]), lambda v: self.matvec(other.matvec(v)),
                lambda u: other.rmatvec(self.rmatvec(u)), self.dtype, self.device,
            )  # fmt: skip
        if other.ndim == 1:
            return self.matvec(other)
        return torch.stack([self.matvec(column) for column in other.T], dim=1)

    def dense(self) -> Tensor:
        """Return A as an m x n tensor.  Cost: min(m, n) products with A or A^T."""
        m, n = self.shape
        units = torch.eye(min(m, n), dtype=self.dtype, device=self.device)
        name, product, dim = ("rmatvec", self.rmatvec, 0) if m <= n else ("matvec", self.matvec, 1)
        products, longer = [product(unit) for unit in units], max(m, n)
        for found in products:
            if not isinstance(found, Tensor) or found.shape != (longer,):
                what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
                raise ValueError(f"{name} must return a tensor of shape ({longer},), got {what}.")
        return torch.stack(products, dim=dim)

    def singular_values(self, k: int | None = None) -> Tensor:
        """Return the ``k`` largest singular values in descending order, in float64; by default all min(m, n).

        Cost: that of `dense` and an SVD.  If min(m, n) > 500 and k < min(m, n) / 10, Lanczos iterations are used
        instead, with a tolerance of 1e-10.  They need more products with A and A^T if k is large or the singular values
        lie close together.  For a Gaussian 2000 x 2000 matrix, they need about 320 products with each of A and A^T if
        k = 5, and 530 with each if k = 50.

        Raises:
            ValueError: ``k`` is not an integer from 1 to min(m, n).
        """
        smaller = min(self.shape)
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= smaller):
            raise ValueError(f"k must be an integer from 1 to min(m, n) = {smaller}, got {k!r}.")
        if k is not None and smaller > DENSE_UP_TO and 10 * k < smaller:
            start = np.random.default_rng(0).standard_normal(smaller)
            values = scipy.sparse.linalg.svds(self.to_scipy(), k, return_singular_vectors=False, tol=1e-10, v0=start)
            return torch.from_numpy(np.sort(values)[::-1].copy())
        return torch.linalg.svdvals(self.dense().double())[:k]

    def condition(self) -> float:
        """Return the condition number, the ratio of the largest to the smallest singular value; may be infinite."""
        values = self.singular_values()
        return float(values[0] / values[-1]) if values[-1] > 0 else math.inf

    def log_volume(self) -> float:
        """Return the sum of ln s_i over the min(m, n) singular values s_i; for a square matrix, this is ln |det A|.

        The sum is -inf if a singular value is 0.  If m >= n, log_volume / n <= ln(|A|_F / sqrt(n)), with equality if
        and only if all singular values are equal.
        """
        return float(self.singular_values().log().sum())

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return A as an operator for ``scipy.sparse.linalg``, which acts on float64 NumPy vectors."""

        def apply(product: Callable[[Tensor], Tensor], vector: np.ndarray) -> np.ndarray:
            v = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1)))
            return product(v.to(self.device, self.dtype)).detach().cpu().double().numpy()

        matvec, rmatvec = partial(apply, self.matvec), partial(apply, self.rmatvec)
        return scipy.sparse.linalg.LinearOperator(shape=self.shape, matvec=matvec, rmatvec=rmatvec, dtype=np.float64)


def matrix(a: Tensor) -> LinearOperator:
    """The `LinearOperator` of a given m x n matrix."""
    if a.ndim != 2:
        raise ValueError(f"matrix() needs one m x n matrix, got shape {tuple(a.shape)}.")
    m, n = a.shape
    return LinearOperator((m, n), lambda v: a @ v, lambda u: a.T @ u, a.dtype, a.device)
