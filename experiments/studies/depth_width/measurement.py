"""GSC of a network from a few equally spaced layers, and the networks and tolerance of the study."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs

# The answer is about the first network.
NETWORKS = ("selu", "relu", "relu_layer", "relu_batch", "tanh", "tanh_layer", "tanh_batch")
# Number of initializations in the first analysis of the data, and number of analyses.
FIRST_SEEDS, LOOKS = 13, 2
# Tolerance of the log rate. Over the 200 layers of the deepest network, it amounts to a factor of e in GSC.
TOLERANCE = 1 / 200


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int, num_sources: int
) -> pd.DataFrame:
    """GSC to the last layer of an MLP, from ``num_sources`` equally spaced layers (including the last)."""
    depth = len(model.get_submodule("layers")._modules)
    if depth % num_sources:
        raise ValueError(f"num_sources={num_sources} must divide the depth, got depth {depth}.")
    step = depth // num_sources
    chosen = [f"layers.{number}" for number in range(step - 1, depth, step)]
    return gs.gsc(model, x, layers=chosen, probes=num_probes, generator=generator).to_frame()
