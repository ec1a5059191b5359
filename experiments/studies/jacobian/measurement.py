"""Measure the Jacobian at one point: grid and areas of a map of the plane, singular values of deep networks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.frames import observed
from gradscope.models import MLP

STEPS = np.logspace(-4, 0, 13)
NUM_DIRECTIONS = 16
# Few directions carry the norm if the effective rank is below this fraction of the width.
FEW = 0.1


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_lines: int, extent: float) -> pd.DataFrame:
    """Grid and areas of a map of the plane if the input ``x`` (1, n) has n = 2; otherwise singular values by depth.

    The grid of the plane has ``num_lines`` lines in each direction, from ``-extent`` to ``extent``.
    """
    if len(x) != 1:
        raise ValueError(f"The Jacobian is measured at one point, got {len(x)} samples; set data.batch_size=1.")
    return _plane(model, x, generator, num_lines, extent) if x.shape[1] == 2 else _depth(model, x)


def _plane(model: nn.Module, x: Tensor, generator: torch.Generator, num_lines: int, extent: float) -> pd.DataFrame:
    captured = gs.capture(model, x)
    affine = captured.jacobian("input", captured.target.name).linearize()
    j, value = affine.jacobian.dense(), affine.value
    side = torch.linspace(-extent, extent, num_lines, dtype=x.dtype)
    u, v = (part.flatten() for part in torch.meshgrid(side, side, indexing="ij"))
    with torch.no_grad():
        image = model(x + torch.stack([u, v], dim=1))
        parts = [observed("image", image[:, axis].numpy(), axis=axis, u=u.numpy(), v=v.numpy()) for axis in (0, 1)]
        parts += [observed("linear", (value[0, a], *j[a]), axis=a, index=[0, 1, 2]) for a in (0, 1)]
        directions = torch.randn(NUM_DIRECTIONS, 2, dtype=x.dtype, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        for step in STEPS:
            linear = step * directions @ j.T
            error = (model(x + step * directions) - value - linear).norm(dim=1) / linear.norm(dim=1)
            corners = model(x + step / 2 * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=x.dtype))
            parts.append(observed("linearization_error", float(error.square().mean().sqrt()), step=step))
            parts.append(observed("area", float(_area(corners) / step**2), step=step))
    parts.append(observed("determinant", abs(float(torch.linalg.det(j)))))
    return pd.concat(parts, ignore_index=True)


def _area(corners: Tensor) -> Tensor:
    """Area of a polygon with the given corners, (k, 2) -> ()."""
    after = corners.roll(-1, dims=0)
    return (corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum().abs() / 2


def _depth(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Four numbers computed from the singular values of the Jacobian from the input to every layer.

    Small singular values of a deep Jacobian are smaller than the rounding errors of the large ones. So ln|det J| is
    summed over layers. Without the largest tenth, the sum is ln|det J| minus the logarithms of the largest tenth.
    """
    captured = gs.capture(model, x)
    names = [layer.name for layer in captured.units]
    total, volume = torch.eye(x.shape[1], dtype=x.dtype), 0.0
    few = math.ceil(FEW * x.shape[1])
    rows = []
    for before, name in itertools.pairwise(names):
        step = captured.jacobian(before, name).dense()
        total, volume = step @ total, volume + float(torch.linalg.slogdet(step).logabsdet)
        singular = torch.linalg.svdvals(total)
        shares = (singular / singular[0]).square()
        rows.append(
            {
                "log_qm_norm": float(gs.qm_norm(total).log()),
                "mean_log_singular_value": volume / len(step),
                "mean_log_of_most": (volume - float(singular[:few].log().sum())) / (len(step) - few),
                "effective_rank": float(shares.sum().square() / shares.square().sum()),
            }
        )
    index = np.arange(1, len(names))
    parts = [observed(str(name), own, layer=names[1:], index=index) for name, own in pd.DataFrame(rows).items()]
    return pd.concat(parts, ignore_index=True)


def rotations(depth: int, width: int, scale: float, in_features: int, *, generator: torch.Generator) -> MLP:
    """Layers f_l = scale Q_l f_{l-1} with uniformly random orthogonal Q_l. All singular values are scale^l."""
    network = MLP(
        depth=depth, width=width, in_features=in_features, activation="linear", init="orthogonal", generator=generator
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(scale)
    return network
