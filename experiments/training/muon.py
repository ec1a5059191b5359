"""The optimizer Muon, which orthogonalizes the update of every kernel and hidden matrix.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), kellerjordan.github.io/posts/muon.
`torch.optim.Muon` takes matrices only, and computes in bfloat16, which most CPUs emulate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the odd polynomial f(s) = a s + b s^3 + c s^5.
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for kernels and hidden matrices, Nesterov SGD for the last matrix (the output layer) and for vectors.

    A step with gradient g is m <- momentum m + g, then w <- (1 - lr weight_decay) w - lr u.  For kernels, reshaped to
    matrices (outputs, inputs x positions), u is g + momentum m `orthogonalized`.  For all other parameters u is
    g + momentum m, and ``rest_lr`` takes the place of ``lr``.

    Arguments:
        params: Groups of parameters, in the order of the network.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 0.01,
        rest_lr: float = 0.05,
    ) -> None:  # fmt: skip
        for name, value, valid, wanted in (
            ("lr", lr, lr > 0, "positive"),
            ("rest_lr", rest_lr, rest_lr > 0, "positive"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ):
            if not valid:
                raise ValueError(f"optimizer.{name} must be {wanted}, got {value!r}.")
        matrices = {id(p) for p in [p for group in params for p in group["params"] if p.ndim > 1][:-1]}
        groups = [
            {**group, "params": chosen, "lr": rate, "orthogonal": orthogonal}
            for orthogonal, rate in ((True, lr), (False, rest_lr))
            for group in params
            if (chosen := [p for p in group["params"] if (id(p) in matrices) is orthogonal])
        ]
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.mul_(group["momentum"]).add_(p.grad)
                change = p.grad.add(mean, alpha=group["momentum"])
                if group["orthogonal"]:
                    change = orthogonalized(change.flatten(1)).view(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix U f(S) V^T sqrt(max(1, rows / columns)) for a matrix with singular value decomposition U S V^T.

    f is five iterations of an odd polynomial, starting from S over its norm.  Singular values above 1 % of the norm
    become values between 0.68 and 1.13.  The iterations act on the smaller Gram matrix, so the large matrix is
    multiplied twice only.
    """
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / x.norm().clamp(min=1e-30)
    a, b, c = POLYNOMIAL
    gram = x @ x.T
    factor = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(STEPS):
        polynomial = a * identity + b * gram + c * gram @ gram
        factor, gram = polynomial @ factor, polynomial @ gram @ polynomial
    x = factor @ x
    return (x.T if rows > columns else x) * max(1, rows / columns) ** 0.5
