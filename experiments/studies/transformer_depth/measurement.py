"""GSC over a GPT, the length of its residual stream and the share of its skips, each beside mean-field theory."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.frames import observed


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int) -> pd.DataFrame:
    """GSC from the embedding to the logits, growth of the stream, and skip shares, each with its prediction.

    ``log10_square_growth`` is log10 of the squared length of the stream after the last branch (with post-norm: before
    its norm), divided by that of the embedding.  ``skip_share`` is given for the branches of `blocks`.  Predictions
    have names that end in ``_theory``; ``log10_gsc_low`` and ``log10_gsc_high`` are the ends of the band.
    """
    theory = model.mean_field(x)  # type: ignore[operator]
    profile = gs.gsc(model, x, layers=["embedding"], probes=num_probes, generator=generator)
    predicted = theory.gsc().iloc[0]
    about = {"theory": "value", "low": "low", "high": "high"}
    band = [f"log10_gsc_{name}" for name in about], [predicted[f"log10_{name}"] for name in about.values()]
    ledgers = gs.residual(model, x, probes=num_probes, generator=generator).to_frame(), theory.ledger()
    measured, expected = (ledger.pivot(index="layer", columns="quantity", values="value") for ledger in ledgers)
    branches = [f"blocks.{n}.{name}" for n in blocks(len(model.blocks)) for name in ("attention", "mlp")]  # type: ignore
    embedding, last = "blocks.0.attention", branches[-1]
    growth = 2 * math.log10(measured["sum_rms"][last] / measured["stream_rms"][embedding])
    ends = expected.loc[last, ["stream_rms", "write_rms"]].pow(2).sum(), expected["stream_rms"][embedding] ** 2
    parts = [
        profile.to_frame(),
        observed(*band),
        observed(["log10_square_growth", "log10_square_growth_theory"], [growth, math.log10(ends[0] / ends[1])]),
        observed("skip_share", measured["skip_share"][branches].to_numpy(), layer=branches),
        observed("skip_share_theory", expected["skip_share"][branches].to_numpy(), layer=branches),
    ]
    return pd.concat(parts, ignore_index=True)


def blocks(depth: int) -> list[int]:
    """Numbers of the blocks whose skip shares are kept: 0, 1, 3, 7, 15, ... and the last one."""
    return [2**n - 1 for n in range(depth.bit_length()) if 2**n < depth] + [depth - 1]
