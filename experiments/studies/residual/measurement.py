"""Residual networks with a given dilution, how they are measured, and what the law of dilution predicts.

The dilution of a residual block is the length of the skip divided by the length of the branch.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from experiments.evidence.study import evenly
from gradscope import meanfield as mf
from gradscope.frames import observed
from gradscope.models.mlp import MLP
from gradscope.models.resnet import ResNet

FloatArray = npt.NDArray[np.float64]
BRANCHES = {"tanh_layer": ("tanh", "layer"), "relu_batch": ("relu", "batch")}
DILUTIONS = ("0", "0.5", "1", "2", "4")
UNIT = "unit"
OTHERS = {"relu": ("relu", "none"), "relu_end": ("relu", "none")}
RESNET, RESNET_DEPTH = "resnet", 32
NUM_SOURCES, NUM_BLOCKS = 10, 6
REACHED = (2, 4, 8, 16, 32, 64, 100)


def network(case: str, depth: int, width: int, *, generator: torch.Generator) -> nn.Module:
    """The network of a case ``<branch>-<dilution>`` or ``<branch>-unit``, for images of 3 x 32 x 32.

    A third part of a case such as ``-100`` replaces ``width``.  The ResNet ignores ``depth`` and ``width``.
    """
    known = {*BRANCHES, *OTHERS, RESNET}
    found = re.fullmatch(r"(\w+)-(unit|\d+(?:\.\d+)?)(?:-(\d+))?", case)
    if found is None or found[1] not in known:
        raise ValueError(f"A case must be one of {', '.join(sorted(known))} with -unit or -DILUTION; got {case!r}.")
    branch, dilution, width = found[1], found[2], int(found[3] or width)
    if branch == RESNET:
        skips = "identity" if dilution == UNIT else "none"
        return ResNet(depth=RESNET_DEPTH, residual=skips, generator=generator)
    activation, norm = (BRANCHES | OTHERS)[branch]
    model = MLP(
        depth=depth, width=width, activation=activation, norm=norm, residual="identity",
        skip_weight=skip_weight(dilution), in_features=3 * 32 * 32, generator=generator,
    )  # fmt: skip
    if branch == "relu_end":
        for block in model.layers:
            block.out = nn.Identity()
    return model


def skip_weight(dilution: str) -> float:
    """Skip weight s = k / sqrt(k^2 + 1): if all branches have the same length, the dilution converges to k."""
    return 1.0 if dilution == UNIT else float(dilution) / math.hypot(float(dilution), 1)


class Branch(nn.Module):
    """The branch of a residual block: the output of the block minus the skip connection."""

    def __init__(self, block: nn.Module, skip: float) -> None:
        super().__init__()
        self.block, self.skip = block, skip

    def forward(self, x: Tensor) -> Tensor:
        """block(x) - skip x."""
        y: Tensor = self.block(x) - self.skip * x
        return y


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int) -> pd.DataFrame:
    """GSC to the output. For a residual MLP, also GSC from the stem, and GSC and dilution of single blocks."""
    if isinstance(model, ResNet):
        profile = gs.gsc(model, x, probes=num_probes, generator=generator).to_frame()
        return profile[profile["layer"].str.startswith("stage")]
    layers: nn.Sequential = model.get_submodule("layers")  # type: ignore[assignment]
    depth = len(layers)
    sources = [f"layers.{number}" for number in evenly(depth, NUM_SOURCES)]
    parts = [gs.gsc(model, x, layers=sources, probes=num_probes, generator=generator).to_frame()]
    reached = ["stem", *(f"layers.{number - 1}" for number in REACHED if number <= depth)]
    pairs = gs.gsc_matrix(model, x, layers=reached, probes=num_probes, generator=generator).to_frame()
    parts.append(pairs[(pairs["layer"] == "stem") & (pairs["target"] != "stem")].assign(quantity="gsc_from_stem"))
    with torch.no_grad():
        outputs = [model.get_submodule("stem")(x.flatten(1))]
        for layer in layers:
            outputs.append(layer(outputs[-1]))
    growth = 2 * math.log10(float(outputs[-1].double().norm() / outputs[0].double().norm()))
    parts.append(observed("log10_length_growth", growth))
    for number in evenly(depth, NUM_BLOCKS):
        parts.append(_block(layers[number], outputs[number], number, generator, num_probes))
    return pd.concat(parts, ignore_index=True)


def _block(block: nn.Module, f: Tensor, number: int, generator: torch.Generator, num_probes: int) -> pd.DataFrame:
    """GSC of a block, GSC of its branch, and dilution k, at the input ``f`` of the block."""
    skip = float(block.skip_weight)  # type: ignore[arg-type]
    branch = Branch(block, skip)
    with torch.no_grad():
        k = float(skip * f.double().norm() / branch(f).double().norm())
    found = {
        name: 10.0 ** gs.gsc(module, f, layers="input", probes=num_probes, generator=generator).log10_values[0, 0]
        for name, module in (("block_gsc", block), ("branch_gsc", branch))
    } | {"dilution": k}
    rows = [observed(name, value, layer=f"layers.{number}", index=number) for name, value in found.items()]
    return pd.concat(rows, ignore_index=True)


def rate(branch: str, batch_size: int) -> float:
    """GSC r of a branch without the skip, at infinite width."""
    activation, norm = (BRANCHES | OTHERS)[branch]
    return mf.gsc_rate(activation, norm, batch_size if norm == "batch" else None)


def law(branch: str, dilution: str, depth: int, batch_size: int) -> FloatArray:
    """log10 GSC from the stem to every block by the law, at infinite width, as an array of shape (depth + 1,).

    The mean square q of a layer starts at 1 and follows q <- s^2 q + v, where v is the mean square of the branch. So
    k^2 = s^2 q / v.  Batch normalization divides by the variance over samples, the varying part of q, instead of q.
    This part follows the same recursion with the varying part of v.
    """
    activation, norm = (BRANCHES | OTHERS)[branch]
    phi, r = mf.as_activation(activation), rate(branch, batch_size)
    square, average = (float(mf.gaussian(function, 1.0, phi.kinks)) for function in (lambda h: phi(h) ** 2, phi))
    own = 1 - average**2 / square if norm == "batch" else 1.0
    s, q, varying, logarithms = skip_weight(dilution), 1.0, 1.0, [0.0]
    for _ in range(depth):
        v = q if norm == "none" else square
        block = mf.residual_rate(r * own * q / varying, s * math.sqrt(q / v))
        logarithms.append(logarithms[-1] + math.log10(block))
        q, varying = s**2 * q + v, s**2 * varying + own * v
    return np.array(logarithms)
