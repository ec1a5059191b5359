"""GSC from blocks to the last block of a GPT, and the length of its residual stream."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from experiments.evidence.study import evenly
from gradscope.frames import observed

NUM_SOURCES = 12


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int) -> pd.DataFrame:
    """GSC from the embedding and from at most `NUM_SOURCES` blocks to the last block, and growth of the stream.

    ``log10_square_growth`` is log10 of the squared length of the stream after the last block, divided by that of the
    embedding.
    """
    depth = len(model.get_submodule("blocks"))  # type: ignore[arg-type]
    last = f"blocks.{depth - 1}"
    layers = ["embedding", *(f"blocks.{number}" for number in evenly(depth, NUM_SOURCES))]
    profile = gs.gsc(model, x, layers=layers, target=last, probes=num_probes, generator=generator)
    with torch.no_grad():
        first = model.get_submodule("embedding")(x)
        stream = model.get_submodule("blocks")(first)
    growth = 2 * math.log10(float(stream.double().norm() / first.double().norm()))
    return pd.concat([profile.to_frame(), observed("log10_square_growth", growth)], ignore_index=True)
