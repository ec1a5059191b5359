"""Measure gradient norms, GSC and pre-activations of a network, and chains of sigmoids."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments.studies.vanishing import chains
from experiments.studies.vanishing.numbers import SCALES
from gradscope.measures import GradientNorm, PreactivationStd
from gradscope.models import MLP


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """Gradient norms, GSC and pre-activation deviations of a network with a head, with random labels.

    For a sigmoid network without normalization, also gradient norms with larger weights (``weight_scale``) and chains.
    """
    with torch.no_grad():
        num_classes = model(x).shape[1]
    y = torch.randint(num_classes, (len(x),), generator=generator)
    parts = [
        gs.measure(model, (x, y), loss_fn=_loss, measures=[GradientNorm(), PreactivationStd()]),
        gs.gsc(model, x).to_frame(),
    ]
    sigmoid = isinstance(model, MLP) and all(
        isinstance(layer.activation, nn.Sigmoid) and layer.norm is None for layer in model.layers
    )
    if sigmoid:
        parts += [chains.compared(), *(chains.long_chain(name) for name in chains.LONG)]
    parts = [part.assign(weight_scale=1) for part in parts]
    for scale in SCALES if sigmoid else ():
        larger = gs.measure(scaled(model, scale), (x, y), loss_fn=_loss, measures=[GradientNorm()])
        parts.append(larger.assign(weight_scale=scale))
    return pd.concat(parts, ignore_index=True)


def scaled(model: nn.Module, scale: float) -> nn.Module:
    """A copy whose weights are multiplied by ``scale`` in every layer except the head."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.startswith("layers."):
                weight.mul_(scale)
    return other


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output, labels, reduction="none")
