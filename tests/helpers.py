"""What several tests share."""

from pathlib import Path

import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.operators import matrix

ROOT = Path(__file__).parent.parent


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


def disguises(A: Tensor) -> dict[str, gs.LinearOperator]:
    """One m x n matrix as every kind of operator that gradscope can make."""
    m, n = A.shape
    u, s, vt = torch.linalg.svd(A, full_matrices=False)
    # A curved function whose derivative at x, not at zero, is A.
    x = noise(1, n, seed=9)
    curved = nn.Sequential(Curve(x), linear(A))
    return {
        "matrix": matrix(A),
        "double transpose": matrix(A).T.T,
        "transpose of the transposed matrix": matrix(A.T.contiguous()).T,
        "product with the identity": matrix(A) @ matrix(torch.eye(n, dtype=A.dtype)),
        "identity times": matrix(torch.eye(m, dtype=A.dtype)) @ matrix(A),
        "product of SVD factors": matrix(u * s) @ matrix(vt),
        "Jacobian of a linear layer": gs.capture(linear(A), x).jacobian("input", "output"),
        "Jacobian of a curved function": gs.capture(curved, x).jacobian("input", "1"),
    }


class Curve(nn.Module):
    """z -> (sinh(z - x) + z^2 / (2 x)) / 2 elementwise, whose derivative at z = x is 1, and elsewhere is not."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.register_buffer("x", x)
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=x.dtype))

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * (torch.sinh(z - self.x) + z**2 / (2 * self.x))
